"""Pages for raters: NAMI-1K's four dimensions from 0 to 100, every image on its own, shuffled, blind to the model.

OUT/nami1k/ratings/key.json                       which image is whose; not for raters
OUT/nami1k/ratings/pages/rater-1-part-01.html     one file with its images in it; opens in any browser, needs no network
OUT/nami1k/ratings/pages/...

A rater opens a page, rates, presses "Save answers", and sends back the file that it saves. Images bear numbers that say
nothing, and each rater sees them in an order of his own.
"""

import base64
import hashlib
import html
import io
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

from nami_lightning.evaluation.generate import ImageFolder
from nami_lightning.evaluation.prompts import Item
from nami_lightning.evaluation.results import write_json
from nami_lightning.utils.atomic_write import replacing

FORMAT = 1
KEY = "key.json"
QUALITY = 90

DIMENSIONS = {
    "relevance": ("Relevance", "Does it show what the text asks for: all of it, and nothing else in its place?"),
    "coherence": ("Coherence", "Do the parts make sense together: bodies, objects, perspective, text?"),
    "aesthetic": ("Aesthetic quality", "Is it well made to look at: composition, colour, light, detail?"),
    "realism": ("Realism", "Does it look real, or like a convincing work of the kind that the text asks for?"),
}
"""In the order of Table 5: the name in files, on the page, and what it asks."""


@dataclass(frozen=True)
class Plan:
    """How a rating is shared out.

    Args:
        raters: how many people rate.
        each: how many of them rate each image; all, or fewer in turn.
        page_images: images on one page.
        side: px, the longest side of an image on a page.
    """

    raters: int = 5
    each: int = 5
    page_images: int = 100
    side: int = 768

    def __post_init__(self) -> None:
        if self.raters < 1 or not 1 <= self.each <= self.raters:
            raise ValueError(f"each image needs 1 to {self.raters} of {self.raters} raters, not {self.each}")
        if self.page_images < 1 or self.side < 16:
            raise ValueError(f"{self.page_images} images a page of {self.side} px: too few, or too small")


def write_pages(
    folders: Sequence[ImageFolder], items: Sequence[Item], images: int, plan: Plan, out: Path
) -> list[Path]:
    """Write the key and all pages; the same again writes the same pages.

    Args:
        folders: one a model, drawn.
        items: whose images are rated.
        images: of each item.
        plan: how they are shared out.
        out: the folder of the key and the pages.

    Raises:
        ValueError: the folder holds the key of another rating.
    """
    wanted = {
        "format": FORMAT,
        "models": [folder.name for folder in folders],
        "raters": plan.raters,
        "each": plan.each,
        "page_images": plan.page_images,
        "files": _fingerprint(folders, items, images),
    }
    key = _key(wanted, folders, items, images, out)
    sources = {folder.name: folder for folder in folders}
    prompts = {item.id: item for item in items}
    pages = []
    for rater in tqdm(range(1, plan.raters + 1), desc="pages", unit="rater"):
        for part, numbers in enumerate(shares(key, rater), 1):
            entries = []
            for number in numbers:
                about = key["images"][number]
                item = prompts[about["item"]]
                picture = _embed(sources[about["model"]].open(item, about["sample"]), plan.side)
                entries.append({"image": number, "prompt": item.prompt, "picture": picture})
            path = out / "pages" / f"rater-{rater}-part-{part:02d}.html"
            with replacing(path) as partial:
                partial.write_text(page(key["study"], rater, part, entries), encoding="utf-8")
            pages.append(path)
    return pages


def shares(key: Mapping[str, Any], rater: int) -> list[list[str]]:
    """The numbers of the images on each of a rater's pages, in his order.

    Image i goes to ``each`` raters in turn, from the i-th on. Numbers were given at random, so every rater gets models
    and prompts alike.
    """
    raters, each = key["raters"], key["each"]
    own = [number for i, number in enumerate(key["images"]) if (rater - 1 - i) % raters < each]
    random.Random(f"{key['salt']} {rater}").shuffle(own)
    size = key["page_images"]
    return [own[first : first + size] for first in range(0, len(own), size)]


def _key(
    wanted: Mapping[str, Any], folders: Sequence[ImageFolder], items: Sequence[Item], images: int, out: Path
) -> dict[str, Any]:
    """Which image is whose: as it was written, or a new one."""
    path = out / KEY
    if path.exists():
        key = json.loads(path.read_text(encoding="utf-8"))
        if any(key.get(name) != value for name, value in wanted.items()):
            raise ValueError(
                f"{path} is of another rating (other models, prompts, images or raters), whose answers it is needed "
                "for: choose another --out, or move it away"
            )
        return key
    salt = secrets.token_hex(16)
    everything = [
        {"model": folder.name, "item": item.id, "kind": item.kind, "sample": i}
        for item in items
        for folder in folders
        for i in range(images)
    ]
    random.Random(salt).shuffle(everything)
    digits = len(str(len(everything)))
    numbered = {f"{i:0{digits}d}": about for i, about in enumerate(everything, 1)}
    key = {"study": secrets.token_hex(4), "salt": salt, **wanted, "images": numbered}
    write_json(path, key)
    return key


def _fingerprint(folders: Sequence[ImageFolder], items: Sequence[Item], images: int) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for item in items:
            digest.update(item.prompt.encode())
            for i in range(images):
                digest.update(hashlib.sha256(folder.path(item, i).read_bytes()).digest())
    return digest.hexdigest()


def _embed(image: Image.Image, side: int) -> str:
    """A JPEG of at most ``side`` px as a data URL; what the PNG says of itself is left behind."""
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def page(study: str, rater: int, part: int, entries: Sequence[Mapping[str, str]]) -> str:
    """A page as text.

    Args:
        study: the rating's name, which its answers bear.
        rater: number of the person.
        part: number of the page.
        entries: ``image`` (number), ``prompt`` and ``picture`` (data URL) of each image, in their order.
    """
    dimensions = [{"name": name, "title": title, "asks": asks} for name, (title, asks) in DIMENSIONS.items()]
    data = {"format": FORMAT, "study": study, "rater": rater, "part": part, "dimensions": dimensions}
    template = files("nami_lightning.evaluation.nami1k").joinpath("rating_page.html").read_text(encoding="utf-8")
    script = json.dumps(data | {"entries": list(entries)}).replace("<", "\\u003c")
    return template.replace("{{title}}", html.escape(f"Rater {rater}, part {part}")).replace("{{data}}", script)
