"""Pictures for people: grids of images with their captions below them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from nami_lightning.utils.atomic_write import replacing

MIN_CELL = 128
FONT_SIZE = 12
LINES = 2


def caption_grid(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int, labels: Sequence[str] = ()
) -> Image.Image:
    """All ``images`` in rows of ``columns``, each with its caption below it, cut to two lines.

    Cells have the size of the largest image; smaller ones stand in their middle. Where the widest is below 128 px, all
    are enlarged by a whole factor, so that their pixels stay what they are.

    Args:
        images: to show.
        captions: one an image.
        columns: in a row.
        labels: one an image, in grey on a line of its own above the caption; or none.
    """
    enlarge = max(1, -(-MIN_CELL // max(image.width for image in images)))
    width, height = (enlarge * max(sides) for sides in zip(*(image.size for image in images), strict=True))
    line = FONT_SIZE + 3
    margin, text, label = 6, LINES * line, line * bool(labels)
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    size = (columns * (width + margin) + margin, rows * (height + label + text + margin) + margin)
    grid = Image.new("RGB", size, "white")
    drawing, font = ImageDraw.Draw(grid), ImageFont.load_default(FONT_SIZE)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = margin + i % columns * (width + margin)
        y = margin + i // columns * (height + label + text + margin)
        shown = image.convert("RGB").resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)
        left, top = x + (width - shown.width) // 2, y + (height - shown.height) // 2
        grid.paste(shown, (left, top))
        drawing.rectangle((left - 1, top - 1, left + shown.width, top + shown.height), outline="lightgray")
        if labels:
            drawing.text((x, y + height + 2), labels[i], fill="gray", font=font)
        below = (x, y + height + label + 2)
        drawing.multiline_text(below, _wrap(caption, width, font), fill="black", font=font, spacing=2)
    return grid


def _wrap(caption: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a caption as fits into its lines."""
    for characters in range(max(8, width * 2 // FONT_SIZE), 7, -1):
        lines = textwrap.wrap(caption, characters, max_lines=LINES, placeholder="...")
        if all(font.getlength(line) <= width for line in lines):
            break
    return "\n".join(lines)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(path) as partial:
        image.save(partial, "PNG")


def save_figure(figure: Any, stem: Path) -> Path:
    """Write matplotlib's ``figure`` as ``stem.png`` and ``stem.svg``, each whole or not at all; the SVG's path."""
    for kind in ("png", "svg"):
        path = stem.with_name(f"{stem.name}.{kind}")
        with replacing(path) as partial:
            figure.savefig(partial, format=kind, dpi=120)
    return path
