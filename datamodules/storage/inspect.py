"""What a data set is, for people: its settings and counts, and a picture of some of its images."""

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
"""Longest side of an image on the contact sheet."""

COLUMNS = 8
MEASURED = 2000
"""Records whose captions are measured."""

ONLY_LOCAL = "It is remote: for captions and pictures, copy it to a disk, and show the copy."
QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


def show(folder: str | Path, out: Path | None, samples: int) -> None:
    """Print what a data set is, and draw a contact sheet; of a remote one, only what needs none of its chunks.

    Args:
        folder: of a prepared data set, or its URL.
        out: where ``contact_sheet.png`` goes; None: here.
        samples: images on it, spread over the buckets; 0: none is drawn.

    Raises:
        FileNotFoundError: no data set is there.
        ValueError: it is of another format, or ``out`` lies in it.
    """
    out = out or Path()
    if is_remote(folder):
        dataset = PreparedDataset(folder)
        print("\n".join([*settings(dataset), "", *outcome(dataset), "", ONLY_LOCAL]))
        return
    folder = Path(folder)
    if samples and folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"--out {out} lies in the data set, which is left as it is: choose another folder")
    dataset = PreparedDataset(folder)
    if dataset.encodings is not None:
        print("\n".join([*settings(dataset), "", *encoders(dataset.encodings), "", *outcome(dataset)]))
        return
    buckets = buckets_of(dataset)
    print("\n".join([*settings(dataset), "", *outcome(dataset), "", *captions(buckets), "", *encodings(folder)]))
    if samples:
        save_image(contact_sheet(buckets, samples), out / CONTACT_SHEET)
        print(f"\nSome of its images: {out / CONTACT_SHEET}")


def buckets_of(dataset: PreparedDataset) -> list[tuple[Split, Bucket]]:
    """All buckets that hold anything, split by split."""
    return [(split, bucket) for split in SPLITS for bucket in dataset.buckets(split)]


def outcome(dataset: PreparedDataset) -> list[str]:
    """What a preparation made, and what it left out and why."""
    return [*counts(dataset, buckets_of(dataset)), "", *losses(dataset)]


def settings(dataset: PreparedDataset) -> list[str]:
    """The format, the source, what was set, and the size."""
    about = dataset.description
    chosen: dict[str, Any] = dict(about["settings"])
    source: dict[str, Any] = chosen.pop("source")
    filters = {name: value for name, value in chosen.pop("filters").items() if value not in (None, False)}
    rows = [("format", about["format"]), ("source", _pairs(source))]
    rows += [(name.replace("_", " "), _text(value)) for name, value in chosen.items()]
    rows += [("filters", _pairs(filters))]
    rows += [("on disk", _on_disk(dataset.folder))] if dataset.cache is None else [("chunks", _in_store(dataset))]
    return [dataset.location, *_table([[f"  {name}", value] for name, value in rows], "<<")]


def counts(dataset: PreparedDataset, buckets: Sequence[tuple[Split, Bucket]]) -> list[str]:
    """Images of every bucket and split."""
    held: dict[tuple[int, Aspect], dict[Split, int]] = {}
    for split, bucket in buckets:
        held.setdefault((bucket.resolution, bucket.aspect), {})[split] = len(bucket)
    rows = [["resolution", "shape", "aspect", *SPLITS, "all"]]
    for resolution, aspect in sorted(held, key=lambda key: (key[0], key[1].ratio)):
        of_bucket = [held[resolution, aspect].get(split, 0) for split in SPLITS]
        numbers = [f"{number:,}" for number in (*of_bucket, sum(of_bucket))]
        rows.append([f"{resolution} px", str(aspect.shape(resolution)), str(aspect), *numbers])
    totals = [sum(of_bucket.get(split, 0) for of_bucket in held.values()) for split in SPLITS]
    rows.append(["all", "", "", *(f"{number:,}" for number in (*totals, sum(totals)))])
    lines = ["images", *(f"  {line}" for line in _table(rows, ">>>>>>"))]
    empty = [f"{resolution} px" for resolution in dataset.resolutions if resolution not in {key[0] for key in held}]
    return lines + [f"  No image is stored at {', '.join(empty)}."] * bool(empty)


