"""Recipes in other encodings than UTF-8: UTF-16 with its mark is read, all others are one clear message."""

from pathlib import Path

import pytest

from nami_lightning.cli.main import main
from nami_lightning.runs.recipe import Recipe

TINY = Path(__file__).parents[1] / "tiny.yaml"
OLD_STRATEGY = "nami_lightning.strategies.FSDP2Strategy"

ENCODINGS = {"utf-8": "größe", "utf-8-sig": "größe", "utf-16": "größe", "utf-16-le": None, "latin-1": None}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("place", ["recipe", "base", "overlay", "overlay="])
def test_a_recipe_may_be_utf_16_and_other_encodings_are_one_message(
    encoding: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file sets two keys that the tiny recipe has too, a text with umlauts and a class of an earlier version."""
    saved = f"# grün\nname: größe\ntrainer: {{strategy: {{class_path: {OLD_STRATEGY}, init_args: {{replicate: 1}}}}}}\n"
    file = tmp_path / "file.yaml"
    options: list[str] = []
    first = str(file)
    if place == "recipe":
        saved += f"base: {TINY}\n"
    elif place == "base":
        saved += f"base: {TINY}\n"
        (tmp_path / "above.yaml").write_text("base: file.yaml\n")
        first = str(tmp_path / "above.yaml")
    else:
        first, options = str(TINY), [f"--config={file}"] if place == "overlay=" else ["--config", str(file)]
    file.write_bytes(saved.encode(encoding))
    if ENCODINGS[encoding] is None:
        assert main(["run", first, *options]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert f"error: {file}, line 1: " in line
        assert "save it as UTF-8" in line
        return
    config = Recipe(first, options).config
    assert config.name == ENCODINGS[encoding]
    assert config.trainer.strategy.class_path == "nami_lightning.FSDP2Strategy"
