"""What a data set's figures say, what is found damaged in it, and how fast it is read."""

import io
import json
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.squares import Squares
from litdata import StreamingDataset
from PIL import Image

from nami_lightning.benchmarks import data_loading
from nami_lightning.cli.main import main
from nami_lightning.datamodules.aspect_buckets import Shape
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation
from nami_lightning.datamodules.preparation.source_changes import read_reports
from nami_lightning.datamodules.sources.base import SourceSample
from nami_lightning.datamodules.storage.chunk_checks import Damage, find_problem
from nami_lightning.datamodules.storage.chunk_file import ChunkFile, DamagedChunk, checksum
from nami_lightning.datamodules.storage.dataset import DESCRIPTION, ENCODED_FORMAT
from nami_lightning.datamodules.storage.inspect import show
from nami_lightning.datamodules.storage.shards import INDEX, Record, read_index
from nami_lightning.datamodules.storage.verify import report, verify

BUCKET = "train/32/32x32"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 60 squares; twelve of them are too small for it."""
    folder = tmp_path_factory.mktemp("data") / "squares"
    return prepare(Squares(60), folder, Preparation([8, 32], heldout_percent=20, aspect_step=4, format="png"), 1)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def first_chunk(folder: Path) -> str:
    """The file of the first chunk of the bucket of squares, below the data set's folder."""
    return f"{BUCKET}/{read_index(folder / BUCKET)['chunks'][0]['filename']}"


# --- verify ------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_a_whole_data_set(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(whole, 2) == []
    assert report(whole, 1) == 0
    assert "every sample can be read" in capsys.readouterr().out


def test_a_changed_byte_is_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = first_chunk(copy)
    data = bytearray((copy / file).read_bytes())
    place = data.index(b"IDAT") + 6
    data[place] ^= 0xFF
    (copy / file).write_bytes(data)
    changed, sample = verify(copy, 1)
    assert (changed.file, changed.sample) == (file, "")
    assert "checksum" in changed.problem
    assert sample.file == file
    assert sample.sample.isdigit()
    assert "not a readable image" in sample.problem
    assert report(copy, 1) == 1
    printed = capsys.readouterr().out
    assert str(copy / file) in printed
    assert f"sample {sample.sample}: not a readable image" in printed
    assert "What to do" in printed


def test_a_changed_byte_that_still_decodes_is_found(copy: Path) -> None:
    file = first_chunk(copy)
    (copy / file).write_bytes((copy / file).read_bytes().replace(b"square ", b"sqvare ", 1))
    assert [damage.file for damage in verify(copy, 1)] == [file]


@pytest.mark.parametrize("left", [0, 3, 50, -1])
def test_a_chunk_that_is_cut_off_is_found(copy: Path, left: int) -> None:
    file = first_chunk(copy)
    (copy / file).write_bytes((copy / file).read_bytes()[:left])
    damages = verify(copy, 1)
    assert {damage.file for damage in damages} == {file}
    assert any("its index says" in damage.problem for damage in damages)


def test_a_missing_chunk_is_found(copy: Path) -> None:
    file = first_chunk(copy)
    (copy / file).unlink()
    assert verify(copy, 1) == [Damage(file, "it can't be read: No such file or directory")]


def edit_index(folder: Path, edit: Callable[[list[dict[str, object]]], object]) -> None:
    file = folder / BUCKET / INDEX
    index = json.loads(file.read_text())
    edit(index["chunks"])
    file.write_text(json.dumps(index))


def test_an_edited_count_is_found(copy: Path) -> None:
    file = first_chunk(copy)
    edit_index(copy, lambda chunks: chunks[0].update(chunk_size=99))
    assert [damage.file for damage in verify(copy, 1)] == [f"{BUCKET}/{INDEX}", file]


def test_a_chunk_that_the_index_lost_is_found(copy: Path) -> None:
    file = first_chunk(copy)
    edit_index(copy, lambda chunks: chunks.pop(0))
    problems = [damage.problem for damage in verify(copy, 1) if damage.file == f"{BUCKET}/{INDEX}"]
    assert "says" in problems[0]
    assert problems[1] == f"it doesn't list {file}"


@pytest.mark.parametrize("text", ["{", "{}", '{"chunks": [1]}', None])
def test_an_index_that_is_none_is_found(copy: Path, text: str | None) -> None:
    file = copy / BUCKET / INDEX
    file.write_text(text) if text is not None else file.unlink()
    assert [damage.file for damage in verify(copy, 1)] == [f"{BUCKET}/{INDEX}"]


class Repeating(Squares):
    """Two of its squares have the id of an earlier one: in another part, and another split or bucket maybe."""

    def sample(self, number: int) -> SourceSample:
        sample = super().sample(number)
        return replace(sample, id={41: "7", 50: "0"}.get(number, sample.id))


