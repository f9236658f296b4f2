"""A comparison as tables: for a terminal, for Markdown and for the HTML page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nami_lightning.comparison import compare
from nami_lightning.comparison.compare import AXES, HEADLINE_METRICS, Difference, RunRecord, direction
from nami_lightning.comparison.recipe_differences import differing_keys
from nami_lightning.comparison.seed_variance import group_by_recipe, seed_differences
from nami_lightning.utils.text_table import markdown_table
from nami_lightning.utils.text_table import table as aligned

MISSING = "—"
NOISE_NOTE = (
    "± is half of the 95% interval when the generated and the held-out images of the last evaluations are resampled "
    "(bootstrap). It covers the noise of the metric, not that of training: the same recipe with another seed may "
    "differ by more. Before you believe a small difference, train each recipe with at least two seeds. If there is no "
    "real difference, one of twenty is still beyond the noise by chance. The neighbourhoods of precision and recall "
    "are not resampled, so their ± is too small. With few images, a Frechet distance favours models whose images are "
    "alike: check that KID and MMD agree. This table does not correct for different budgets."
)
SEEDS_NOTE = (
    "Values at the last step at which all seeds of a recipe were measured; ± is the standard deviation over seeds: the "
    "randomness of training and the noise of the metric together. With two or three seeds it is only a rough estimate."
)
SEED_DIFFERENCES_NOTE = (
    "If two recipes were equally good, every order of their seeds would be equally likely. The last column is the "
    "probability that all seeds of one are then better than all of the other (1/3 for two seeds each, 1/10 for three)."
)
LOSSES_NOTE = (
    "A loss tells whether a run goes on learning. It does not rank runs: with another bridge, other windows or another "
    "distribution of times it measures something else, and a lower loss can go with worse images. Rank by the metrics."
)
LONGEST_CELL = 60
"""Largest number of letters of a recipe's value in a table."""

METRICS_NOTE = (
    "To measure a run, add this to its recipe:  trainer: {callbacks+: [{class_path: nami_lightning.callbacks.Metrics}]}"
)
BUDGET_NOTES = {
    "steps": "Steps are optimizer steps; the cost of a step differs between recipes.",
    "samples": "Samples are counted over all stages; a sample of a coarse stage costs less than one of a fine stage.",
    "flops": "FLOPs count the network's forward and backward passes.",
    "time": "Time is the time of training alone: steps, waiting for data, fitting the bridges, but no evaluations.",
}


