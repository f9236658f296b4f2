"""Pictures for people: grids of images with their captions below them."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MIN_CELL = 128
FONT_SIZE = 12
LINES = 2


def caption_grid(images: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """All ``images`` (of one size) in rows of ``columns``, each with its caption below it, cut to two lines.

    Images below 128 px are enlarged by a whole factor, so that their pixels stay what they are.
    """
    enlarge = max(1, -(-MIN_CELL // images[0].width))
    width, height = images[0].width * enlarge, images[0].height * enlarge
    margin, text = 6, LINES * (FONT_SIZE + 3)
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    grid = Image.new("RGB", (columns * (width + margin) + margin, rows * (height + text + margin) + margin), "white")
    drawing, font = ImageDraw.Draw(grid), ImageFont.load_default(FONT_SIZE)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = margin + i % columns * (width + margin)
        y = margin + i // columns * (height + text + margin)
        grid.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
        drawing.rectangle((x - 1, y - 1, x + width, y + height), outline="lightgray")
        lines = textwrap.wrap(caption, max(8, width * 2 // FONT_SIZE), max_lines=LINES, placeholder="...")
        drawing.multiline_text((x, y + height + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return grid


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    image.save(partial, "PNG")
    partial.replace(path)
