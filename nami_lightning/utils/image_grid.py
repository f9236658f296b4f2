"""Grids of images with captions below them, and images and figures as files or data URLs."""

import base64
import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from nami_lightning.utils.atomic_write import replacing
from nami_lightning.utils.fonts import draw_text, font_files, readable, text_width

MIN_CELL = 128
FONT_SIZE = 12
LINES = 2


def caption_grid(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int, labels: Sequence[str] = ()
) -> Image.Image:
    """Return a grid of ``images`` in rows of ``columns``, each with its caption below it, cut to two lines.

    Cells have the size of the largest image, and smaller images are centred in them. If the widest image is narrower
    than 128 px, all are enlarged by a whole factor, so that their pixels stay sharp.

    Args:
        images: images to show.
        captions: one caption per image.
        columns: number of images in a row.
        labels: one label per image, in grey on a line above the caption; or none.
    """
    enlarge = max(1, -(-MIN_CELL // max(image.width for image in images)))
    width, height = (enlarge * max(sides) for sides in zip(*(image.size for image in images), strict=True))
    line = FONT_SIZE + 3
    margin, text, label = 6, LINES * line, line * bool(labels)
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    size = (columns * (width + margin) + margin, rows * (height + label + text + margin) + margin)
    grid = Image.new("RGB", size, "white")
    drawing = ImageDraw.Draw(grid)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = margin + i % columns * (width + margin)
        y = margin + i // columns * (height + label + text + margin)
        shown = image.convert("RGB").resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)
        left, top = x + (width - shown.width) // 2, y + (height - shown.height) // 2
        grid.paste(shown, (left, top))
        drawing.rectangle((left - 1, top - 1, left + shown.width, top + shown.height), outline="lightgray")
        if labels:
            draw_text(grid, (x, y + height + 2), labels[i][:width], "gray", FONT_SIZE)
        for number, part in enumerate(_wrap(readable(caption), width)):
            draw_text(grid, (x, y + height + label + 2 + number * line), part, "black", FONT_SIZE)
    return grid


def _wrap(caption: str, width: int) -> list[str]:
    """Return the lines of as much of a caption as fits into them."""
    lines: list[str] = []
    caption = caption[: LINES * width]  # no character is narrower than a pixel, and measuring takes time
    for characters in range(max(8, width * 2 // FONT_SIZE), 7, -1):
        lines = textwrap.wrap(caption, characters, max_lines=LINES, placeholder="...")
        if all(text_width(line, FONT_SIZE) <= width for line in lines):
            break
    return lines


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, completely or not at all."""
    with replacing(path) as partial:
        image.save(partial, "PNG")


def data_url(image: Image.Image, kind: str, **options: Any) -> str:
    """Return an image as a data URL, for a page that needs no other file.

    Args:
        image: the image.
        kind: Pillow's name of the format, ``PNG`` or ``JPEG``.
        options: further arguments of Pillow's ``save``.
    """
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def save_figure(figure: Any, stem: Path) -> Path:
    """Write a matplotlib figure as ``stem.png`` and ``stem.svg``, and return the SVG's path.

    Each file is written completely or not at all. Texts get fonts that have their characters.
    """
    from matplotlib.font_manager import FontProperties, fontManager
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_text(readable(text.get_text(), pictures=False))
        files = font_files(text.get_text())
        for file in files:
            fontManager.addfont(file)
        text.set_fontfamily([*text.get_fontfamily(), *(FontProperties(fname=file).get_name() for file in files)])
    for kind in ("png", "svg"):
        path = stem.with_name(f"{stem.name}.{kind}")
        with replacing(path) as partial:
            figure.savefig(partial, format=kind, dpi=120)
    return path
