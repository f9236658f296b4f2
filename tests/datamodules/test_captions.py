"""Captions of a model: what is asked, what is kept, how training draws, and that no interruption loses any."""

import contextlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers.squares import Squares
from helpers.tiny_judges import make_llava
from helpers.tiny_labellers import make_qwen_vl
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from nami_lightning.cli.main import main
from nami_lightning.datamodules.captioning.caption import caption_parts, merge, read_log
from nami_lightning.datamodules.captioning.caption_kinds import (
    KINDS,
    TOO_LONG,
    TOO_SHORT,
    CaptionKind,
    choose_kinds,
)
from nami_lightning.datamodules.captioning.caption_task import CaptionSettings, CaptionTask
from nami_lightning.datamodules.preparation.parts_folder import parts_folder
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation
from nami_lightning.datamodules.storage.dataset import SPLITS, PreparedDataset
from nami_lightning.datamodules.storage.shards import Record
from nami_lightning.datamodules.storage.verify import verify
from nami_lightning.models.labelling.captioner import Captioner, Said

SHORT = CaptionKind("What is it?", 3, 40, 8)
LONG = CaptionKind("Tell all, in {max_length} characters.", 3, 60, 16)


class Echo:
    """Stands for a captioner: it says the prompt's first word and the colour of the image."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], max_tokens: int) -> list[Said]:
        self.asked += len(images)
        colours = [image.getpixel((0, 0)) for image in images]
        return [
            Said(f"{prompt.split()[0]} number {colour[0]}.", True)  # type: ignore[index]
            for prompt, colour in zip(prompts, colours, strict=True)
        ]


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Thirty squares in six parts."""
    folder = tmp_path_factory.mktemp("data") / "squares"
    settings = Preparation([8, 32], heldout_percent=20, format="png")
    return PreparedDataset(prepare(Squares(30, [(40, 40)]), folder, settings, 1))


def all_records(folder: Path) -> dict[str, Record]:
    dataset = PreparedDataset(folder)
    buckets = [bucket for split in SPLITS for bucket in dataset.buckets(split)]
    records = [Record.from_item(item) for bucket in buckets for item in bucket.shards.read(range(len(bucket)))]
    assert len({record.id for record in records}) == len(records)
    return {record.id: record for record in records}


# --- what is asked, and what is kept -------------------------------------------------------------


def test_a_caption_ends_with_a_sentence() -> None:
    kind = CaptionKind("x", 5, 30)
    assert kind.caption(Said("A red cat. It sleeps.", True)) == ("A red cat. It sleeps.", "")
    assert kind.caption(Said("A red cat. It sleeps on", False)) == ("A red cat.", "")
    assert kind.caption(Said("A red cat. It sleeps on a very large bed.", True)) == ("A red cat.", "")
    assert kind.caption(Said("A red cat at 3.5 m that sleeps on a bed", True)) == ("", TOO_LONG)
    assert kind.caption(Said("一只红猫。它在睡觉。它", False)) == ("一只红猫。它在睡觉。", "")
    assert kind.caption(Said("Cat", True)) == ("", TOO_SHORT)
    assert kind.caption(Said(' "A red\n cat"  ', True)) == ("A red cat", "")


def test_prompts_state_limit_language_and_context() -> None:
    assert KINDS["short"].ask().startswith("Describe this image in one short sentence of at most 120 characters.")
    asked = LONG.ask("German", "a {red} cat")
    assert asked.startswith("Tell all, in 60 characters. Answer in German. ")
    assert "“a {red} cat”" in asked


