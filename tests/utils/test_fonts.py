"""Captions in any script on grids and plots: no boxes, and a warning where no font has a character."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from nami_lightning.utils import fonts
from nami_lightning.utils.image_grid import caption_grid, save_figure

SCRIPTS = {"Cyrillic": "яж", "Arabic": "شق", "Greek": "λψ", "emoji": "😀😎"}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Forget before and after a test which fonts were found."""
    for _ in range(2):
        for cached in (fonts.find_font, fonts._has, fonts._packaged_fonts):
            cached.cache_clear()
        if _ == 0:
            yield


def picture(text: str) -> np.ndarray:
    image = Image.new("L", (120, 30), "white")
    fonts.draw_text(ImageDraw.Draw(image), (2, 2), text, "black", 16)
    return np.asarray(image)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("system", [True, False])
def test_letters_are_not_boxes(script: str, system: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system's fonts if there are any, and with those of packages alone: a box is the same for all letters."""
    if not system:
        monkeypatch.setattr("shutil.which", lambda _: None)
    first, second = (picture(letter) for letter in SCRIPTS[script])
    assert (first != second).any()
    assert (first != picture(fonts.NO_CHARACTER)).any()


def test_a_line_may_mix_scripts() -> None:
    text = "a red cat яж شق"
    assert fonts.text_width(text, 12) > fonts.text_width("a red cat", 12) > 0
    assert len(list(fonts._runs(text, 12))) >= 2
    assert "".join(part for _, part in fonts._runs(text, 12)) == text
    assert fonts.font_files("plain") == []
    assert all(Path(file).exists() for file in fonts.font_files(text))


def test_a_character_without_a_font_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(fonts, "PACKAGED", {})
    with pytest.warns(UserWarning, match=r"No font on this machine has the character '红' \(U\+7EA2\)"):
        picture("红")
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        picture("红红")
    assert not again


def test_fontconfig_that_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/nowhere/{name}")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: (_ for _ in ()).throw(OSError("no such program")))
    assert fonts._system_fonts("я") == []


def test_grids_and_plots_draw_them(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    image = Image.new("RGB", (128, 128))
    grids = [np.asarray(caption_grid([image], [caption], 1, labels=[caption])) for caption in ("яяя", "жжж", "a")]
    assert all((grids[0] != other).any() for other in grids[1:])
    figure = Figure()
    figure.subplots().set_title("цвет яж")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a missing glyph
        assert save_figure(figure, tmp_path / "plot").exists()
