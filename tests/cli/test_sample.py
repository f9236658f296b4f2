"""``lightning sample``: what it writes and refuses, its text files, and one word for one thing in all commands."""

import argparse
import re
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import TextModel, make_pipeline
from PIL import Image

from nami_lightning.cli import sample_folder
from nami_lightning.cli.main import main, make_parser
from nami_lightning.pipelines.image_rows import read_rows
from nami_lightning.pipelines.nami_pipeline import NamiPipeline

pytest_plugins = "helpers.tiny_models"


@pytest.fixture
def model(tmp_path: Path, t5: TextModel, clip: TextModel) -> str:
    """A folder with a tiny pipeline."""
    make_pipeline(t5, clip).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def draw(model: str, tmp_path: Path) -> Any:
    """Runs the command with one step a stage, into ``out`` if no other output is given."""

    def run(*options: str, prompt: str = "a red cat") -> int:
        output = [] if "--output" in options else ["--output", str(tmp_path / "out")]
        given = [] if "--prompts" in options else ["--prompt", prompt]
        return main(["sample", model, *given, "--steps", "2", *output, *options])

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- files -----------------------------------------------------------------------------------------


def test_earlier_images_are_neither_overwritten_nor_left_beside_a_new_grid(
    draw: Any, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert draw("--images", "3") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    assert draw("--seed", "5") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"error: {out} holds 3 image(s) of an earlier command (00000.png: seed 0, not 5): give another --output, or "
        "--overwrite to remove them"
    )
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "notes.txt"} == before
    assert draw("--seed", "5", "--overwrite") == 0
    assert names(out) == ["00000.png", "grid.png", "index.jsonl", "notes.txt"]
    assert (out / "00000.png").read_bytes() != before["00000.png"]


def test_a_refused_call_removes_nothing(draw: Any, tmp_path: Path, capsys: Any) -> None:
    assert draw() == 0
    for wrong in (["--height", "17"], ["--steps", "1", "2", "3"], ["--device", "cuda:77"], ["--step", "3"]):
        assert draw("--overwrite", *wrong) == 2
        assert names(tmp_path / "out") == ["00000.png", "grid.png", "index.jsonl"]
    assert "is not a run" in capsys.readouterr().err


def test_images_are_written_as_they_are_generated(
    draw: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sample_folder, "GRID_ROWS", 2)
    there: list[int] = []
    call = NamiPipeline.__call__

    @wraps(call)
    def watched(*arguments: Any, **named: Any) -> Any:
        there.append(len(list((tmp_path / "out").glob("0*.png"))))
        return call(*arguments, **named)

    monkeypatch.setattr(NamiPipeline, "__call__", watched)
    assert draw("--images", "7", "--batch_size", "2", "--columns", "2") == 0
    assert there == [0, 2, 4, 6]
    assert names(tmp_path / "out") == [*(f"{i:05d}.png" for i in range(7)), "grid-2.png", "grid.png", "index.jsonl"]
    assert "7 image(s) and 2 grids in" in capsys.readouterr().out


def test_size_dtype_and_batches(draw: Any, tmp_path: Path) -> None:
    for name, options in (
        ("batch", ["--batch_size", "3"]),
        ("alone", ["--batch_size", "1"]),
        ("half", ["--dtype", "bfloat16", "--device", "cpu"]),
        ("wide", ["--height", "8", "--width", "24"]),
    ):
        assert draw("--images", "3", "--output", str(tmp_path / name), *options) == 0
    batch, alone, half = (
        [np.asarray(Image.open(tmp_path / name / f"{i:05d}.png")).astype(int) for i in range(3)]
        for name in ("batch", "alone", "half")
    )
    assert np.abs(np.array(batch) - np.array(alone)).max() <= 1, "the batch size changes no more than a level"
    assert np.abs(np.array(batch) - np.array(half)).max() < 64
    assert Image.open(tmp_path / "wide" / "00000.png").size == (24, 8)


# --- text files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_in_usual_encodings(draw: Any, tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "红苹果\r\n\r\n  яблёки\u2028цвёты \rcafé\n"
    (tmp_path / "prompts.txt").write_bytes(text.encode(encoding))
    assert [row.prompt for row in read_rows(tmp_path / "prompts.txt")] == ["红苹果", "яблёки\u2028цвёты", "café"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\ncafé\n".encode("latin-1"), "line 2: not UTF-8"),
        ("a\nb".encode("utf-16-le"), "line 1: NUL characters"),
        ("\ufeffa\nb".encode("utf-16-le") + b"\x00", "line 2: not UTF-16, though it begins so"),
        (b"", "no prompt: give --prompt TEXT"),
    ],
)
def test_other_files_are_named_with_the_line(draw: Any, tmp_path: Path, data: bytes, message: str, capsys: Any) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    assert draw("--prompts", str(path)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert not data or str(path) in error
    for benchmark in (["nami1k"], ["dpg", "--questions", str(path)]):
        prompts = [] if "dpg" in benchmark else ["--prompts", str(path)]
        assert main(["evaluate", "x", "--benchmark", *benchmark, *prompts]) == 2
        assert str(path) in capsys.readouterr().err


# --- options -----------------------------------------------------------------------------------------


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return a parser and all parsers of its commands."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(inner for action in below for child in action.choices.values() for inner in parsers(child))]


def test_no_command_takes_abbreviations(capsys: Any) -> None:
    every = parsers(make_parser())
    assert len(every) > 15
    assert [parser.prog for parser in every if parser.allow_abbrev] == []
    for arguments, message in (
        (["export", "openmoji", "--out", "x"], "unknown option --out"),
        (
            ["run", "openmoji", "--curriculum.uni", "8"],
            "unknown recipe key curriculum.uni; did you mean curriculum.unit",
        ),
        (["data", "prepare", "--sourc", "folder", "--outpu", "x"], "sourc; did you mean source"),
        (["sample", "openmoji", "--prompt", "a", "--step_", "9"], "unknown option --step_"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_thing_has_one_name_in_all_commands() -> None:
    options = {option for parser in parsers(make_parser()) for option in parser._option_string_actions}
    assert not options & {"--out", "--output_dir", "--num_inference_steps", "--checkpoint"}
    assert {"--output", "--step", "--steps", "--height", "--width", "--dtype", "--device", "--ema"} <= options
    assert all(re.fullmatch(r"-h|--(no-)?[a-z_]+(\.[a-z_]+)?", option) for option in options)


def test_a_run_is_sampled_at_a_step(tiny: list[str], tmp_path: Path, capsys: Any) -> None:
    phases = "[{steps: 8, ratio: [1, 1, 1], learning_rate: 1.0e-2}]"
    assert main(["run", *tiny, "--curriculum.phases", phases]) == 0
    run = str(tmp_path / "runs" / "tiny")
    for out, options in (("new", []), ("old", ["--step", "7"]), ("raw", ["--no-ema"])):
        output = ["--output", str(tmp_path / out), *options]
        assert main(["sample", run, "--prompt", "dog", "--steps", "3", *output]) == 0
    pictures = {(tmp_path / out / "00000.png").read_bytes() for out in ("new", "old", "raw")}
    assert len(pictures) == 3
    capsys.readouterr()
    assert main(["sample", run, "--prompt", "dog", "--step", "900", "--output", str(tmp_path / "x")]) == 2
    assert "has no checkpoint of step 900, but of 7, 8" in capsys.readouterr().err
    arguments = [
        "evaluate",
        run,
        "--benchmark",
        "nami1k",
        "--limit",
        "1",
        "--steps",
        "3",
        "--output",
        str(tmp_path / "e"),
    ]
    assert main([*arguments, "--step", "7", "--no-ema"]) == 0
    drawing = (tmp_path / "e" / "nami1k" / "tiny" / "drawing.json").read_text()
    assert '"weights": "step=0000007.ckpt without EMA"' in drawing
    assert main(["export", run]) == 0
    pipeline = str(tmp_path / "runs" / "tiny" / "pipelines" / "step=0000008")
    assert main(["evaluate", pipeline, *arguments[2:]]) == 0
    assert (tmp_path / "e" / "nami1k" / "tiny-step=0000008" / "drawing.json").exists()
