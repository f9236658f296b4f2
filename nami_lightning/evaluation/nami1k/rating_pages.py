"""Pages for raters: they rate NAMI-1K's four dimensions from 0 to 100, one image at a time, without knowing the model.

OUT/nami1k/ratings/key.json                       the model and the prompt of each image; raters must not see it
OUT/nami1k/ratings/pages/rater-1-part-01.html     one file that contains its images; opens in any browser, offline
OUT/nami1k/ratings/pages/...

A rater opens a page, rates the images, presses "Save answers", and sends back the saved file. Images have random
numbers, and each rater sees them in another order.
"""

import hashlib
import html
import json
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from nami_lightning.evaluation.generate import GeneratedImages
from nami_lightning.evaluation.prompts import Item
from nami_lightning.utils.atomic_write import write_json, write_text
from nami_lightning.utils.image_grid import data_url
from nami_lightning.utils.text_files import parse_json, read_text

FORMAT = 1
KEY = "key.json"
QUALITY = 90

DIMENSIONS = {
    "relevance": ("Relevance", "Does it show what the text asks for: all of it, and nothing else in its place?"),
    "coherence": ("Coherence", "Do the parts make sense together: bodies, objects, perspective, text?"),
    "aesthetic": ("Aesthetic quality", "Is it well made to look at: composition, colour, light, detail?"),
    "realism": ("Realism", "Does it look real, or like a convincing work of the kind that the text asks for?"),
}
"""The dimensions in the order of Table 5: the name in files, then the title on the page and the question below it."""


@dataclass(frozen=True)
class RatingSettings:
    """How the images are distributed to the raters.

    Args:
        raters: number of people who rate.
        each: number of raters for each image; if it is below ``raters``, they take turns.
        page_images: number of images on one page.
        side: longest side of an image on a page, in px.
    """

    raters: int = 5
    each: int = 5
    page_images: int = 100
    side: int = 768

    def __post_init__(self) -> None:
        if self.raters < 1 or not 1 <= self.each <= self.raters:
            raise ValueError(f"each image needs 1 to {self.raters} of the {self.raters} raters, not {self.each}")
        if self.page_images < 1 or self.side < 16:
            raise ValueError(
                f"{self.page_images} images per page, {self.side} px wide: too few images, or images too small"
            )


def write_pages(
    folders: Sequence[GeneratedImages], items: Sequence[Item], images: int, settings: RatingSettings, out: Path
) -> list[Path]:
    """Write the key and all pages, and return the paths of the pages.

    Called again with the same arguments, it writes the same pages.

    Args:
        folders: the images, one folder per model.
        items: items whose images are rated.
        images: number of images of each item.
        settings: how the images are distributed.
        out: folder of the key and the pages.

    Raises:
        ValueError: the folder has the key of another rating.
    """
    study_settings = {
        "format": FORMAT,
        "models": [folder.name for folder in folders],
        "raters": settings.raters,
        "each": settings.each,
        "page_images": settings.page_images,
        "files": _fingerprint(folders, items, images),
    }
    key = _read_or_make_key(study_settings, folders, items, images, out)
    sources = {folder.name: folder for folder in folders}
    prompts = {item.id: item for item in items}
    pages = []
    for rater in tqdm(range(1, settings.raters + 1), desc="pages", unit="rater"):
        for part, numbers in enumerate(pages_of_rater(key, rater), 1):
            entries = []
            for number in numbers:
                entry = key["images"][number]
                item = prompts[entry["item"]]
                picture = _embed(sources[entry["model"]].open(item, entry["sample"]), settings.side)
                entries.append({"image": number, "prompt": item.prompt, "picture": picture})
            path = out / "pages" / f"rater-{rater}-part-{part:02d}.html"
            write_text(path, render_page(key["study"], rater, part, entries))
            pages.append(path)
    return pages


def pages_of_rater(key: Mapping[str, Any], rater: int) -> list[list[str]]:
    """Return the numbers of the images on each page of a rater, in the order that the rater sees.

    Image i goes to ``each`` raters in turn, starting with the i-th. Images are numbered at random, so all raters get a
    similar mix of models and prompts.
    """
    raters, each = key["raters"], key["each"]
    numbers = [number for i, number in enumerate(key["images"]) if (rater - 1 - i) % raters < each]
    random.Random(f"{key['salt']} {rater}").shuffle(numbers)
    size = key["page_images"]
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def _read_or_make_key(
    study_settings: Mapping[str, Any], folders: Sequence[GeneratedImages], items: Sequence[Item], images: int, out: Path
) -> dict[str, Any]:
    """Return the key of the rating: the one that is already there, or a new one."""
    path = out / KEY
    if path.exists():
        try:
            key = parse_json(read_text(path))
            check_key(key)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): move it away to begin another rating") from error
        if any(key.get(name) != value for name, value in study_settings.items()):
            raise ValueError(
                f"{path} belongs to another rating (other models, prompts, images or raters), whose answers need it: "
                "choose another --output, or move it away"
            )
        return dict(key)
    salt = secrets.token_hex(16)
    all_images = [
        {"model": folder.name, "item": item.id, "kind": item.kind, "sample": i}
        for item in items
        for folder in folders
        for i in folder.samples(item, images)
    ]
    random.Random(salt).shuffle(all_images)
    digits = len(str(len(all_images)))
    numbered = {f"{i:0{digits}d}": entry for i, entry in enumerate(all_images, 1)}
    key = {"study": secrets.token_hex(4), "salt": salt, **study_settings, "images": numbered}
    write_json(path, key)
    return key


def check_key(key: Any) -> None:
    """Check that a value has what the key of a rating has.

    Raises:
        AttributeError, KeyError, TypeError or ValueError: it has not.
    """
    numbers = [key[name] for name in ("raters", "each", "page_images")]
    if any(isinstance(number, bool) or not isinstance(number, int) or number < 1 for number in numbers):
        raise ValueError("raters, each and page_images must be numbers")
    texts = [key["study"], key["salt"], *key["models"]]
    for entry in key["images"].values():
        texts += [entry[name] for name in ("model", "item", "kind")]
        if not isinstance(entry["sample"], int):
            raise ValueError("sample must be a number")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("names must be texts")


def _fingerprint(folders: Sequence[GeneratedImages], items: Sequence[Item], images: int) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for item in items:
            digest.update(item.prompt.encode())
            for i in folder.samples(item, images):
                digest.update(hashlib.sha256(folder.path(item, i).read_bytes()).digest())
    return digest.hexdigest()


def _embed(image: Image.Image, side: int) -> str:
    """Return a JPEG of at most ``side`` px as a data URL; the metadata of the PNG is dropped."""
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return data_url(image, "JPEG", quality=QUALITY)


def render_page(study: str, rater: int, part: int, entries: Sequence[Mapping[str, str]]) -> str:
    """Return the HTML of a page.

    Args:
        study: name of the rating, which is saved with its answers.
        rater: number of the rater.
        part: number of the page.
        entries: ``image`` (number), ``prompt`` and ``picture`` (data URL) of each image, in order.
    """
    dimensions = [{"name": name, "title": title, "asks": asks} for name, (title, asks) in DIMENSIONS.items()]
    data = {"format": FORMAT, "study": study, "rater": rater, "part": part, "dimensions": dimensions}
    template = files("nami_lightning.evaluation.nami1k").joinpath("rating_page.html").read_text(encoding="utf-8")
    script = json.dumps(data | {"entries": list(entries)}).replace("<", "\\u003c")
    return template.replace("{{title}}", html.escape(f"Rater {rater}, part {part}")).replace("{{data}}", script)