@dataclass(frozen=True)
class Table:
    """A table of text with a title and a note."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def text(self) -> str:
        """Return the table as text for a terminal."""
        lines = aligned([self.header, *self.rows], "<" + ">" * (len(self.header) - 1))
        return "\n".join([self.title, *lines, *([self.note] if self.note else [])])

    def markdown(self) -> str:
        """Return the table as Markdown."""
        body = markdown_table(self.header, self.rows)
        return f"## {self.title}\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


def format_si(value: float) -> str:
    """Return a number with three digits and an SI prefix: ``17.1 T`` for example."""
    if not value:
        return "0"
    power = min(max(int(math.log10(abs(value)) // 3), 0), 7)
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z'][power]}"


def format_budget(value: float | None, by: str) -> str:
    """Return a budget as text."""
    if value is None:
        return MISSING
    if by == "time":
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{hours} h {minutes:02} min"
        return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
    return f"{format_si(value)}FLOP" if by == "flops" else f"{round(value):,}"


def format_value(value: float | None) -> str:
    """Return the value of a metric as text."""
    return MISSING if value is None else f"{value:.4g}"


# --- tables ----------------------------------------------------------------------------------------


def make_tables(records: Sequence[RunRecord], by: str, found: Sequence[Difference]) -> list[Table]:
    """Return all tables of a comparison; without those of metrics if no run was ever measured."""
    of_metrics = [
        values_table(records),
        *seed_tables(records),
        budget_table(records, by),
        *(
            reach_table(records, by, metric)
            for metric in compare.metric_names(records)
            if _shows_budgets(metric, found)
        ),
        *([differences_table(records, found)] if found else []),
    ]
    return [
        runs_table(records),
        *(of_metrics if any(record.entries for record in records) else []),
        *([losses_table(records)] if any(record.losses for record in records) else []),
        *([recipes_table(records)] if len(records) > 1 else []),
    ]


def _shows_budgets(metric: str, found: Sequence[Difference]) -> bool:
    """Tell whether a table lists what it takes to reach a metric's best value.

    It doesn't if all runs are within the noise of each other.
    """
    of_metric = [one for one in found if one.metric == metric]
    if of_metric and all(one.within_noise for one in of_metric):
        return False
    return metric.partition("/")[2].startswith(HEADLINE_METRICS) and bool(direction(metric))


def runs_table(records: Sequence[RunRecord]) -> Table:
    """Return a table of what each run is, and the budgets that it had used at its last evaluation."""
    rows = []
    for record in records:
        used = [format_budget(record.budget_used(axis), axis) for axis in AXES]
        drawn = str(record.entries[-1].drawn) if record.entries else MISSING
        state = record.state if record.entries else f"{record.state}; {_unmeasured(record)}"
        rows.append([record.name, state, *used, drawn])
    note = compare.comparability_warning(records)
    if any(not record.entries and not _measures(record) for record in records):
        note = f"{note} {METRICS_NOTE}".strip()
    return Table("Runs", ["run", "state", "steps", "samples", "operations", "time", "images generated"], rows, note)


def _unmeasured(record: RunRecord) -> str:
    """Return why a run has no evaluation."""
    return "not measured yet" if _measures(record) else "its recipe lacks the callback Metrics"


def _measures(record: RunRecord) -> bool:
    return "callbacks.Metrics" in record.recipe


def values_table(records: Sequence[RunRecord]) -> Table:
    """Return a table of every metric at each run's last evaluation; the best value of a row has a star."""
    rows = []
    for metric in compare.metric_names(records):
        rows.append([_arrow(metric), *_starred([record.value(metric) for record in records], direction(metric))])
    note = "* the best. ↓ smaller is better, ↑ larger is better, · neither is better: a check." if rows else ""
    return Table("At each run's last evaluation", ["metric", *(record.name for record in records)], rows, note)


def losses_table(records: Sequence[RunRecord]) -> Table:
    """Return a table of each run's last validation losses, which are in its TensorBoard events."""
    names = list(dict.fromkeys(name for record in records for name in record.losses))
    rows = []
    for name in names:
        last = [record.losses[name][-1] if name in record.losses else None for record in records]
        rows.append([name, *(MISSING if one is None else f"{format_value(one[1])} (step {one[0]:,})" for one in last)])
    return Table("Last validation losses", ["loss", *(record.name for record in records)], rows, LOSSES_NOTE)


def recipes_table(records: Sequence[RunRecord]) -> Table:
    """Return a table of the recipe keys in which the runs differ."""
    rows = [[key, *map(_short, values)] for key, values in differing_keys(records).items()]
    note = "Keys that don't change what is trained (name, folders, devices, loggers) are left out."
    if not rows:
        note = f"The recipes are the same. {note}"
    return Table("In what the recipes differ", ["key", *(record.name for record in records)], rows, note)


def _short(value: object) -> str:
    text = MISSING if value is None else str(value)
    return text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 4]} ..."


