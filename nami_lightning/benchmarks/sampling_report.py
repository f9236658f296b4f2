"""What the benchmark of sampling has measured, as tables, CSV and a plot; the paper's figures stand beside it."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from nami_lightning.utils.atomic_write import replacing
from nami_lightning.utils.image_grid import save_figure
from nami_lightning.utils.text_table import table

FLUX_BASE = "FLUX-base"
PAPER = " (paper)"
"""The end of a model's name whose figures are the paper's."""

NOTE = (
    "less: than FLUX-base. TFLOP: of the network, by formula. overhead: the call's time outside the network's forward\n"
    "passes, as a share of the time in them."
)
PAPER_NOTE = (
    "The paper's figures are NAMI-2B's on an A100 of 80 GB, 10 steps a stage, 1 image (Table 2). Its flow-only is\n"
    "Figure 26's 53.01% less."
)


@dataclass(frozen=True)
class Measurement:
    """What one model takes to sample at one resolution.

    Attributes:
        model: its name.
        side: of the finest stage, in px.
        steps: of each stage, coarsest first.
        images: at once.
        stages: seconds of each stage, its bridge included; empty if they are not known.
        seconds: of the call without encoders.
        overhead: the call's time outside the network's forward passes, as a share of the time in them.
        operations: of the network.
        encoding: seconds to encode the prompts; None if it was not measured.
        decoding: seconds to decode the latents; likewise.
    """

    model: str
    side: int
    steps: list[int]
    images: int
    stages: list[float]
    seconds: float
    overhead: float | None = None
    operations: int | None = None
    encoding: float | None = None
    decoding: float | None = None

    @property
    def with_encoders(self) -> float | None:
        """The seconds with those of the encoders; None if these were not measured."""
        if self.encoding is None or self.decoding is None:
            return None
        return self.seconds + self.encoding + self.decoding


PAPER_FIGURES = [
    Measurement("NAMI" + PAPER, 1024, [10, 10, 10], 1, [0.27, 0.45, 2.21], 2.98),
    Measurement("flow-only" + PAPER, 1024, [10, 10, 10], 1, [], 8.47 * (1 - 0.5301)),
    Measurement(FLUX_BASE + PAPER, 1024, [30], 1, [8.47], 8.47),
]
"""Seconds of NAMI-2B and FLUX-base-2B on an A100: Table 2 and Figure 26."""


def with_paper(measured: Sequence[Measurement]) -> list[Measurement]:
    """Return measurements, by resolution, with the paper's after those of three stages of 256, 512 and 1024 px."""
    found = []
    for side, of_side in groupby(measured, lambda one: one.side):
        these = list(of_side)
        comparable = side == PAPER_FIGURES[0].side and any(len(one.steps) == 3 for one in these)
        found += these + (PAPER_FIGURES if comparable else [])
    return found


def less_than_flux_base(one: Measurement, measured: Sequence[Measurement], quantity: str) -> float | None:
    """Return by which share a model's quantity is less than FLUX-base's at the same resolution; None if unknown.

    Args:
        one: the model's.
        measured: all; the paper's models are compared with the paper's FLUX-base.
        quantity: ``seconds``, ``operations`` or ``with_encoders``.
    """
    name = FLUX_BASE + (PAPER if one.model.endswith(PAPER) else "")
    base = next(getattr(other, quantity) for other in measured if (other.model, other.side) == (name, one.side))
    value = getattr(one, quantity)
    return None if value is None or base is None else 1 - value / base


