"""Captions in any script on grids and plots: no boxes, and a warning where no font has a character."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.coloured_font import make_coloured_font
from PIL import Image, ImageFont

from nami_lightning.utils import fonts
from nami_lightning.utils.image_grid import caption_grid, save_figure

SCRIPTS = {"Cyrillic": "яж", "Arabic": "شق", "Greek": "λψ", "emoji": "😀😎"}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Forget before and after a test which fonts were found."""
    for _ in range(2):
        for cached in (fonts.find_font, fonts._has, fonts._picture_size, fonts._packaged_fonts):
            cached.cache_clear()
        if _ == 0:
            yield


def picture(text: str) -> np.ndarray:
    image = Image.new("L", (120, 30), "white")
    fonts.draw_text(image, (2, 2), text, "black", 16)
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
    assert len(list(fonts._runs(text))) >= 2
    assert "".join(part for _, part in fonts._runs(text)) == text
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


# --- emoji that no font has, or only a font of coloured pictures -----------------------------------

NAMES = {
    "a \U0001f34e on a table": "a [red apple] on a table",
    "\U0001f1eb\U0001f1f7 flag": "FR flag",
    "\U0001f469\u200d\U0001f680!": "[woman][rocket]!",
    "\U0001f680\ufe0f, 1\ufe0f\u20e3": "[rocket], 1",
    "plain, é and 中": "plain, é and 中",
    "": "",
}


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(fonts, "PACKAGED", {})


@pytest.mark.filterwarnings("ignore:No font on this machine")
@pytest.mark.usefixtures("no_fonts")
def test_an_emoji_without_a_font_is_its_name(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    for text, shown in NAMES.items():
        assert fonts.readable(text) == shown
        assert fonts.readable(shown) == shown
        assert fonts.text_width(text, 12) == fonts.text_width(shown, 12)
    images = [Image.new("RGB", (200, 20))]
    grids = [caption_grid(images, [text], 1, labels=[text]) for text in ("\U0001f34e", "[red apple]")]
    assert grids[0].tobytes() == grids[1].tobytes()
    figure = Figure()
    title = figure.subplots().set_title("a \U0001f34e")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib warns of a missing glyph
        warnings.filterwarnings("ignore", "No font on this machine")
        save_figure(figure, tmp_path / "plot")
    assert title.get_text() == "a [red apple]"


@pytest.mark.filterwarnings("ignore:No font on this machine")
@pytest.mark.usefixtures("no_fonts")
def test_a_font_of_coloured_pictures_is_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noto's pictures of emoji have 136 x 128 px at 109 px: they must become 15 x 14.1 px beside letters of 12 px."""
    apple, rocket, peach = "\U0001f34e", "\U0001f680", "\U0001f351"
    file = make_coloured_font(tmp_path / "coloured.ttf", {apple: "red", rocket: "blue"})
    with pytest.raises(OSError, match="pixel size"):
        ImageFont.truetype(file, 12)
    monkeypatch.setattr(fonts, "_packaged_fonts", lambda: [(file, 0)])
    text = f"a {apple}\ufe0f b{rocket} {peach}"
    assert fonts.readable(text) == f"a {apple}\ufe0f b{rocket} [peach]"
    assert fonts.readable(text, pictures=False) == "a [red apple] b[rocket] [peach]"
    assert fonts.font_files(text) == [], "matplotlib can't load it"
    image = Image.new("RGB", (150, 30), "white")
    fonts.draw_text(image, (2, 8), text, "black", 12)
    pixels = np.asarray(image).astype(int)
    for channel, before in ((0, "a "), (2, f"a {apple} b")):
        full = (pixels[..., channel] > 250) & (np.delete(pixels, channel, axis=2) < 5).all(-1)
        rows, columns = (np.flatnonzero(full.any(axis)) for axis in (1, 0))
        assert 14 <= len(columns) <= 15
        assert 13 <= len(rows) <= 15
        assert abs(columns[0] - (2 + fonts.text_width(before, 12))) <= 1
    plain = fonts.text_width("a ", 12) + fonts.text_width(" b", 12) + fonts.text_width(" [peach]", 12)
    assert fonts.text_width(text, 12) == pytest.approx(plain + 2 * 136 * 12 / 109, abs=1.5)
