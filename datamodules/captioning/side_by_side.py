"""Show the captions of each image side by side, on a page that needs no other file."""

import html
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from nami_lightning.datamodules.captioning.caption_task import CAPTIONS
from nami_lightning.datamodules.preparation.image_io import open_image
from nami_lightning.datamodules.storage.dataset import PreparedDataset
from nami_lightning.datamodules.storage.inspect import list_buckets, sample_evenly
from nami_lightning.datamodules.storage.shards import SOURCE, Record
from nami_lightning.utils.atomic_write import write_text
from nami_lightning.utils.image_grid import data_url
from nami_lightning.utils.text_table import table

SIDE = 256
"""The longest side in px of an image on the page."""

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem; color: #222 }
table { border-collapse: collapse; width: 100% }
th, td { padding: .5rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888; position: sticky; top: 0; background: #fff }
td img { display: block; max-width: 256px }
small { color: #777; display: block }
"""


def has_new_captions(dataset: PreparedDataset) -> bool:
    """Return whether a data set of images has captions that a model wrote."""
    return dataset.encodings is None and bool(dataset.description.get(CAPTIONS))


def count_lines(dataset: PreparedDataset) -> list[str]:
    """Return the table that says how many captions of each kind were made, and why others were left out."""
    rows = [["captions", "made", "left out", "why"]]
    for one in dataset.description[CAPTIONS]:
        for label, counts in one["counts"].items():
            reasons = {reason: count for reason, count in counts.items() if reason != "made"}
            why = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
            rows.append([label, f"{counts.get('made', 0):,}", f"{sum(reasons.values()):,}", why])
    return table(rows, "<>><")


def write_side_by_side(dataset: PreparedDataset, file: Path, samples: int) -> None:
    """Write a page with a row for each of some images: the image, and its captions in a column for each kind.

    Args:
        dataset: a data set with new captions.
        file: the page.
        samples: the number of images, taken from all buckets.
    """
    records = [record for _, _, record in sample_evenly(list_buckets(dataset), samples)]
    made = dataset.description[CAPTIONS]
    columns = [SOURCE, *(label for one in made for label in one["counts"])]
    models = ", ".join(f"{', '.join(one['counts'])}: {one['settings'][CAPTIONS]['model']}" for one in made)
    title = f"Captions in {dataset.location}"
    parts = [f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"]
    parts += [f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1><p>{html.escape(models)}</p>"]
    parts += ["<table><tr><th>image</th>", *(f"<th>{html.escape(column)}</th>" for column in columns), "</tr>"]
    parts += [_row(record, columns) for record in records]
    write_text(file, "\n".join([*parts, "</table></body></html>"]))


def _row(record: Record, columns: Sequence[str]) -> str:
    image = open_image(record.image)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    cells = [
        f"<td><img alt='' src='{data_url(image, 'JPEG', quality=85)}'><small>{html.escape(record.id)}</small></td>"
    ]
    weights = record.weights or [1.0] * len(record.captions)
    for column in columns:
        found = [
            f"{html.escape(caption)}<small>{len(caption)} characters, {weight / sum(weights):.0%}</small>"
            for kind, caption, weight in zip(record.kinds, record.captions, weights, strict=True)
            if kind == column
        ]
        cells.append(f"<td>{'<br>'.join(found) or '—'}</td>")
    return f"<tr>{''.join(cells)}</tr>"
