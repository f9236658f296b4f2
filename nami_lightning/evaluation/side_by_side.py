"""A picture of several models' images, as in the paper's Appendix D: a row per prompt and a column per model."""

import textwrap
from collections.abc import Sequence

from PIL import Image

from nami_lightning.evaluation.generate import GeneratedImages
from nami_lightning.evaluation.prompts import Item
from nami_lightning.utils.fonts import draw_text, readable
from nami_lightning.utils.image_grid import caption_grid

FONT_SIZE = 14
MARGIN = 6


def evenly_spaced(items: Sequence[Item], rows: int) -> list[Item]:
    """Return ``rows`` items at even distances; all items if there are fewer.

    Raises:
        ValueError: ``rows`` is below 1.
    """
    if rows < 1:
        raise ValueError(f"--grid {rows} must be 1 or more")
    rows = min(rows, len(items))
    return [items[i * len(items) // rows] for i in range(rows)]


def side_by_side(folders: Sequence[GeneratedImages], items: Sequence[Item], side: int) -> Image.Image:
    """Return a picture with every model's first image of each item, and the whole prompt below each row.

    Args:
        folders: one folder per model; all images come from noise of the same seeds.
        items: one item per row.
        side: longest side of an image in px.
    """
    return _stack([_row(folders, item, side) for item in items])


def _row(folders: Sequence[GeneratedImages], item: Item, side: int) -> Image.Image:
    images, names = [], []
    for folder in folders:
        exists = bool(folder.samples(item, 1))
        image = folder.open(item, 0) if exists else Image.new("RGB", (side, side), "lightgray")
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        images.append(image)
        names.append(folder.name if exists else f"{folder.name}: not finite")
    row = caption_grid(images, names, len(folders))
    lines = textwrap.wrap(readable(item.prompt), max(16, int(1.9 * row.width / FONT_SIZE)))
    below = Image.new("RGB", (row.width, (len(lines) + 1) * (FONT_SIZE + 4)), "white")
    for number, line in enumerate(lines):
        draw_text(below, (MARGIN, number * (FONT_SIZE + 4)), line, "black", FONT_SIZE)
    return _stack([row, below])


def _stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return the pictures stacked below each other."""
    stacked = Image.new(
        "RGB", (max(picture.width for picture in pictures), sum(picture.height for picture in pictures)), "white"
    )
    top = 0
    for picture in pictures:
        stacked.paste(picture, (0, top))
        top += picture.height
    return stacked