def test_kinds_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "kinds.yaml"
    file.write_text("plain: {prompt: 'List all.', max_length: 50}\nshort: {prompt: 'Say it.'}\n")
    kinds = choose_kinds(["plain", "short", "long"], file)
    assert kinds == {
        "plain": CaptionKind("List all.", max_length=50),
        "short": CaptionKind("Say it."),
        "long": KINDS["long"],
    }
    for text, message in (
        ("plain: {max_length: 5}", "prompt must be there"),
        ("plain: {prompt: 'x {where}'}", "unknown placeholder 'where'"),
        ("plain: {prompt: x, min_length: 9, max_length: 5}", "min_length <= max_length"),
        ("plain: {prompt: x, max_length: many}", "whole numbers"),
        ("- x", "by name"),
        ("plain: [", "no YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            choose_kinds(["plain"], file)
    with pytest.raises(ValueError, match="unknown kind of caption huge"):
        choose_kinds(["huge"])


def test_answers_equal_those_of_transformers(tmp_path: Path) -> None:
    folder = make_llava(tmp_path / "llava", "cat")
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight.normal_()
        model.model.language_model.embed_tokens.weight.normal_()
    model.eval().save_pretrained(folder)
    processor = LlavaProcessor.from_pretrained(folder)
    images = [Image.effect_noise((40, 30 + 5 * i), 90).convert("RGB") for i in range(4)]
    prompts = ["Is there a cat?", "Is there", "a cat?", "a a a a a"]
    said = Captioner(str(folder))(images, prompts, 6)
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        inputs = processor(images=image, text=f"USER: <image> {prompt} ASSISTANT:", return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = processor.decode(written, skip_special_tokens=True).strip()
        expected.append(Said(text, processor.tokenizer.eos_token_id in written))
    assert said == expected
    assert len({one.text for one in said}) > 1


def test_a_batch_is_answered_like_each_image_alone(tmp_path: Path) -> None:
    model = Captioner(str(make_qwen_vl(tmp_path / "qwen")))
    images = [Image.effect_noise((60 + 9 * i, 40), 90).convert("RGB") for i in range(3)]
    prompts = ["what is it ?", "is it a cat ?", "a dog ?"]
    alone = [model([image], [prompt], 5)[0] for image, prompt in zip(images, prompts, strict=True)]
    assert model(images, prompts, 5) == alone
    assert len({one.text for one in alone}) > 1


# --- weights and training ------------------------------------------------------------------------


def test_captions_have_the_weights_that_are_stated(squares: PreparedDataset, tmp_path: Path) -> None:
    settings = CaptionSettings(
        "model", {"short": SHORT, "long": LONG}, ["English", "German"], weights={"old": 1, "long": 2}
    )
    task = CaptionTask(squares, tmp_path / "out", settings)
    record = Record("x", b"", ["a", "b"], [1.0, 3.0])
    said = {label: Said(f"{label} text.", True) for label in settings.labels()}
    counts: Counter[tuple[str, str]] = Counter()
    new = task.with_new(record, said, counts)
    assert new.kinds == ["source", "source", "short-English", "short-German", "long-English", "long-German"]
    assert new.weights == [0.25, 0.75, 0.5, 0.5, 1.0, 1.0]
    drawn = Counter(new.caption((i + 0.5) / 8000) for i in range(8000))
    assert drawn["a"] == 500
    assert drawn["long-German text."] == 2000
    said["short-German"] = Said("ab", True)
    new = task.with_new(record, said, counts)
    assert new.weights == [0.25, 0.75, 1.0, 1.0, 1.0]
    assert counts["short-German", TOO_SHORT] == 1
    assert counts["short-German", ""] == 1


def test_a_sample_keeps_its_captions_if_no_new_one_can_be_used(squares: PreparedDataset, tmp_path: Path) -> None:
    task = CaptionTask(squares, tmp_path / "out", CaptionSettings("model", {"short": SHORT}, weights={"old": 0}))
    new = task.with_new(Record("x", b"", ["a"], []), {"short": Said("", True)}, Counter())
    assert (new.captions, new.weights) == (["a"], [])
    new = task.with_new(Record("x", b"", ["a"], []), {"short": Said("a cat.", True)}, Counter())
    assert [new.caption(i / 100) for i in range(100)] == ["a cat."] * 100


# --- interruptions -------------------------------------------------------------------------------


def make_task(images: PreparedDataset, output: Path) -> CaptionTask:
    return CaptionTask(images, output, CaptionSettings("model", {"short": SHORT, "long": LONG}, context=True))


def test_the_result_has_all_captions_once(squares: PreparedDataset, tmp_path: Path) -> None:
    task, model = make_task(squares, tmp_path / "out"), Echo()
    caption_parts(task, lambda: model, 4)  # type: ignore[arg-type, return-value]
    merge(task)
    old, new = all_records(squares.folder), all_records(tmp_path / "out")
    assert model.asked == 2 * len(old)
    assert new.keys() == old.keys()
    for name, record in new.items():
        assert record.image == old[name].image
        assert record.captions == [*old[name].captions, f"What number {name}.", f"Tell number {name}."]
        assert record.kinds == ["source", "short", "long"]
    assert verify(tmp_path / "out", 1) == []
    made = PreparedDataset(tmp_path / "out").description["captions"][0]
    assert made["counts"] == {"short": {"made": 30}, "long": {"made": 30}}
    assert task.is_complete()
    with pytest.raises(ValueError, match="has captions short already"):
        make_task(PreparedDataset(tmp_path / "out"), tmp_path / "again")
    other = CaptionTask(squares, tmp_path / "out", CaptionSettings("another", {"short": SHORT}))
    with pytest.raises(ValueError, match=r"captions\.model was model and is another now"):
        other.is_complete()


def test_two_shards_make_the_same(squares: PreparedDataset, tmp_path: Path) -> None:
    task, model = make_task(squares, tmp_path / "out"), Echo()
    caption_parts(task, lambda: model, 4, (0, 2))  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="parts are missing"):
        merge(task)
    caption_parts(task, lambda: model, 4, (1, 2))  # type: ignore[arg-type, return-value]
    merge(task)
    assert len(all_records(tmp_path / "out")) == 30


def test_an_unfinished_line_is_cut_off(tmp_path: Path) -> None:
    log = tmp_path / "log"
    whole = json.dumps([3, {"short": ["A “cat”.", True]}], ensure_ascii=False) + "\n"
    log.write_text(whole + '[4, {"short": ["A d', encoding="utf-8")
    assert read_log(log) == {3: {"short": Said("A “cat”.", True)}}
    assert log.read_text(encoding="utf-8") == whole


def killed_after(lines: int, task: CaptionTask) -> bool:
    """Caption and merge in a process that is killed after so many lines of the code that writes files."""
    files = ("captioning/caption.py", "atomic_write.py", "storage/shards.py", "parts_folder.py")
    left = lines

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(files):
            return None
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    if not (child := os.fork()):
        status = 1
        try:
            if not task.is_complete():
                sys.settrace(trace)
                caption_parts(task, Echo, 4)  # type: ignore[arg-type]
                merge(task)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_kills_lose_nothing(squares: PreparedDataset, tmp_path: Path) -> None:
    task = make_task(squares, tmp_path / "out")
    kills = sum(killed_after(lines, task) for lines in range(40, 1000, 40))
    assert kills >= 15
    while killed_after(2000, task):
        kills += 1
    whole = make_task(squares, tmp_path / "whole")
    caption_parts(whole, Echo, 4)  # type: ignore[arg-type]
    merge(whole)
    assert all_records(tmp_path / "out") == all_records(tmp_path / "whole")
    assert verify(tmp_path / "out", 1) == []
    assert not parts_folder(tmp_path / "out").exists()


def test_a_part_has_one_process(squares: PreparedDataset, tmp_path: Path) -> None:
    task = make_task(squares, tmp_path / "out")

    class Impatient(Echo):
        def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], max_tokens: int) -> list[Said]:
            with pytest.raises(ValueError, match="another process captions part 0"):
                caption_parts(task, Echo, 4)  # type: ignore[arg-type]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption_parts(task, Impatient, 4)  # type: ignore[arg-type]


