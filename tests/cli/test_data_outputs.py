"""Outputs of ``lightning data`` that can't be used: one clear message, no traceback, and no file of anybody is lost."""

import errno
import re
from pathlib import Path

import pytest
from helpers.squares import Squares
from PIL import Image

from nami_lightning.cli.main import main
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation

TINY = Path(__file__).parents[1] / "tiny.yaml"
OUTPUTS = {
    ".": "is the current folder, or above it",
    "mine": "mine exists and ",
    "file": "file exists and ",
    "file/below": r"below.parts, for the unfinished parts, can't be made \(Not a directory\)",
    "parts": r"parts.parts is for unfinished parts, but holds something else \(thesis.tex\)",
    "blocked": r"blocked.parts, for the unfinished parts, can't be made \(File exists\)",
    "forbidden/data": r"data.parts, for the unfinished parts, can't be made \(Permission denied\)",
    "damaged": "damaged/dataset.json is damaged: it is no description in JSON",
    "other": "other/dataset.json has format None",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set."""
    settings = Preparation([32], heldout_percent=0, format="png")
    return prepare(Squares(10, [(40, 40)]), tmp_path_factory.mktemp("squares") / "data", settings, workers=1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a source of one image and files of somebody's, where ``forbidden`` can't be written to."""
    files = ("mine/thesis.tex", "file", "parts.parts/thesis.tex", "blocked.parts", "photos/a.txt", "other/dataset.json")
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"mine": true}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "forbidden").mkdir()
    (tmp_path / "damaged" / "dataset.json").write_text("{")
    Image.new("RGB", (20, 20)).save(tmp_path / "photos" / "a.png")
    mkdir = Path.mkdir

    def forbid(path: Path, *arguments: object, **options: object) -> None:
        if tmp_path / "forbidden" in path.absolute().parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", forbid)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder: Path) -> dict[str, bytes | None]:
    """Return what is in a folder, by name."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check(arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a command fails with one message, and changes nothing."""
    before = content(here)
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Loading" not in line]
    assert re.match("error: ", line)
    assert re.search(message, line)
    assert content(here) == before


@pytest.mark.parametrize("output", OUTPUTS)
def test_prepare_refuses_an_output(output: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "prepare", "--source", "photos", "--resolutions", "16", "--workers", "1", "--output", output]
    check(arguments, OUTPUTS[output], here, capsys)


@pytest.mark.parametrize("output", OUTPUTS)
def test_encode_refuses_an_output(output: str, images: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--data.init_args.source", "null", "--data.init_args.folder", str(images), "--workers", "0"]
    check(["data", "encode", str(TINY), *keys, "--output", output], OUTPUTS[output], here, capsys)


def test_encode_refuses_the_images_themselves(images: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--data.init_args.source", "null", "--data.init_args.folder", str(images), "--workers", "0"]
    before = content(images)
    check(
        ["data", "encode", str(TINY), *keys, "--output", str(images)],
        "is a data set of images: choose another output",
        here,
        capsys,
    )
    assert content(images) == before


def test_show_refuses_an_output(images: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for output, message in (("file", "File exists"), ("file/below", "Not a directory"), ("forbidden/a", "Permission")):
        check(["data", "show", str(images), "--output", output], message, here, capsys)
    check(["data", "show", str(images), "--output", str(images)], "lies in the data set", here, capsys)
