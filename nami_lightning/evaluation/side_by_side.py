"""Side by side, as in the paper's Appendix D: a row a prompt, a column a model, the whole prompt below the row."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from nami_lightning.evaluation.generate import ImageFolder
from nami_lightning.evaluation.prompts import Item
from nami_lightning.utils.image_grid import caption_grid

FONT_SIZE = 14
MARGIN = 6


def spread(items: Sequence[Item], rows: int) -> list[Item]:
    """So many items at even distances.

    Raises:
        ValueError: fewer than 1.
    """
    if rows < 1:
        raise ValueError(f"--grid {rows} must be 1 or more")
    rows = min(rows, len(items))
    return [items[i * len(items) // rows] for i in range(rows)]


def side_by_side(folders: Sequence[ImageFolder], items: Sequence[Item], side: int) -> Image.Image:
    """Every model's first image of each item.

    Args:
        folders: one a model; all were drawn from noise of the same seeds.
        items: one a row.
        side: px, the longest side of an image.
    """
    return _stack([_row(folders, item, side) for item in items])


def _row(folders: Sequence[ImageFolder], item: Item, side: int) -> Image.Image:
    images = []
    for folder in folders:
        image = folder.open(item, 0)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        images.append(image)
    row = caption_grid(images, [folder.name for folder in folders], len(folders))
    font = ImageFont.load_default(FONT_SIZE)
    lines = textwrap.wrap(item.prompt, max(16, int(1.9 * row.width / FONT_SIZE)))
    below = Image.new("RGB", (row.width, (len(lines) + 1) * (FONT_SIZE + 4)), "white")
    ImageDraw.Draw(below).multiline_text((MARGIN, 0), "\n".join(lines), fill="black", font=font, spacing=4)
    return _stack([row, below])


def _stack(parts: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other."""
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole
