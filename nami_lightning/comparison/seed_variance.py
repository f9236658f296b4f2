"""Runs that differ in their seed alone: how much training's own chance moves a metric, and what is more than that."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from nami_lightning.comparison.compare import RunRecord, direction, metrics_of


@dataclass(frozen=True)
class Group:
    """The runs of one recipe, a seed each.

    Attributes:
        records: at least one.
    """

    records: list[RunRecord]

    @property
    def name(self) -> str:
        """The first run's."""
        return self.records[0].name

    @property
    def title(self) -> str:
        """The name, and how many runs there are."""
        return self.name + (f" ({len(self.records)} seeds)" if len(self.records) > 1 else "")

    def values(self, metric: str) -> list[float]:
        """Of each run at the last step at which all of them were measured."""
        points = [record.points(metric, "steps") for record in self.records]
        shared = set.intersection(*map(set, points))
        return [of_run[max(shared)][1] for of_run in points] if shared else []

    @property
    def step(self) -> int | None:
        """The last at which all runs were measured."""
        return max(set.intersection(*({e.step for e in record.entries} for record in self.records)), default=None)

    def curve(self, metric: str, by: str) -> list[tuple[float, float]]:
        """Means over the runs ``(x, value)``, at the steps where all of them were measured."""
        curves = [points for record in self.records if (points := record.points(metric, by))]
        shared = sorted(set.intersection(*map(set, curves))) if curves else []
        means = (np.mean([curve[step] for curve in curves], axis=0) for step in shared)
        return [(float(x), float(y)) for x, y in means]


def groups(records: Sequence[RunRecord]) -> list[Group]:
    """The measured runs by their recipes; two of the same seed aren't two samples of chance, and stand apart."""
    found: list[Group] = []
    for record in (record for record in records if record.entries):
        for group in found:
            if group.records[0].recipe == record.recipe and all(record.seed != one.seed for one in group.records):
                group.records.append(record)
                break
        else:
            found.append(Group([record]))
    return found


@dataclass(frozen=True)
class SeedDifference:
    """The last evaluations of two recipes in one metric.

    Attributes:
        metric: which.
        one: name of a group.
        other: name of another.
        value: the mean over one's seeds less that over the other's.
        better: the group all of whose seeds are better than all of the other's; None if they overlap.
        chance: how likely one of the two would be, if both recipes were equally good: with n and m seeds all orders
            are, and 2 of the (n + m choose n) have no overlap.
    """

    metric: str
    one: str
    other: str
    value: float
    better: str | None
    chance: float


def seed_differences(records: Sequence[RunRecord]) -> list[SeedDifference]:
    """Of every two recipes with two seeds or more, in every metric that has a better."""
    several = [group for group in groups(records) if len(group.records) > 1]
    found = []
    for metric in filter(direction, metrics_of(records)):
        for one, other in combinations(several, 2):
            mine, theirs = one.values(metric), other.values(metric)
            if min(len(mine), len(theirs)) < 2:
                continue
            signed, signed_other = (np.multiply(direction(metric), values) for values in (mine, theirs))
            better = one if min(signed) > max(signed_other) else other if min(signed_other) > max(signed) else None
            found.append(
                SeedDifference(
                    metric,
                    one.name,
                    other.name,
                    float(np.mean(mine) - np.mean(theirs)),
                    better.name if better else None,
                    2 / comb(len(mine) + len(theirs), len(mine)),
                )
            )
    return found