def test_ids_that_are_there_twice_are_found(tmp_path: Path) -> None:
    folder = prepare(Repeating(60), tmp_path / "data", Preparation([8], heldout_percent=20, format="png"), 1)
    damages = verify(folder, 2)
    assert sorted(damage.sample for damage in damages) == ["0", "7"]
    assert all("has the same id" in damage.problem for damage in damages)


def test_samples_that_are_no_good() -> None:
    def png(side: int) -> bytes:
        file = io.BytesIO()
        Image.effect_noise((side, side), 50).convert("RGB").save(file, "PNG")
        return file.getvalue()

    good = Record("a", png(16), ["one", "two"], [1.0, 2.0])
    shape = Shape(16, 16)
    assert find_problem(good, shape) == ""
    assert find_problem(good._replace(image=good.image[:-40]), shape).startswith("not a readable image")
    assert find_problem(good._replace(image=png(15)), shape) == "its image is 15x15, smaller than its bucket's 16x16"
    assert "id" in find_problem(good._replace(id=""), shape)
    assert "captions" in find_problem(good._replace(captions=[], weights=[]), shape)
    assert "weights" in find_problem(good._replace(weights=[1.0]), shape)
    assert "weights" in find_problem(good._replace(weights=[0.0, 0.0]), shape)


def test_encodings_have_checksums_too(copy: Path) -> None:
    folder = copy / "encodings" / "some"
    bucket = folder / "train/16/16x16"
    bucket.mkdir(parents=True)
    for name in ("whole.bin", "changed.bin"):
        (bucket / name).write_bytes(name.encode())
    sums = {name: checksum(bucket / name) for name in ("whole.bin", "changed.bin")} | {"missing.bin": "0"}
    description: dict[str, Any] = {"format": ENCODED_FORMAT, "settings": {}, "samples": {"train": {}, "heldout": {}}}
    description["checksums"] = {f"train/16/16x16/{name}": value for name, value in sums.items()}
    (folder / "dataset.json").write_text(json.dumps(description))
    (bucket / "changed.bin").write_bytes(b"?")
    files = [damage.file for damage in verify(copy, 1)]
    assert files == [f"encodings/some/train/16/16x16/{name}.bin" for name in ("changed", "missing")]


def test_a_chunk_is_read_in_any_order(whole: Path) -> None:
    index = read_index(whole / BUCKET)
    entry = index["chunks"][0]
    chunk = ChunkFile(whole / BUCKET / entry["filename"], entry, index["config"])
    plain = StreamingDataset(str(whole / BUCKET), shuffle=False)
    for number in (1, 0, len(chunk) - 1):
        ours, theirs = Record.from_item(chunk[number]), Record.from_item(plain[number])
        assert (ours.id, bytes(ours.image), ours.captions) == (theirs.id, bytes(theirs.image), theirs.captions)
    with pytest.raises(IndexError):
        chunk[len(chunk)]
    with pytest.raises(DamagedChunk, match=r"nowhere.bin is damaged: it can't be read: No such file"):
        ChunkFile(whole / "nowhere.bin", entry, index["config"])


# --- show --------------------------------------------------------------------------------------