def losses(dataset: PreparedDataset) -> list[str]:
    """What became of the images that were read but are not there."""
    about = dataset.description
    rows = [["read", f"{about['read']:,}"]]
    rows += [[f"removed: {reason}", f"{number:,}"] for reason, number in _falling(about["removed"])]
    rows += [[f"skipped: {reason}", f"{number:,}"] for reason, number in _falling(about["skipped"])]
    rows += [["kept", f"{sum(sum(of_split.values()) for of_split in about['samples'].values()):,}"]]
    lines = ["from the source", *(f"  {line}" for line in _table(rows, "<>"))]
    return lines + [f"  The skipped ones by name: {dataset.location}/{SKIPPED}"] * bool(about["skipped"])


def captions(buckets: Sequence[tuple[Split, Bucket]]) -> list[str]:
    """Quantiles over records spread over all buckets."""
    records = [record for _, _, record in spread(buckets, MEASURED)]
    measures: dict[str, list[float]] = {
        "characters of a caption": [len(caption) for record in records for caption in record.captions],
        "captions of an image": [len(record.captions) for record in records],
        "kB of an image": [len(record.image) / 1000 for record in records],
    }
    rows = [["", *QUANTILES]]
    for name, values in measures.items():
        quantiles = np.quantile(values, list(QUANTILES.values()), method="nearest")
        rows.append([name, *(f"{quantile:,.0f}" for quantile in quantiles)])
    everything = sum(len(bucket) for _, bucket in buckets)
    return [f"in {len(records):,} of {everything:,} images", *(f"  {line}" for line in _table(rows, "<>>>>>"))]


def encodings(folder: Path) -> list[str]:
    """The precomputed encodings that are there, with their sizes."""
    found = sorted(path.parent for path in folder.glob(f"{ENCODINGS}/*/{DESCRIPTION}"))
    rows = [[f"  {path.name}", _on_disk(path)] for path in found]
    return ["encodings", *_table(rows, "<<")] if rows else ["encodings: none"]


def encoders(about: dict[str, Any]) -> list[str]:
    """Who made a data set of encodings, and what it holds of each sample."""
    layout = about["layout"]
    size = (
        "pixels: the images themselves" if layout["pixels"] else f"{layout['channels']} channels, {layout['factor']} px"
    )
    rows = [
        ("latents", size),
        ("stages", f"{_text(layout['resolutions'])} px"),
        ("latent pyramid", layout["latent_pyramid"]),
        ("crops", str(about["crops"])),
    ]
    rows += [(key, "none" if of is None else _pairs(of)) for key, of in about["encoders"].items()]
    return ["encodings", *_table([[f"  {name}", value] for name, value in rows], "<<")]


def contact_sheet(buckets: Sequence[tuple[Split, Bucket]], samples: int) -> Image.Image:
    """Images spread over the buckets, with their buckets and captions."""
    images, labels, texts = [], [], []
    for split, bucket, record in spread(buckets, samples):
        image = open_image(record.image)
        image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        count = len(record.captions)
        images.append(image)
        labels.append(f"{split} {bucket.name}" + (f", 1 of {count}" if count > 1 else ""))
        texts.append(record.captions[0])
    return caption_grid(images, texts, COLUMNS, labels)


def spread(buckets: Sequence[tuple[Split, Bucket]], samples: int) -> Iterator[tuple[Split, Bucket, Record]]:
    """So many records at even distances, in proportion from all buckets, but one of each if ``samples`` allows."""
    sizes = [len(bucket) for _, bucket in buckets]
    samples = min(samples, sum(sizes))
    each = int(samples >= len(sizes))
    rest = [size - each for size in sizes]
    more = apportion(samples - each * len(sizes), rest) if any(rest) else [0] * len(sizes)
    for (split, bucket), number in zip(buckets, (each + count for count in more), strict=True):
        for index in range(number):
            item = bucket.shards.read([index * len(bucket) // number])[0]
            yield split, bucket, Record.from_item(item)


# --- text --------------------------------------------------------------------------------------


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items()) or "none"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _falling(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def _on_disk(folder: Path) -> str:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return f"{tqdm.format_sizeof(sum(sizes), 'B', 1024)} in {len(sizes):,} files"


def _in_store(dataset: PreparedDataset) -> str:
    sizes = [size for _, bucket in buckets_of(dataset) for size in bucket.shards.chunk_bytes]
    return f"{tqdm.format_sizeof(sum(sizes), 'B', 1024)} in {len(sizes):,} chunks"