def seed_tables(records: Sequence[RunRecord]) -> list[Table]:
    """Return tables of each recipe's mean over seeds, and of the differences between recipes; none without seeds."""
    of_recipes = group_by_recipe(records)
    if all(len(group.records) == 1 for group in of_recipes):
        return []
    metrics = [metric for metric in compare.metric_names(records) if not metric.endswith("_of_real")]
    rows = [["at step", *(MISSING if group.step is None else f"{group.step:,}" for group in of_recipes)]]
    rows += [[_arrow(metric), *(_over_seeds(group.values(metric)) for group in of_recipes)] for metric in metrics]
    tables = [Table("Over seeds", ["metric", *(group.title for group in of_recipes)], rows, SEEDS_NOTE)]
    rows = []
    for one in seed_differences(records):
        verdict = f"every seed of {one.better} is better" if one.better else "the seeds overlap"
        by_chance = f"{one.probability:.0%}" if one.better else MISSING
        rows.append([one.metric, f"{one.one} - {one.other}", f"{one.value:+.4g}", verdict, by_chance])
    if rows:
        header = ["metric", "recipes", "difference of means", "verdict", "probability by chance"]
        tables.append(Table("Differences over seeds", header, rows, SEED_DIFFERENCES_NOTE))
    return tables


def _over_seeds(values: Sequence[float]) -> str:
    if len(values) < 2:
        return format_value(values[0] if values else None)
    return f"{format_value(float(np.mean(values)))} ± {np.std(values, ddof=1):.2g}"


def budget_table(records: Sequence[RunRecord], by: str) -> Table:
    """Return a table of the metrics at the largest budget that all runs have used."""
    budget = compare.equal_budget(records, by)
    rows = []
    if budget is not None:
        for metric in filter(direction, compare.metric_names(records)):
            values = [compare.value_at(record.curve(metric, by), budget) for record in records]
            rows.append([_arrow(metric), *_starred(values, direction(metric))])
    note = f"{BUDGET_NOTES[by]} Values between two evaluations are interpolated linearly, without a margin."
    if shorter := [
        record.name for record in records if (x := record.budget_used(by)) is not None and budget and x < budget
    ]:
        note += f" Left out, because their budget is smaller: {', '.join(shorter)}."
    title = f"At equal {by}: {format_budget(budget, by)}"
    return Table(title, ["metric", *(record.name for record in records)], rows, note)


def reach_table(records: Sequence[RunRecord], by: str, metric: str) -> Table:
    """Return a table of the budget that each run (row) needed to reach each other's best value (column).

    The share is the quotient to the budget that the other run needed itself.
    """
    curves = {group.title: group.curve(metric, by) for group in group_by_recipe(records)}
    goals = {name: compare.best_point(curve, direction(metric)) for name, curve in curves.items()}
    header = [
        f"{name}'s best: {format_value(goal[1])} at "
        f"{'≤ ' * (goal[0] == curves[name][0][0])}{format_budget(goal[0], by)}"
        for name, goal in goals.items()
        if goal
    ]
    rows = []
    for name, curve in curves.items():
        cells = []
        for of, goal in goals.items():
            if goal is None:
                continue
            x = compare.budget_to_reach(curve, goal[1], direction(metric))
            if x is None:
                cells.append("not reached" if curve else MISSING)
            elif of == name:
                cells.append(format_budget(x, by))
            else:
                most = "≤ " if x == curve[0][0] else ""
                cells.append(f"{most}{format_budget(x, by)} ({most}{x / goal[0]:.2f} of it)")
        rows.append([name, *cells])
    note = "≤: the first evaluation was already as good. Seeds of one recipe are averaged."
    return Table(f"What it takes to reach another's best: {metric}, by {by}", ["run", *header], rows, note)


def differences_table(records: Sequence[RunRecord], found: Sequence[Difference]) -> Table:
    """Return a table of the differences between runs, and whether they are more than the metric's noise."""
    rows = []
    metrics = list(dict.fromkeys(one.metric for one in found))
    withheld = "can't be compared" in compare.comparability_warning(records)
    for one in sorted(found, key=lambda one: metrics.index(one.metric)):
        verdict = "within the noise" if one.within_noise else f"{_better(one)} is better"
        if withheld:
            verdict = "not comparable"
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
    return [format_value(v) + (" *" if starred and v is not None and v * sign == max(there) else "") for v in values]
