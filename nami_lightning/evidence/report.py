"""A comparison for people: tables on the terminal and in Markdown, plots, grids, TensorBoard events, one HTML page."""

import base64
import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from nami_lightning.evidence import compare
from nami_lightning.evidence.compare import AXES, HEADLINES, Difference, RunRecord, direction
from nami_lightning.grid import caption_grid, save_image

MISSING = "—"
COLUMNS = 8
"""Of a grid, about: whole prompts stand beside each other."""
NOISE_NOTE = (
    "± is half of the 95% interval when the drawn and the held-out images of the last evaluations are resampled "
    "(bootstrap). It covers the noise of the metric, not that of training: the same recipe with another seed may "
    "differ by more. Train each with two seeds or more before a small difference is believed. Of twenty differences "
    "that are nothing, one is beyond the noise by chance. Runs of unequal budgets are not made equal here."
)
BUDGET_NOTES = {
    "steps": "Steps are optimizer steps; those of different recipes cost differently.",
    "samples": "Samples are those of all stages together; one of a coarse stage costs less than one of a fine stage.",
    "flops": "FLOPs are those of the network's forward and backward passes.",
    "time": "Time is that of training alone: steps, waiting for data, fitting the bridges; not of evaluations.",
}


@dataclass(frozen=True)
class Table:
    """A title, a note, and rows of text."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def text(self) -> str:
        """For a terminal."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in (self.header, *self.rows))
        ]
        return "\n".join([self.title, *lines, *([self.note] if self.note else [])])

    def markdown(self) -> str:
        """For a Markdown page."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        body = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
        return f"## {self.title}\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


def si(value: float) -> str:
    """Three digits and a unit's prefix: 17.1 T."""
    if not value:
        return "0"
    power = min(max(int(math.log10(abs(value)) // 3), 0), 7)
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z'][power]}"


def amount(value: float | None, by: str) -> str:
    """A budget for people."""
    if value is None:
        return MISSING
    if by == "time":
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{hours} h {minutes:02} min"
        return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
    return f"{si(value)}FLOP" if by == "flops" else f"{round(value):,}"


def number(value: float | None) -> str:
    """A metric's value for people."""
    return MISSING if value is None else f"{value:.4g}"


# --- tables ----------------------------------------------------------------------------------------


def tables(records: Sequence[RunRecord], by: str, found: Sequence[Difference]) -> list[Table]:
    """All of a comparison."""
    return [
        runs_table(records),
        values_table(records),
        budget_table(records, by),
        *(reach_table(records, by, metric) for metric in compare.metrics_of(records) if is_headline(metric)),
        *([differences_table(found)] if found else []),
    ]


def is_headline(metric: str) -> bool:
    """Whether budgets to reach its best are listed."""
    return metric.partition("/")[2].startswith(HEADLINES) and bool(direction(metric))


def runs_table(records: Sequence[RunRecord]) -> Table:
    """What each run is and what it had used at its last evaluation."""
    rows = []
    for record in records:
        used = [amount(record.end(axis), axis) for axis in AXES]
        drawn = str(record.entries[-1].drawn) if record.entries else MISSING
        state = record.state if record.entries else f"{record.state}; no metrics: its recipe lacks the callback Metrics"
        rows.append([record.name, state, *used, drawn])
    note = (
        ""
        if len({record.entries[-1].drawn for record in records if record.entries}) < 2
        else ("The runs drew different numbers of images, on which distances depend: they can't be compared.")
    )
    return Table("Runs", ["run", "state", "steps", "samples", "operations", "time", "images drawn"], rows, note)


def values_table(records: Sequence[RunRecord]) -> Table:
    """Every metric at each run's last evaluation; the best of a row with a star."""
    rows = []
    for metric in compare.metrics_of(records):
        rows.append([_arrow(metric), *_starred([record.value(metric) for record in records], direction(metric))])
    note = "* the best. ↓ smaller is better, ↑ larger is better, · a check without a better." if rows else ""
    return Table("At each run's last evaluation", ["metric", *(record.name for record in records)], rows, note)


def budget_table(records: Sequence[RunRecord], by: str) -> Table:
    """Every metric with a better at the largest budget that all have used."""
    budget = compare.equal_budget(records, by)
    rows = []
    if budget is not None:
        for metric in filter(direction, compare.metrics_of(records)):
            values = [compare.value_at(record.curve(metric, by), budget) for record in records]
            rows.append([_arrow(metric), *_starred(values, direction(metric))])
    note = f"{BUDGET_NOTES[by]} Values between two evaluations are on the straight line between them."
    title = f"At equal {by}: {amount(budget, by)}"
    return Table(title, ["metric", *(record.name for record in records)], rows, note)


def reach_table(records: Sequence[RunRecord], by: str, metric: str) -> Table:
    """What each run (row) needed to be as good as each other's best (column), and as a share of what that one used."""
    curves = {record.name: record.curve(metric, by) for record in records}
    goals = {name: compare.best(curve, direction(metric)) for name, curve in curves.items()}
    header = [f"{name}'s best: {number(goal[1])} at {amount(goal[0], by)}" for name, goal in goals.items() if goal]
    rows = []
    for name, curve in curves.items():
        cells = []
        for of, goal in goals.items():
            if goal is None:
                continue
            x = compare.reached(curve, goal[1], direction(metric))
            if x is None:
                cells.append("not reached" if curve else MISSING)
            elif of == name:
                cells.append(amount(x, by))
            else:
                most = "≤ " if x == curve[0][0] else ""
                cells.append(f"{most}{amount(x, by)} ({most}{x / goal[0]:.2f} of it)")
        rows.append([name, *cells])
    note = "≤: already the first evaluation was as good."
    return Table(f"What it takes to reach another's best: {metric}, by {by}", ["run", *header], rows, note)


def differences_table(found: Sequence[Difference]) -> Table:
    """Which differences are more than the metric's noise."""
    rows = []
    metrics = list(dict.fromkeys(one.metric for one in found))
    for one in sorted(found, key=lambda one: metrics.index(one.metric)):
        verdict = "within the noise" if one.within_noise else f"{_better(one)} is better"
        rows.append([one.metric, f"{one.one} - {one.other}", f"{one.value:+.4g} ± {one.margin:.3g}", verdict])
    title = "Differences at the last evaluations"
    return Table(title, ["metric", "runs", "difference", "verdict"], rows, NOISE_NOTE)


def _better(one: Difference) -> str:
    return one.one if one.value * direction(one.metric) > 0 else one.other


def _arrow(metric: str) -> str:
    return f"{metric} {'·↑↓'[direction(metric)]}"


def _starred(values: Sequence[float | None], sign: int) -> list[str]:
    there = [value * sign for value in values if value is not None]
    starred = len(set(there)) > 1 and sign != 0
    return [number(v) + (" *" if starred and v is not None and v * sign == max(there) else "") for v in values]


# --- pictures --------------------------------------------------------------------------------------


def plots(records: Sequence[RunRecord], by: str, folder: Path) -> list[Path]:
    """A curve a run for each metric, PNG and SVG; the SVGs' paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    written = []
    for metric in compare.metrics_of(records):
        if metric.endswith("_of_real"):
            continue  # a constant
        figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
        for record, marker in zip(records, itertools.cycle("os^Dv*"), strict=False):
            if curve := record.curve(metric, by):
                axes.plot(*zip(*curve, strict=True), marker=marker, markersize=4, label=record.name)
        unit = {"time": "seconds of training", "flops": "FLOP"}.get(by, by)
        axes.set(xlabel=unit, ylabel=metric.partition("/")[2], title=_title(metric))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        name = metric.replace("/", "_")
        for suffix in (".png", ".svg"):
            figure.savefig(folder / f"{name}{suffix}", dpi=120)
        pyplot.close(figure)
        written.append(folder / f"{name}.svg")
    return written


def _title(metric: str) -> str:
    return metric + {-1: " (smaller is better)", 0: "", 1: " (larger is better)"}[direction(metric)]


def grid(records: Sequence[RunRecord]) -> Image.Image | None:
    """What the runs drew of the same prompts from the same noise, beside each other; None if nothing."""
    drawn = {
        record.name: dict(
            zip(
                zip(record.evaluation.captions, record.evaluation.seeds, strict=True),
                record.evaluation.images,
                strict=False,
            )
        )
        for record in records
        if record.evaluation is not None
    }
    drawn = {name: images for name, images in drawn.items() if images}
    if not drawn:
        return None
    first = next(iter(drawn.values()))
    shared = [key for key in first if all(key in images for images in drawn.values())]
    if not shared:
        return None
    columns = len(drawn) * max(1, COLUMNS // len(drawn))
    cells = [(name, key) for key in shared for name in drawn]
    images = [Image.fromarray(np.asarray(drawn[name][key])) for name, key in cells]
    return caption_grid(images, [key[0] for _, key in cells], columns, [name for name, _ in cells])


def tensorboard(records: Sequence[RunRecord], folder: Path) -> None:
    """Every metric along every axis, a folder a run, so that TensorBoard lays the runs over each other."""
    from torch.utils.tensorboard import SummaryWriter

    units = {
        "steps": ("steps", 1.0),
        "samples": ("samples", 1.0),
        "flops": ("gigaflops", 1e-9),
        "time": ("seconds", 1.0),
    }
    for record in records:
        target = folder / record.name.replace("/", "_")
        for old in target.glob("events.out.tfevents.*"):
            old.unlink()
        with SummaryWriter(str(target)) as writer:
            for metric in compare.metrics_of([record]):
                for by, (unit, scale) in units.items():
                    for x, y in record.curve(metric, by):
                        writer.add_scalar(f"{metric} by {unit}", y, round(x * scale))


# --- the page --------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom }
td.best { font-weight: 600; background: #eaf5ea }
p.note { color: #666; max-width: 60rem }
.plots { display: flex; flex-wrap: wrap; gap: 1rem }
.plots svg { width: 36rem; max-width: 100%; height: auto }
img { max-width: 100% }
"""


def page(title: str, shown: Sequence[Table], svgs: Sequence[Path], picture: Image.Image | None) -> str:
    """One HTML page that needs no other file."""
    parts = [f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"]
    parts += [f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"]
    parts += [_html_table(table) for table in shown]
    if svgs:
        parts += ["<h2>Curves</h2><div class='plots'>", *(_svg(path) for path in svgs), "</div>"]
    if picture is not None:
        parts += ["<h2>The same prompts from the same noise</h2>", _inline(picture)]
    return "\n".join([*parts, "</body></html>"])


def _html_table(table: Table) -> str:
    def cell(kind: str, text: str) -> str:
        best = " class='best'" if text.endswith(" *") else ""
        return f"<{kind}{best}>{html.escape(text.removesuffix(' *'))}</{kind}>"

    head = "".join(cell("th", text) for text in table.header)
    body = "\n".join(f"<tr>{''.join(cell('td', text) for text in row)}</tr>" for row in table.rows)
    note = f"<p class='note'>{html.escape(table.note)}</p>" if table.note else ""
    return f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{body}</table>{note}"


def _svg(path: Path) -> str:
    """The drawing alone, without the head of an XML file; its names made its own, since all share one page."""
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    for mark in ('id="', 'href="#', "url(#"):
        text = text.replace(mark, f"{mark}{path.stem}-")
    return text


def _inline(picture: Image.Image) -> str:
    buffer = BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"<img alt='drawn images' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def write(records: Sequence[RunRecord], by: str, output: Path, found: Sequence[Difference]) -> list[Table]:
    """Write all into ``output``: index.html, comparison.md, plots, grid.png and tensorboard/; the tables."""
    output.mkdir(parents=True, exist_ok=True)
    shown = tables(records, by, found)
    title = " · ".join(record.name for record in records)
    svgs, picture = plots(records, by, output), grid(records)
    if picture is not None:
        save_image(picture, output / "grid.png")
    tensorboard(records, output / "tensorboard")
    (output / "comparison.md").write_text(
        f"# {title}\n\n" + "\n".join(table.markdown() for table in shown), encoding="utf-8"
    )
    (output / "index.html").write_text(page(title, shown, svgs, picture), encoding="utf-8")
    return shown
