"""Describe a data set for people: its settings and counts, and a contact sheet of some of its images."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from nami_lightning.datamodules.aspect_buckets import Aspect
from nami_lightning.datamodules.preparation.image_io import open_image
from nami_lightning.datamodules.sample_order import apportion
from nami_lightning.datamodules.storage.dataset import (
    DESCRIPTION,
    ENCODINGS,
    SKIPPED,
    SPLITS,
    Bucket,
    PreparedDataset,
    Split,
)
from nami_lightning.datamodules.storage.remote import is_remote
from nami_lightning.datamodules.storage.shards import Record
from nami_lightning.utils.image_grid import caption_grid, save_image
from nami_lightning.utils.text_table import table as _table

CONTACT_SHEET = "contact_sheet.png"
CELL = 192
"""The longest side in px of an image on the contact sheet."""

COLUMNS = 8
"""The number of images in a row of the contact sheet."""
MEASURED = 2000
"""The number of records whose captions are measured."""

ONLY_LOCAL = "It is remote: to see captions and images, copy it to a disk, and show the copy."
QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


def show(folder: str | Path, out: Path | None, samples: int) -> None:
    """Print a description of a data set, and save a contact sheet; for a remote one, print only what needs no chunk.

    Args:
        folder: the folder of a prepared data set, or its URL.
        out: the folder in which ``contact_sheet.png`` is saved, or ``contact_sheet_2.png`` if there is one; None: the
            current folder.
        samples: the number of images on the contact sheet, taken from all buckets; 0: no contact sheet.

    Raises:
        FileNotFoundError: the folder holds no data set.
        ValueError: the data set has another format, or ``out`` lies inside its folder.
    """
    out = out or Path()
    if is_remote(folder):
        dataset = PreparedDataset(folder)
        print("\n".join([*settings_lines(dataset), "", *outcome(dataset), "", ONLY_LOCAL]))
        return
    folder = Path(folder)
    if samples and folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"--output {out} lies in the data set, and nothing is written there: choose another folder")
    dataset = PreparedDataset(folder)
    if dataset.encodings is not None:
        print("\n".join([*settings_lines(dataset), "", *encoder_lines(dataset.encodings), "", *outcome(dataset)]))
        return
    buckets = list_buckets(dataset)
    print(
        "\n".join(
            [*settings_lines(dataset), "", *outcome(dataset), "", *caption_lines(buckets), "", *encoding_lines(folder)]
        )
    )
    if samples:
        file = unused(out / CONTACT_SHEET)
        save_image(contact_sheet(buckets, samples), file)
        print(f"\nSome of its images: {file}")


def unused(file: Path) -> Path:
    """Return a path where no file is: the given one, or else one with a number in its name."""
    numbered = (file.with_stem(f"{file.stem}_{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([file], numbered) if not path.exists())


def list_buckets(dataset: PreparedDataset) -> list[tuple[Split, Bucket]]:
    """Return all buckets that hold samples, split by split."""
    return [(split, bucket) for split in SPLITS for bucket in dataset.buckets(split)]


def outcome(dataset: PreparedDataset) -> list[str]:
    """Return the lines that say what a preparation made, and what it left out and why."""
    return [*count_lines(dataset, list_buckets(dataset)), "", *removal_lines(dataset)]


def settings_lines(dataset: PreparedDataset) -> list[str]:
    """Return the lines with the format, the source, the settings, and the size."""
    description = dataset.description
    settings: dict[str, Any] = dict(description["settings"])
    source: dict[str, Any] = settings.pop("source")
    filters = {name: value for name, value in settings.pop("filters").items() if value not in (None, False)}
    rows = [("format", description["format"]), ("source", _pairs(source))]
    rows += [(name.replace("_", " "), _text(value)) for name, value in settings.items()]
    rows += [("filters", _pairs(filters))]
    rows += [("on disk", _on_disk(dataset.folder))] if dataset.cache is None else [("chunks", _in_store(dataset))]
    return [dataset.location, *_table([[f"  {name}", value] for name, value in rows], "<<")]


def count_lines(dataset: PreparedDataset, buckets: Sequence[tuple[Split, Bucket]]) -> list[str]:
    """Return the lines with the number of images of each bucket and split."""
    counts: dict[tuple[int, Aspect], dict[Split, int]] = {}
    for split, bucket in buckets:
        counts.setdefault((bucket.resolution, bucket.aspect), {})[split] = len(bucket)
    rows = [["resolution", "shape", "aspect", *SPLITS, "all"]]
    for resolution, aspect in sorted(counts, key=lambda key: (key[0], key[1].ratio)):
        by_split = [counts[resolution, aspect].get(split, 0) for split in SPLITS]
        numbers = [f"{number:,}" for number in (*by_split, sum(by_split))]
        rows.append([f"{resolution} px", str(aspect.shape(resolution)), str(aspect), *numbers])
    totals = [sum(bucket_counts.get(split, 0) for bucket_counts in counts.values()) for split in SPLITS]
    rows.append(["all", "", "", *(f"{number:,}" for number in (*totals, sum(totals)))])
    lines = ["images", *(f"  {line}" for line in _table(rows, ">>>>>>"))]
    empty = [f"{resolution} px" for resolution in dataset.resolutions if resolution not in {key[0] for key in counts}]
    return lines + [f"  No image is stored at {', '.join(empty)}."] * bool(empty)


def removal_lines(dataset: PreparedDataset) -> list[str]:
    """Return the lines that say what happened to the images that were read."""
    description = dataset.description
    rows = [["read", f"{description['read']:,}"]]
    rows += [[f"removed: {reason}", f"{number:,}"] for reason, number in _largest_first(description["removed"])]
    rows += [[f"skipped: {reason}", f"{number:,}"] for reason, number in _largest_first(description["skipped"])]
    rows += [["kept", f"{sum(sum(by_bucket.values()) for by_bucket in description['samples'].values()):,}"]]
    lines = ["from the source", *(f"  {line}" for line in _table(rows, "<>"))]
    if notes := description.get("notes"):
        rows = [[f"{number:,}", note] for note, number in _largest_first(notes)]
        lines += ["  Of those kept:", *(f"    {line}" for line in _table(rows, "><"))]
    return lines + [f"  The skipped ones by name: {dataset.location}/{SKIPPED}"] * bool(description["skipped"])


def caption_lines(buckets: Sequence[tuple[Split, Bucket]]) -> list[str]:
    """Return the lines with quantiles of captions and images, measured on records of all buckets."""
    records = [record for _, _, record in sample_evenly(buckets, MEASURED)]
    measures: dict[str, list[float]] = {
        "characters of a caption": [len(caption) for record in records for caption in record.captions],
    }
    of_kind: dict[str, list[float]] = {}
    for record in records:
        for kind, caption in zip(record.kinds, record.captions, strict=False):
            of_kind.setdefault(kind, []).append(len(caption))
    measures |= {f"  {kind}": lengths for kind, lengths in of_kind.items()}
    measures |= {
        "captions of an image": [len(record.captions) for record in records],
        "kB of an image": [len(record.image) / 1000 for record in records],
    }
    rows = [["", *QUANTILES]]
    for name, values in measures.items():
        quantiles = np.quantile(values, list(QUANTILES.values()), method="nearest")
        rows.append([name, *(f"{quantile:,.0f}" for quantile in quantiles)])
    everything = sum(len(bucket) for _, bucket in buckets)
    return [f"in {len(records):,} of {everything:,} images", *(f"  {line}" for line in _table(rows, "<>>>>>"))]


def encoding_lines(folder: Path) -> list[str]:
    """Return the lines with the precomputed encodings of a data set, and their sizes."""
    found = sorted(path.parent for path in folder.glob(f"{ENCODINGS}/*/{DESCRIPTION}"))
    rows = [[f"  {path.name}", _on_disk(path)] for path in found]
    return ["encodings", *_table(rows, "<<")] if rows else ["encodings: none"]


def encoder_lines(encodings: dict[str, Any]) -> list[str]:
    """Return the lines that say which encoders made a data set of encodings, and what it holds of each sample."""
    layout = encodings["layout"]
    size = (
        "pixels: the images themselves" if layout["pixels"] else f"{layout['channels']} channels, {layout['factor']} px"
    )
    rows = [
        ("latents", size),
        ("stages", f"{_text(layout['resolutions'])} px"),
        ("latent pyramid", layout["latent_pyramid"]),
        ("crops", str(encodings["crops"])),
    ]
    rows += [(key, "none" if value is None else _pairs(value)) for key, value in encodings["encoders"].items()]
    return ["encodings", *_table([[f"  {name}", value] for name, value in rows], "<<")]


def contact_sheet(buckets: Sequence[tuple[Split, Bucket]], samples: int) -> Image.Image:
    """Return a picture of images from all buckets, with their buckets and captions."""
    images, labels, texts = [], [], []
    for split, bucket, record in sample_evenly(buckets, samples):
        image = open_image(record.image)
        image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        count = len(record.captions)
        images.append(image)
        labels.append(f"{split} {bucket.name}" + (f", 1 of {count}" if count > 1 else ""))
        texts.append(record.captions[0])
    return caption_grid(images, texts, COLUMNS, labels)


def sample_evenly(buckets: Sequence[tuple[Split, Bucket]], samples: int) -> Iterator[tuple[Split, Bucket, Record]]:
    """Yield ``samples`` records at even distances from all buckets, in proportion to the buckets' sizes.

    If ``samples`` allows, at least one record comes from each bucket.
    """
    sizes = [len(bucket) for _, bucket in buckets]
    samples = min(samples, sum(sizes))
    each = int(samples >= len(sizes))
    rest = [size - each for size in sizes]
    more = apportion(samples - each * len(sizes), rest) if any(rest) else [0] * len(sizes)
    for (split, bucket), number in zip(buckets, (each + count for count in more), strict=True):
        for index in range(number):
            position = index * len(bucket) // number
            try:
                record = Record.from_item(bucket.shards.read([position])[0])
            except (ValueError, TypeError) as error:
                raise bucket.shards.damaged_sample(position, f"has no captions that can be read ({error})") from error
            yield split, bucket, record


# --- text --------------------------------------------------------------------------------------


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items()) or "none"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _largest_first(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def _on_disk(folder: Path) -> str:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return f"{tqdm.format_sizeof(sum(sizes), 'B', 1024)} in {len(sizes):,} files"


def _in_store(dataset: PreparedDataset) -> str:
    sizes = [size for _, bucket in list_buckets(dataset) for size in bucket.shards.chunk_bytes]
    return f"{tqdm.format_sizeof(sum(sizes), 'B', 1024)} in {len(sizes):,} chunks"
