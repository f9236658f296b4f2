"""Text on pictures in any script: each character is drawn with a font that has it.

Pillow's own font has Latin letters alone. Other characters get a font of the system, found by fontconfig, or a font of
an installed package. An emoji that no font has is written as its name, ``[red apple]``.
"""

import math
import shutil
import subprocess
import unicodedata
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PACKAGED = {
    "matplotlib": "mpl-data/fonts/ttf/DejaVuSans.ttf",
    "cvttf_NotoSansCJK_Regular": "NotoSansCJKtc-Regular.otf",
}
"""Fonts that packages bring, and their files in them: the extra ``fonts`` has the second."""

PICTURE_SIZES = (109, 128, 136, 160)
"""Sizes in px of the coloured pictures in emoji fonts that have no outlines; Noto's have 109. They are scaled."""

NO_CHARACTER = "\U0010ffff"
ATTACHED = {"Mn", "Mc", "Me", "Cf", "Zs", "Cc"}
"""Categories of characters that are drawn with the font of the one before: accents, joiners, spaces."""

NAMED = {"So", "Sk"}
"""Categories of characters that are written as their names if no font has them: emoji, and their skin tones."""
OF_EMOJI = "\ufe0e\ufe0f\u20e3"
"""Characters that ask for a picture, or for a key around a digit."""

FIRST_LETTER_OF_FLAGS = 0x1F1E6
LAST_LETTER_OF_FLAGS = 0x1F1FF

FontFile = tuple[str, int]
"""A font file, and the number of the font in it."""


def draw_text(image: Image.Image, position: tuple[float, float], text: str, fill: str, size: int) -> None:
    """Draw one line of text from its top left corner on.

    Args:
        image: the picture to draw on.
        position: of the corner, in px.
        text: the line.
        fill: colour.
        size: of the font, in px.
    """
    x, top = position
    baseline = top + _load(None, size).getmetrics()[0]
    drawing = ImageDraw.Draw(image)
    for file, part in _runs(text):
        own_size = _picture_size(file)
        font = _load(file, own_size or size)
        if own_size is None:
            drawing.text((x, baseline), part, fill=fill, font=font, anchor="ls")
        else:
            scale = size / own_size
            picture, above = _coloured(font, part)
            small = picture.resize((math.ceil(picture.width * scale), math.ceil(picture.height * scale)))
            image.paste(small, (round(x), round(baseline - above * scale)), small)
        x += _length(file, part, size)


def text_width(text: str, size: int) -> float:
    """Return the width of a line of text in px."""
    return sum(_length(file, part, size) for file, part in _runs(text))


def font_files(text: str) -> list[str]:
    """Return the files of the fonts with outlines that a text needs besides Pillow's own."""
    files = dict.fromkeys(file for character in text if (file := find_font(character)) is not None)
    return list(dict.fromkeys(file[0] for file in files if _picture_size(file) is None))


def readable(text: str, pictures: bool = True) -> str:
    """Return a text whose emoji are replaced by their names if they can't be drawn: ``[red apple]``, ``FR`` for a flag.

    Args:
        text: the text.
        pictures: coloured pictures can be drawn; else only outlines.
    """
    parts: list[str] = []
    replaced = coloured = False
    for character in text:
        if replaced and unicodedata.category(character) in ATTACHED - {"Zs", "Cc"}:
            continue  # it joins or changes emoji that are names now
        if character in OF_EMOJI and not coloured:
            continue  # fonts of letters have a box for these
        if unicodedata.category(character) not in ATTACHED:
            coloured = pictures and _picture_size(find_font(character)) is not None
        name = _name(character)
        replaced = bool(name) and not _can_draw(character, pictures)
        parts.append(name if replaced else character)
    return "".join(parts)


@cache
def find_font(character: str) -> FontFile | None:
    """Return a font that has a character; None for Pillow's own, which has it, or of which the user is warned."""
    if _has(None, character):
        return None
    for file in (*_system_fonts(character), *_packaged_fonts()):
        if _has(file, character):
            return file
    shown = f"its name, {name}" if (name := _name(character)) else "a box"
    warnings.warn(
        f"No font on this machine has the character {character!r} (U+{ord(character):04X}), so pictures show {shown}: "
        "install a font for its script (on Debian fonts-noto-cjk, fonts-symbola or fonts-noto-color-emoji); for "
        "Chinese, Japanese and Korean, pip install 'nami_lightning[fonts]'",
        stacklevel=2,
    )
    return None


