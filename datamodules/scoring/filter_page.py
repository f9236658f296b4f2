"""Show what a filter removes: a table, a histogram of each score, and pictures on both sides of each limit."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from nami_lightning.datamodules.preparation.image_io import open_image
from nami_lightning.datamodules.scoring.filter import ELSEWHERE, OF_HELDOUT, WITHIN, Decision
from nami_lightning.datamodules.scoring.score_files import SINGLE, Scores
from nami_lightning.datamodules.storage.shards import Record
from nami_lightning.utils.atomic_write import write_text
from nami_lightning.utils.image_grid import data_url

SIDE = 144
"""The longest side in px of a picture on the page."""

BARS = 60
WIDTH, HEIGHT, FOOT = 720, 160, 18
"""The size in px of a histogram, and of the line of numbers below it."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
h1 { overflow-wrap: anywhere }
table { border-collapse: collapse }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
.row { display: flex; flex-wrap: wrap; gap: .6rem; align-items: flex-start }
figure { margin: 0; width: 144px; font-size: 12px; line-height: 1.3; overflow-wrap: anywhere }
figure.pair { width: 294px }
figure img { display: block; margin: 0 auto .2rem; border: 1px solid #ddd; max-width: 144px }
figure.pair div { display: flex; gap: 6px }
figcaption { max-height: 6.5em; overflow: hidden }
.out figure img { border-color: #c33 }
p { margin: .6rem 0 .2rem; color: #555 }
"""


def write_filter_page(decision: Decision, file: Path, examples: int) -> None:
    """Write the page, which needs no other file.

    Args:
        decision: which samples stay.
        file: the page.
        examples: the number of pictures on each side of a limit.
    """
    scores = decision.scores
    title = f"What stays of {scores.dataset.location}"
    parts = [f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"]
    parts += [f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>", _table(decision.rows())]
    for name in ("similarity", *SINGLE):
        values = scores.of_samples(name)
        has_limit = {f"min_{name}", f"max_{name}"} & decision.filters.limits.keys()
        if values is not None and (has_limit or values.min() < values.max()):
            parts += [f"<h2>{name.replace('_', ' ')}</h2>", *_score(decision, name, values, examples)]
    for name in (ELSEWHERE, OF_HELDOUT, WITHIN):
        if name in decision.removed and decision.removed[name].any():
            parts += [f"<h2>{name}</h2>", *_repeats(decision, name, examples)]
    write_text(file, "\n".join([*parts, "</body></html>"]))


def _table(rows: Sequence[Sequence[str]]) -> str:
    def line(kind: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    note = "<p>share: of all samples; alone: removed by this filter and by no other.</p>"
    return "<table>" + line("th", rows[0]) + "".join(line("td", row) for row in rows[1:]) + "</table>" + note


def _score(decision: Decision, name: str, values: np.ndarray, examples: int) -> list[str]:
    """Return the histogram of a score, and the pictures around its limit; the lowest and highest ones without one."""
    limits = decision.filters.limits
    limit = limits.get(f"min_{name}", limits.get(f"max_{name}"))
    order = np.argsort(values, kind="stable")
    parts = [histogram(values, limit)]
    if limit is None:
        sides = [("the lowest", order[:examples], False), ("the highest", order[::-1][:examples], False)]
    else:
        cut = int(np.searchsorted(values[order], limit, side="left" if f"min_{name}" in limits else "right"))
        is_least = f"min_{name}" in limits
        below, above = order[max(0, cut - examples) : cut][::-1], order[cut : cut + examples]
        sides = [
            (f"{'removed' if is_least else 'kept'}: just below {limit:g}", below, is_least),
            (f"{'kept' if is_least else 'removed'}: from {limit:g} on", above, not is_least),
        ]
    for text, numbers, out in sides:
        figures = [_figure(decision.scores, int(number), f"{values[number]:.4g}") for number in numbers]
        parts.append(f"<p>{text}</p><div class='row{' out' if out else ''}'>{''.join(figures) or 'none'}</div>")
    return parts


def _repeats(decision: Decision, name: str, examples: int) -> list[str]:
    """Return the pairs of near-duplicates that are least alike, and so most doubtful, and some of the others."""
    numbers = np.flatnonzero(decision.removed[name])
    likeness = decision.repeats.likeness[numbers]
    by_bits = decision.filters.near_duplicates is not None
    order = np.argsort(-likeness if by_bits else likeness, kind="stable")
    unit = "bits apart" if by_bits else "cosine"
    shown = [("the least alike", order[:examples]), ("the most alike", order[::-1][:examples])]
    parts = []
    for text, places in shown:
        pairs = [_pair(decision, int(numbers[place]), f"{likeness[place]:.4g} {unit}") for place in places]
        parts.append(
            f"<p>{text}: the left one stays, the right one is removed</p><div class='row'>{''.join(pairs)}</div>"
        )
    return parts


def _pair(decision: Decision, number: int, label: str) -> str:
    place, scores = int(decision.repeats.original[number]), decision.scores
    for other in decision.others:
        if place < len(scores):
            break
        place, scores = place - len(scores), other
    (first, text), (second, other_text) = _picture(scores, place), _picture(decision.scores, number)
    caption = f"<figcaption><b>{label}</b><br>{text}<br>{other_text}</figcaption>"
    return f"<figure class='pair'><div>{first}{second}</div>{caption}</figure>"


def _figure(scores: Scores, number: int, label: str) -> str:
    picture, text = _picture(scores, number)
    return f"<figure>{picture}<figcaption><b>{label}</b> {text}</figcaption></figure>"


def _picture(scores: Scores, number: int) -> tuple[str, str]:
    """Return a sample's picture and its first caption, as HTML."""
    record = Record.from_item(scores.item(number))
    image = open_image(record.image)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    source = data_url(image, "JPEG", quality=85)
    return f"<img alt='' src='{source}'>", html.escape(record.captions[0])


def histogram(values: np.ndarray, limit: float | None) -> str:
    """Return a histogram as SVG, with a line at the limit, and the part that is removed or kept on each side of it."""
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    counts, edges = np.histogram(finite, BARS, (low, high))
    step, top = WIDTH / BARS, max(1, int(counts.max()))
    parts = [f"<svg width='{WIDTH}' height='{HEIGHT + FOOT}' role='img' font-size='12' font-family='sans-serif'>"]
    for number, count in enumerate(counts):
        height = HEIGHT * count / top
        below = limit is not None and (edges[number] + edges[number + 1]) / 2 < limit
        parts.append(
            f"<rect x='{number * step:.1f}' y='{HEIGHT - height:.1f}' width='{step - 1:.1f}' height='{height:.1f}' "
            f"fill='{'#b9c4d6' if below else '#4a6fa5'}'><title>{edges[number]:.4g}: {count:,}</title></rect>"
        )
    if limit is not None:
        x = min(WIDTH - 1.0, max(1.0, WIDTH * (limit - low) / (high - low)))
        parts.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{HEIGHT}' stroke='#c33' stroke-width='2'/>")
    foot = HEIGHT + FOOT - 4
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        text = f"{low + share * (high - low):.4g}"
        parts.append(f"<text x='{share * WIDTH:.0f}' y='{foot}' text-anchor='{anchor}'>{text}</text>")
    return "".join([*parts, "</svg>"])
