"""The folder of ``lightning sample``: its images, the index and the grids."""

import json
import re
from pathlib import Path
from typing import Any

GRID_ROWS = 8
GRID_SIDE = 512
"""Longest side of an image on a grid, in px."""


def image_name(number: int) -> str:
    """Return the file name of an image."""
    return f"{number:05d}.png"


def find_images(folder: Path) -> list[int]:
    """Return the numbers of the images that are in a folder.

    Raises:
        NotADirectoryError: there is a file in the folder's place.
    """
    if not folder.exists():
        return []
    numbers = [int(path.stem) for path in folder.iterdir() if re.fullmatch(r"[0-9]{5,}\.png", path.name)]
    return sorted(number for number in set(numbers) if (folder / image_name(number)).exists())


def keep(folder: Path, earlier: list[int], asked: list[dict[str, Any]]) -> set[int]:
    """Return the numbers of the images that are there already as asked; a damaged file is none.

    Args:
        folder: of the images.
        earlier: the numbers of those that are there.
        asked: what is asked for each image now.

    Raises:
        FileExistsError: images of another command are in the folder.
    """
    from nami_lightning.pipelines.png_settings import read_settings

    kept = set()
    for number in earlier:
        try:
            settings = read_settings(folder / image_name(number))
        except OSError:
            continue
        found = settings and settings["asked"]
        if number >= len(asked):
            why = f"this one draws {len(asked)}"
        elif found is None:
            why = f"{image_name(number)} says no settings"
        else:
            wanted = asked[number]
            differing = [name for name in wanted if found.get(name) != wanted[name]]
            why = "".join(f"{image_name(number)}: {n} {found.get(n)!r}, not {wanted[n]!r}" for n in differing[:1])
        if why:
            raise FileExistsError(
                f"{folder} holds {len(earlier)} image(s) of an earlier command ({why}): give another --output, or "
                "--overwrite to remove them"
            )
        kept.add(number)
    return kept


def remove(folder: Path, images: list[int]) -> None:
    """Remove images, and the index and grids, which are of all images."""
    for number in images:
        (folder / image_name(number)).unlink(missing_ok=True)
    for path in [*folder.glob("grid*.png"), folder / "index.jsonl"]:
        if re.fullmatch(r"grid(-[0-9]+)?\.png|index\.jsonl", path.name):
            path.unlink(missing_ok=True)


def write_index_and_grids(folder: Path, numbers: list[int], columns: int) -> int:
    """Write ``index.jsonl`` and the grids from the images on the disk; return the number of grids."""
    from PIL import Image

    from nami_lightning.pipelines.png_settings import read_settings
    from nami_lightning.utils.atomic_write import write_text
    from nami_lightning.utils.image_grid import caption_grid, save_image

    names = [image_name(number) for number in numbers]
    drawn = [(read_settings(folder / name) or {"drawn": {"prompt": ""}})["drawn"] for name in names]
    lines = [
        json.dumps({"file": name} | settings, ensure_ascii=False) for name, settings in zip(names, drawn, strict=True)
    ]
    page = columns * GRID_ROWS
    pages = range(0, len(names), page)
    for number, first in enumerate(pages, 1):
        shown = []
        for name in names[first : first + page]:
            with Image.open(folder / name) as image:
                image.thumbnail((GRID_SIDE, GRID_SIDE))
                shown.append(image.convert("RGB"))
        captions = [settings["prompt"] for settings in drawn[first : first + page]]
        grid = "grid.png" if number == 1 else f"grid-{number}.png"
        save_image(caption_grid(shown, captions, columns), folder / grid)
    write_text(folder / "index.jsonl", "\n".join(lines) + "\n")
    return len(pages)
