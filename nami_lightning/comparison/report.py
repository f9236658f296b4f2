"""A comparison as tables, for a terminal, for Markdown and for the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nami_lightning.comparison import compare
from nami_lightning.comparison.compare import AXES, HEADLINES, Difference, RunRecord, direction
from nami_lightning.comparison.seed_variance import groups, seed_differences
from nami_lightning.utils.text_table import table as aligned

MISSING = "—"
NOISE_NOTE = (
    "± is half of the 95% interval when the drawn and the held-out images of the last evaluations are resampled "
    "(bootstrap). It covers the noise of the metric, not that of training: the same recipe with another seed may "
    "differ by more. Train each with two seeds or more before a small difference is believed. Of twenty differences "
    "that are nothing, one is beyond the noise by chance. Precision's and recall's neighbourhoods are not resampled, "
    "so their ± is too small. On few images a Frechet distance favours models that draw alike pictures: see whether "
    "KID and MMD agree. Runs of unequal budgets are not made equal here."
)
SEEDS_NOTE = (
    "At the last step at which all seeds of a recipe were measured; ± is the standard deviation from seed to seed: "
    "training's own chance and the noise of the metric together. Of two or three seeds it is itself known only roughly."
)
SEED_DIFFERENCES_NOTE = (
    "If two recipes were equally good, every order of their seeds would be as likely: the last column is how often one "
    "would then lie all on one side of the other (one case in three with two seeds each, one in ten with three)."
)
METRICS_NOTE = (
    "A run is measured if its recipe says so:  trainer: {callbacks+: [{class_path: nami_lightning.callbacks.Metrics}]}"
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
        lines = aligned([self.header, *self.rows], "<" + ">" * (len(self.header) - 1))
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
    """All of a comparison; of runs that were never measured, what they are."""
    if not any(record.entries for record in records):
        return [runs_table(records)]
    return [
        runs_table(records),
        values_table(records),
        *seed_tables(records),
        budget_table(records, by),
        *(reach_table(records, by, metric) for metric in compare.metrics_of(records) if _tells(metric, found)),
        *([differences_table(records, found)] if found else []),
    ]


def _tells(metric: str, found: Sequence[Difference]) -> bool:
    """Whether budgets to reach its best are listed: not if all runs are within the noise of each other."""
    of_metric = [one for one in found if one.metric == metric]
    if of_metric and all(one.within_noise for one in of_metric):
        return False
    return metric.partition("/")[2].startswith(HEADLINES) and bool(direction(metric))


def runs_table(records: Sequence[RunRecord]) -> Table:
    """What each run is and what it had used at its last evaluation."""
    rows = []
    for record in records:
        used = [amount(record.end(axis), axis) for axis in AXES]
        drawn = str(record.entries[-1].drawn) if record.entries else MISSING
        state = record.state if record.entries else f"{record.state}; {_unmeasured(record)}"
        rows.append([record.name, state, *used, drawn])
    note = compare.comparable(records)
    if any(not record.entries and not _measures(record) for record in records):
        note = f"{note} {METRICS_NOTE}".strip()
    return Table("Runs", ["run", "state", "steps", "samples", "operations", "time", "images drawn"], rows, note)


def _unmeasured(record: RunRecord) -> str:
    """Why a run has no evaluation."""
    return "not measured yet" if _measures(record) else "its recipe lacks the callback Metrics"


def _measures(record: RunRecord) -> bool:
    return "callbacks.Metrics" in record.recipe


def values_table(records: Sequence[RunRecord]) -> Table:
    """Every metric at each run's last evaluation; the best of a row with a star."""
    rows = []
    for metric in compare.metrics_of(records):
        rows.append([_arrow(metric), *_starred([record.value(metric) for record in records], direction(metric))])
    note = "* the best. ↓ smaller is better, ↑ larger is better, · a check without a better." if rows else ""
    return Table("At each run's last evaluation", ["metric", *(record.name for record in records)], rows, note)


def seed_tables(records: Sequence[RunRecord]) -> list[Table]:
    """What each recipe's seeds gave on average, and which recipes differ by more than seeds do; none without seeds."""
    of_recipes = groups(records)
    if all(len(group.records) == 1 for group in of_recipes):
        return []
    metrics = [metric for metric in compare.metrics_of(records) if not metric.endswith("_of_real")]
    rows = [["at step", *(MISSING if group.step is None else f"{group.step:,}" for group in of_recipes)]]
    rows += [[_arrow(metric), *(_over_seeds(group.values(metric)) for group in of_recipes)] for metric in metrics]
    tables = [Table("Over seeds", ["metric", *(group.title for group in of_recipes)], rows, SEEDS_NOTE)]
    rows = []
    for one in seed_differences(records):
        verdict = f"every seed of {one.better} is better" if one.better else "the seeds overlap"
        by_chance = f"{one.chance:.0%}" if one.better else MISSING
        rows.append([one.metric, f"{one.one} - {one.other}", f"{one.value:+.4g}", verdict, by_chance])
    if rows:
        header = ["metric", "recipes", "difference of means", "verdict", "as likely by chance"]
        tables.append(Table("Differences over seeds", header, rows, SEED_DIFFERENCES_NOTE))
    return tables


def _over_seeds(values: Sequence[float]) -> str:
    if len(values) < 2:
        return number(values[0] if values else None)
    return f"{number(float(np.mean(values)))} ± {np.std(values, ddof=1):.2g}"


def budget_table(records: Sequence[RunRecord], by: str) -> Table:
    """Every metric with a better at the largest budget that all have used."""
    budget = compare.equal_budget(records, by)
    rows = []
    if budget is not None:
        for metric in filter(direction, compare.metrics_of(records)):
            values = [compare.value_at(record.curve(metric, by), budget) for record in records]
            rows.append([_arrow(metric), *_starred(values, direction(metric))])
    note = f"{BUDGET_NOTES[by]} Values between two evaluations are on the straight line between them, without a margin."
    if young := [record.name for record in records if (x := record.end(by)) is not None and budget and x < budget]:
        note += f" Too young to be among them: {', '.join(young)}."
    title = f"At equal {by}: {amount(budget, by)}"
    return Table(title, ["metric", *(record.name for record in records)], rows, note)


def reach_table(records: Sequence[RunRecord], by: str, metric: str) -> Table:
    """What each (row) needed to be as good as each other's best (column), and as a share of what that one used."""
    curves = {group.title: group.curve(metric, by) for group in groups(records)}
    goals = {name: compare.best(curve, direction(metric)) for name, curve in curves.items()}
    header = [
        f"{name}'s best: {number(goal[1])} at {'≤ ' * (goal[0] == curves[name][0][0])}{amount(goal[0], by)}"
        for name, goal in goals.items()
        if goal
    ]
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
    note = "≤: already the first evaluation was as good. Seeds of one recipe are averaged."
    return Table(f"What it takes to reach another's best: {metric}, by {by}", ["run", *header], rows, note)


def differences_table(records: Sequence[RunRecord], found: Sequence[Difference]) -> Table:
    """Which differences are more than the metric's noise."""
    rows = []
    metrics = list(dict.fromkeys(one.metric for one in found))
    withheld = "can't be compared" in compare.comparable(records)
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
    return [number(v) + (" *" if starred and v is not None and v * sign == max(there) else "") for v in values]