# --- the command ---------------------------------------------------------------------------------


def test_the_command(
    squares: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    llava = str(make_llava(tmp_path / "llava", "cat"))
    (tmp_path / "kinds.yaml").write_text("word: {prompt: 'Is there a cat?', max_tokens: 3, max_length: 30}\n")
    given = ["data", "caption", str(squares.folder), "--output", "out", "--model", llava, "--kinds", "word"]
    options = ["--kinds_file", "kinds.yaml", "--weights", "old=1", "word=3", "--device", "cpu"]
    assert main([*given, *options]) == 0
    printed = capsys.readouterr().out
    assert "word" in printed
    assert "no sentence ends within the limit 30" in printed  # it says cat cat cat, and never ends
    assert {tuple(record.captions) for record in all_records(tmp_path / "out").values()} == {
        (f"square {number}",) for number in range(30)
    }
    assert main([*given, *options]) == 0
    assert "out is complete" in capsys.readouterr().out
    for arguments, message in (
        (["--kinds", "huge"], "unknown kind of caption huge"),
        (["--weights", "huge=1"], "no kind huge"),
        (["--weights", "old"], "must be KIND=X"),
        (["--model", str(tmp_path)], "no model that takes images"),
    ):
        bad = ["data", "caption", str(squares.folder), "--output", "bad", "--model", llava, *options[:2], *arguments]
        with contextlib.suppress(SystemExit):  # argparse's own errors
            assert main(bad) != 0
        assert message in capsys.readouterr().err
    assert not parts_folder(Path("bad")).exists()


def test_show_compares_captions(
    squares: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    task = make_task(squares, tmp_path / "out")
    caption_parts(task, Echo, 4)  # type: ignore[arg-type]
    merge(task)
    main(["data", "show", "out", "--images", "5"])
    printed = capsys.readouterr().out
    assert "long" in printed
    assert "captions.html" in printed
    page = (tmp_path / "captions.html").read_text()
    assert page.count("<tr>") == 6
    assert "<th>short</th>" in page
    assert "Tell number" in page
    assert "14 characters, 33%" in page or "15 characters, 33%" in page