def test_show_counts_what_is_there(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(whole, tmp_path, samples=20)
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    counted = {
        (split.name, shape.name): len(StreamingDataset(str(shape)))
        for split in (whole / "train", whole / "heldout")
        for shape in split.glob("*/*")
    }
    rows = {row[2]: row[4:] for row in lines if row[1:2] == ["px"]}
    assert rows
    assert set(rows) == {shape for _, shape in counted}
    for shape, row in rows.items():
        train, heldout = counted.get(("train", shape), 0), counted.get(("heldout", shape), 0)
        assert row == [str(train), str(heldout), str(train + heldout)]
    about = json.loads((whole / DESCRIPTION).read_text())
    split_sums = [sum(about["samples"][split].values()) for split in ("train", "heldout")]
    assert ["all", *map(str, split_sums), str(sum(counted.values()))] in lines
    assert ["read", "60"] in lines
    assert ["kept", str(sum(counted.values()))] in lines
    for reason, number in (about["removed"] | about["skipped"]).items():
        assert re.search(rf"{reason} +{number}\n", printed)
    assert f"in {sum(counted.values())} of {sum(counted.values())} images" in printed
    assert re.search(r"characters of a caption +8 +8 +9 +9 +9\n", printed)
    assert re.search(r"captions of an image +1 +1 +1 +1 +1\n", printed)
    assert "png" in printed
    assert "encodings: none" in printed


def test_the_contact_sheet_goes_elsewhere(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(whole.rglob("*"))
    show(whole, tmp_path / "out", samples=5)
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 5 * 128
    with pytest.raises(ValueError, match="lies in the data set"):
        show(whole, whole / "train", samples=5)
    assert sorted(whole.rglob("*")) == before
    capsys.readouterr()
    (whole / "encodings" / "some").mkdir(parents=True)
    (whole / "encodings" / "some" / "dataset.json").touch()
    try:
        show(whole, tmp_path / "none", samples=0)
    finally:
        shutil.rmtree(whole / "encodings")
    assert not (tmp_path / "none").exists()
    assert "some  0.00B in 1 files" in capsys.readouterr().out


# --- bench data --------------------------------------------------------------------------------


def options(folder: Path, **changes: object) -> Namespace:
    settings: dict[str, object] = {"recipe": str(folder), "overrides": [], "images": None, "workers": 0}
    return Namespace(**settings | {"batch_size": 4, "samples": 12, "rounds": 1} | changes)


def test_bench_prints_three_rates_and_two_quotients(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare(Squares(60, [(40, 40)]), whole.with_name("alike"), Preparation([8, 32]), 1)
    data_loading.measure_data_loading(options(folder))
    printed = capsys.readouterr().out
    for shape in ("32x32", "8x8"):
        row = re.search(rf"^ +{shape} +(\d+)/s +(\d+)/s +(\d+)/s +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
        assert row
        assert all(float(number) > 0 for number in row.groups())


def test_bench_says_what_it_lacks(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"too few .* choose a smaller --batch_size"):
        data_loading.measure_data_loading(options(whole, batch_size=64))
    with data_loading.export_images(data_loading._largest_bucket(data_loading.PreparedDataset(whole)), 2) as images:
        assert len(list(images.glob("*/*.png"))) == 2
        with pytest.raises(ValueError, match="--images"):
            data_loading.measure_data_loading(options(whole, images=str(images)))


def test_a_contact_sheet_replaces_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare(Squares(10), tmp_path / "data", Preparation([16], heldout_percent=0), workers=1)
    (tmp_path / "contact_sheet.png").write_text("mine")
    for name in ("contact_sheet_2.png", "contact_sheet_3.png"):
        show(folder, tmp_path, samples=4)
        assert name in capsys.readouterr().out
        assert (tmp_path / name).exists()
    assert (tmp_path / "contact_sheet.png").read_text() == "mine"


# --- files of a data set that say something else -----------------------------------------------------

Change = Callable[[Any], Any]
WRONG_DESCRIPTIONS: dict[str, Change] = {
    "a list": lambda value: [value],
    "no settings": lambda value: {key: value[key] for key in value if key != "settings"},
    "samples are a number": lambda value: value | {"samples": 5},
    "no heldout": lambda value: value | {"samples": {"train": {}}},
    "a number of samples is a text": lambda value: value | {"samples": value["samples"] | {"train": {"8/8x8": "x"}}},
    "a bucket of another name": lambda value: value | {"samples": value["samples"] | {"train": {"../x": 1}}},
    "checksums are a list": lambda value: value | {"checksums": []},
    "skipped is a text": lambda value: value | {"skipped": "x"},
}
WRONG_INDICES: dict[str, Change] = {
    "a list": lambda value: [],
    "no config": lambda value: {"chunks": value["chunks"]},
    "a config that is a list": lambda value: value | {"config": []},
    "a size that is an object": lambda value: value | {"chunks": [value["chunks"][0] | {"chunk_bytes": {}}]},
    "a size below 0": lambda value: value | {"chunks": [value["chunks"][0] | {"chunk_size": -3}]},
    "a name that is none": lambda value: value | {"chunks": [value["chunks"][0] | {"filename": None}]},
    "a chunk that is a number": lambda value: value | {"chunks": [1]},
}


@pytest.mark.parametrize("command", ["verify", "show"])
@pytest.mark.parametrize("wrong", WRONG_DESCRIPTIONS)
def test_a_wrong_description_is_one_clear_message(
    command: str, wrong: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy / DESCRIPTION
    file.write_text(json.dumps(WRONG_DESCRIPTIONS[wrong](json.loads(file.read_text()))))
    assert main(["data", command, str(copy), *(["--output", str(tmp_path)] if command == "show" else [])]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {file} is damaged: ")


@pytest.mark.parametrize("wrong", WRONG_INDICES)
def test_a_wrong_index_is_found_and_named(
    wrong: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy / BUCKET / INDEX
    file.write_text(json.dumps(WRONG_INDICES[wrong](json.loads(file.read_text()))))
    assert [one.file for one in verify(copy, 1) if "is not a litdata index" in one.problem] == [f"{BUCKET}/{INDEX}"]
    assert main(["data", "show", str(copy), "--output", str(tmp_path)]) == 2
    assert f"error: {file} is not a litdata index" in capsys.readouterr().err


def test_captions_that_are_damaged_are_named_by_show(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy / first_chunk(copy)
    content = file.read_bytes()
    file.write_bytes(content.replace(b"[[", b"{{"))
    assert content != file.read_bytes()
    assert main(["data", "show", str(copy), "--output", str(tmp_path)]) == 2
    assert f"error: {file} is damaged: item 0 has no captions that can be read" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["{}", "[]", "null", '{"files": 1}'])
def test_a_wrong_report_of_the_source_is_one_clear_message(line: str, copy: Path) -> None:
    (copy / "source.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"source.jsonl is damaged \(a line names no files\): remove this one file"):
        read_reports(copy)
