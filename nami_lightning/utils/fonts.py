"""Text on pictures in any script: each character is drawn with a font that has it.

Pillow's own font has Latin letters alone. Other characters get a font of the system, found by fontconfig, or a font of
an installed package. Fonts of coloured pictures of one size, as some emoji fonts are, are not used.
"""

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

from PIL import ImageDraw, ImageFont

PACKAGED = {
    "matplotlib": "mpl-data/fonts/ttf/DejaVuSans.ttf",
    "cvttf_NotoSansCJK_Regular": "NotoSansCJKtc-Regular.otf",
}
"""Fonts that packages bring, and their files in them: the extra ``fonts`` has the second."""

NO_CHARACTER = "\U0010ffff"
ATTACHED = {"Mn", "Mc", "Me", "Cf", "Zs", "Cc"}
"""Categories of characters that are drawn with the font of the one before: accents, joiners, spaces."""

FontFile = tuple[str, int]
"""A font file, and the number of the font in it."""


def draw_text(drawing: ImageDraw.ImageDraw, position: tuple[float, float], text: str, fill: str, size: int) -> None:
    """Draw one line of text from its top left corner on.

    Args:
        drawing: what to draw on.
        position: of the corner, in px.
        text: the line.
        fill: colour.
        size: of the font, in px.
    """
    x, top = position
    baseline = top + _load(None, size).getmetrics()[0]
    for font, part in _runs(text, size):
        drawing.text((x, baseline), part, fill=fill, font=font, anchor="ls")
        x += font.getlength(part)


def text_width(text: str, size: int) -> float:
    """Return the width of a line of text in px."""
    return sum(font.getlength(part) for font, part in _runs(text, size))


def font_files(text: str) -> list[str]:
    """Return the files of the fonts that a text needs besides Pillow's own."""
    return list(dict.fromkeys(file[0] for character in text if (file := find_font(character)) is not None))


@cache
def find_font(character: str) -> FontFile | None:
    """Return a font that has a character; None for Pillow's own, which has it, or of which the user is warned."""
    if _has(None, character):
        return None
    for file in (*_system_fonts(character), *_packaged_fonts()):
        if _has(file, character):
            return file
    warnings.warn(
        f"No font on this machine has the character {character!r} (U+{ord(character):04X}), so pictures show a box: "
        "install a font for its script (on Debian fonts-noto-cjk or fonts-symbola); for Chinese, Japanese and Korean, "
        "pip install 'nami_lightning[fonts]'",
        stacklevel=2,
    )
    return None


def _runs(text: str, size: int) -> Iterator[tuple[Any, str]]:
    """Yield the parts of a line that are drawn with one font, each with its font."""
    files: list[FontFile | None] = []
    for character in text:
        attached = bool(files) and unicodedata.category(character) in ATTACHED
        files.append(files[-1] if attached else find_font(character))
    for file, part in groupby(zip(files, text, strict=True), key=lambda pair: pair[0]):
        yield _load(file, size), "".join(character for _, character in part)


@cache
def _load(file: FontFile | None, size: int) -> Any:
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file[0], size, index=file[1])


@cache
def _has(file: FontFile | None, character: str) -> bool:
    """Tell whether a font has a character: its picture is not that of a character that no font has."""
    try:
        font = _load(file, 16)
    except OSError:  # a damaged font, or one of pictures of a single size
        return False
    if unicodedata.category(character) in ATTACHED:
        return True
    seen, missing = (font.getmask(one) for one in (character, NO_CHARACTER))
    return (seen.size, bytes(seen)) != (missing.size, bytes(missing))


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