def render_tables(measured: Sequence[Measurement]) -> list[str]:
    """Return a table for each resolution, and a note on what its columns mean."""
    tables = []
    encoders = any(one.with_encoders is not None for one in measured)
    for side, of_side in groupby(measured, lambda one: one.side):
        these = list(of_side)
        stages = max(len(one.steps) for one in these)
        sides = [f"{side >> stages - 1 - stage} px" for stage in range(stages)]
        header = ["model", *sides, "seconds", "less", "TFLOP", "less", "overhead"]
        header += ["prompts", "decoding", "all seconds", "less"] * encoders
        rows = []
        for one in these:
            known = [_number(seconds) for seconds in one.stages]
            row = [one.model, *["-"] * (stages - len(known)), *known, _number(one.seconds)]
            row += [_percent(less_than_flux_base(one, these, "seconds")), _tera(one.operations)]
            row += [_percent(less_than_flux_base(one, these, "operations")), _percent(one.overhead)]
            if encoders:
                row += [_number(value) for value in (one.encoding, one.decoding, one.with_encoders)]
                row += [_percent(less_than_flux_base(one, these, "with_encoders"))]
            rows.append(row)
        tables.append("\n".join(table([header, *rows], "<" + ">" * (len(header) - 1))))
    paper = [PAPER_NOTE] * any(one.model.endswith(PAPER) for one in measured)
    return [*tables, "\n".join([NOTE, *paper])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _tera(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e12:.3g}"


def write_csv(measured: Sequence[Measurement], path: Path) -> None:
    """Write a row for each resolution and model; an empty cell is unknown. Shares are between 0 and 1."""
    stages = max(len(one.stages) for one in measured)
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        rows = [_csv_row(one, measured, stages) for one in measured]
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _csv_row(one: Measurement, measured: Sequence[Measurement], stages: int) -> dict[str, Any]:
    known = [None] * (stages - len(one.stages)) + one.stages
    return {
        "resolution": one.side,
        "model": one.model,
        "steps": "+".join(map(str, one.steps)),
        "images": one.images,
        **{f"seconds_stage{number}": seconds for number, seconds in enumerate(known, 1)},
        "seconds": one.seconds,
        "less_seconds": less_than_flux_base(one, measured, "seconds"),
        "operations": one.operations,
        "less_operations": less_than_flux_base(one, measured, "operations"),
        "overhead": one.overhead,
        "seconds_prompts": one.encoding,
        "seconds_decoding": one.decoding,
        "seconds_with_encoders": one.with_encoders,
        "less_with_encoders": less_than_flux_base(one, measured, "with_encoders"),
    }


def write_plot(measured: Sequence[Measurement], stem: Path) -> Path:
    """Plot the seconds by resolution (Figure 2) and what is saved (Figure 26) as PNG and SVG; return the SVG's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours = [one for one in measured if not one.model.endswith(PAPER)]
    sides = list(dict.fromkeys(one.side for one in ours))
    names = list(dict.fromkeys(one.model for one in ours))
    figure, (seconds, saved) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for number, name in enumerate(names):
        bars = seconds.bar(
            [index + (number - (len(names) - 1) / 2) * 0.27 for index in range(len(sides))],
            [one.seconds for one in ours if one.model == name],
            0.25,
            label=name,
            color=f"C{number}",
        )
        seconds.bar_label(bars, fmt="%.3g", fontsize=8)
    seconds.set(yscale="log", ylabel="seconds a call", title="Time by resolution (smaller is better)")
    for formatted in (seconds.yaxis.set_major_formatter, seconds.yaxis.set_minor_formatter):
        formatted("{x:g}")  # not as powers of ten
    _plot_savings(saved, measured, sides)
    for axes in (seconds, saved):
        axes.set_xticks(range(len(sides)), [f"{side} px" for side in sides])
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)
    path = save_figure(figure, stem)
    pyplot.close(figure)
    return path


def _plot_savings(axes: Any, measured: Sequence[Measurement], sides: Sequence[int]) -> None:
    """Plot by how much each model takes less than FLUX-base: in seconds, in operations, and in the paper."""
    quantities = {"seconds": "seconds", "operations": "operations", "with_encoders": "seconds with the encoders"}
    shown = [key for key in quantities if any(getattr(one, key) is not None for one in measured)]
    groups = ("NAMI", "flow-only")
    width = 0.8 / (len(groups) * len(shown))
    for number, (name, key) in enumerate((name, key) for name in groups for key in shown):
        places = [index - 0.4 + (number + 0.5) * width for index in range(len(sides))]
        values = [less_than_flux_base(one, measured, key) or 0.0 for one in measured if one.model == name]
        style = {"color": f"C{groups.index(name)}", "alpha": 1.0 - 0.35 * shown.index(key)}
        axes.bar(places, [100 * value for value in values], 0.92 * width, label=f"{name}, {quantities[key]}", **style)
    for one in measured:
        if one.model.removesuffix(PAPER) in groups and one.model.endswith(PAPER):
            value = 100 * (less_than_flux_base(one, measured, "seconds") or 0.0)
            left = sides.index(one.side) - 0.4 + 0.4 * groups.index(one.model.removesuffix(PAPER))
            label = "the paper, seconds" if one.model.startswith(groups[0]) else None
            axes.plot([left, left + 0.4], [value, value], color="black", linestyle="--", label=label)
    axes.set(ylabel="% less than FLUX-base", title="What is saved (larger is better)")
