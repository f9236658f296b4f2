"""The plots of a comparison, a grid of images of the same prompts, and TensorBoard events."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nami_lightning.comparison import compare
from nami_lightning.comparison.compare import RunRecord, direction
from nami_lightning.comparison.seed_variance import group_by_recipe
from nami_lightning.utils.image_grid import caption_grid, save_figure

UNITS = {"time": "seconds of training", "flops": "FLOP"}
"""What stands below the x-axis, by budget; the others' names are their units."""

COLUMNS = 8
"""Approximate number of columns of the grid; the images of one prompt are always in the same row."""


def write_plots(records: Sequence[RunRecord], by: str, folder: Path) -> list[Path]:
    """Plot each metric with a curve per run, as PNG and SVG, and return the SVGs' paths.

    The seeds of one recipe have the same colour.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    written = []
    for metric in compare.metric_names(records):
        if metric.endswith("_of_real"):
            continue  # it is a constant
        figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
        for number, (group, marker) in enumerate(
            zip(group_by_recipe(records), itertools.cycle("os^Dv*"), strict=False)
        ):
            label: str | None = group.title
            for record, line in zip(group.records, itertools.cycle(("-", "--", ":")), strict=False):
                if curve := record.curve(metric, by):
                    style: dict[str, Any] = {"linestyle": line, "marker": marker, "markersize": 4}
                    axes.plot(*zip(*curve, strict=True), label=label, color=f"C{number % 10}", **style)
                    label = None  # all seeds share one entry of the legend
        real = [entry.metrics.get(f"{metric}_of_real") for record in records for entry in record.entries]
        if (floor := next((value for value in real if value is not None), None)) is not None:
            axes.axhline(floor, color="0.5", linestyle=":", label="real images")
        axes.set(xlabel=UNITS.get(by, by), ylabel=metric.partition("/")[2], title=_title(metric))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        name = metric.replace("/", "_")
        written.append(save_figure(figure, folder / name))
        pyplot.close(figure)
    return written


def write_loss_plots(records: Sequence[RunRecord], by: str, folder: Path) -> list[Path]:
    """Plot each validation loss with a curve per run, as PNG and SVG, and return the SVGs' paths.

    The steps are on the x-axis if a run with this loss was never measured, because its other budgets are not known.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    written = []
    for name in dict.fromkeys(name for record in records for name in record.losses):
        figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
        known = all(record.loss_curve(name, by) for record in records if record.losses.get(name))
        axis = by if known else "steps"
        for number, record in enumerate(records):
            if curve := record.loss_curve(name, axis):
                axes.plot(*zip(*curve, strict=True), label=record.name, color=f"C{number % 10}", marker=".")
        unit = UNITS.get(axis, axis) + ("" if known else f" (the {by} of some runs are not known)")
        axes.set(xlabel=unit, ylabel=name.partition("/")[2], title=f"{name} (does not rank runs)")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3)
        axes.legend()
        written.append(save_figure(figure, folder / name.replace("/", "_")))
        pyplot.close(figure)
    return written


def _title(metric: str) -> str:
    return metric + {-1: " (smaller is better)", 0: "", 1: " (larger is better)"}[direction(metric)]


def image_grid(records: Sequence[RunRecord]) -> Image.Image | None:
    """Return a grid of the images that all runs generated of the same prompts from the same noise; None without any."""
    generated = {
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
    generated = {name: images for name, images in generated.items() if images}
    if not generated:
        return None
    first = next(iter(generated.values()))
    shared = [key for key in first if all(key in images for images in generated.values())]
    if not shared:
        return None
    columns = len(generated) * max(1, COLUMNS // len(generated))
    cells = [(name, key) for key in shared for name in generated]
    images = [Image.fromarray(np.asarray(generated[name][key])) for name, key in cells]
    return caption_grid(images, [key[0] for _, key in cells], columns, [name for name, _ in cells])


def write_tensorboard(records: Sequence[RunRecord], folder: Path) -> None:
    """Write every metric along every axis, in one folder per run, so that TensorBoard shows the runs in one plot."""
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
            for metric in compare.metric_names([record]):
                for by, (unit, scale) in units.items():
                    for x, y in record.curve(metric, by):
                        writer.add_scalar(f"{metric} by {unit}", y, round(x * scale))