def _name(character: str) -> str:
    """Return what is written for an emoji that can't be drawn; an empty text for other characters."""
    if FIRST_LETTER_OF_FLAGS <= ord(character) <= LAST_LETTER_OF_FLAGS:
        return chr(ord("A") + ord(character) - FIRST_LETTER_OF_FLAGS)
    if unicodedata.category(character) not in NAMED or not (name := unicodedata.name(character, "")):
        return ""
    return f"[{name.lower().removeprefix('emoji modifier ')}]"


def _can_draw(character: str, pictures: bool) -> bool:
    file = find_font(character)
    return _has(None, character) if file is None else pictures or _picture_size(file) is None


def _coloured(font: Any, text: str) -> tuple[Image.Image, int]:
    """Return a line of coloured pictures, and how far it reaches above the line on which letters stand."""
    above, below = font.getmetrics()
    picture = Image.new("RGBA", (math.ceil(font.getlength(text)), above + below))
    ImageDraw.Draw(picture).text((0, above), text, font=font, anchor="ls", embedded_color=True)
    return picture, above


def _length(file: FontFile | None, text: str, size: int) -> float:
    own_size = _picture_size(file)
    length: float = _load(file, own_size or size).getlength(text)
    return length * size / own_size if own_size else length


def _runs(text: str) -> Iterator[tuple[FontFile | None, str]]:
    """Yield the parts of a line that are drawn with one font, each with its font; names stand for some emoji."""
    text = readable(text)
    files: list[FontFile | None] = []
    for character in text:
        category = unicodedata.category(character)
        if category == "Zs" and files and _picture_size(files[-1]) is not None:
            files.append(None)  # a space of a font of pictures is as wide as a picture
        else:
            files.append(files[-1] if files and category in ATTACHED else find_font(character))
    for file, part in groupby(zip(files, text, strict=True), key=lambda pair: pair[0]):
        yield file, "".join(character for _, character in part)


@cache
def _load(file: FontFile | None, size: int) -> Any:
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file[0], size, index=file[1])


@cache
def _picture_size(file: FontFile | None) -> int | None:
    """Return the size of a font's pictures if it has coloured pictures of one size alone; None for outlines."""
    sizes = (None, *PICTURE_SIZES) if file is not None else (None,)
    for size in sizes:
        try:
            _load(file, size or 16)
        except OSError:
            continue
        return size
    return None


@cache
def _has(file: FontFile | None, character: str) -> bool:
    """Tell whether a font has a character: its picture is not that of a character that no font has."""
    size = _picture_size(file)
    try:
        font = _load(file, size or 16)
    except OSError:  # a damaged font
        return False
    if unicodedata.category(character) in ATTACHED:
        return True
    seen, missing = (font.getmask(one, "RGBA" if size else "") for one in (character, NO_CHARACTER))
    return (seen.size, [*seen]) != (missing.size, [*missing])


def _system_fonts(character: str) -> list[FontFile]:
    """Return the system's fonts that have a character, the one that fontconfig prefers first."""
    if shutil.which("fc-list") is None or shutil.which("fc-match") is None:
        return []
    pattern = f":charset={ord(character):x}"
    form = "%{file}\t%{index}\n"
    found: list[FontFile] = []
    for command in (["fc-match", "-f", form, f"sans{pattern}"], ["fc-list", "-f", form, pattern]):
        try:
            lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            continue
        for line in sorted(lines):
            file, _, index = line.partition("\t")
            if index.isdecimal() and int(index) < 1 << 16:  # higher numbers are instances of a variable font
                found.append((file, int(index)))
    return list(dict.fromkeys(found))


@cache
def _packaged_fonts() -> list[FontFile]:
    """Return the fonts of installed packages."""
    places = [(find_spec(package), file) for package, file in PACKAGED.items()]
    files = [Path(spec.origin).parent / file for spec, file in places if spec is not None and spec.origin]
    return [(str(file), 0) for file in files if file.exists()]
