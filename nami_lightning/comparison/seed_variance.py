"""Groups runs that differ only by their seed: how much the randomness of training moves a metric."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from nami_lightning.comparison.compare import RunRecord, direction, metric_names


@dataclass(frozen=True)
class SeedGroup:
    """The runs of one recipe with different seeds.

    Attributes:
        records: records of at least one run.
    """

    records: list[RunRecord]

    @property
    def name(self) -> str:
        """Name of the first run."""
        return self.records[0].name

    @property
    def title(self) -> str:
        """Name of the first run, and the number of runs if there are several."""
        return self.name + (f" ({len(self.records)} seeds)" if len(self.records) > 1 else "")

    def values(self, metric: str) -> list[float]:
        """Return a metric's value of each run, at the last step at which all of them were measured."""
        points = [record.points(metric, "steps") for record in self.records]
        shared = set.intersection(*map(set, points))
        return [of_run[max(shared)][1] for of_run in points] if shared else []

    @property
    def step(self) -> int | None:
        """Last step at which all runs were measured; None if there is none."""
        return max(set.intersection(*({e.step for e in record.entries} for record in self.records)), default=None)

    def curve(self, metric: str, by: str) -> list[tuple[float, float]]:
        """Return the means over the runs, ``(x, value)``, at the steps at which all of them were measured."""
        curves = [points for record in self.records if (points := record.points(metric, by))]
        shared = sorted(set.intersection(*map(set, curves))) if curves else []
        means = (np.mean([curve[step] for curve in curves], axis=0) for step in shared)
        return [(float(x), float(y)) for x, y in means]


def group_by_recipe(records: Sequence[RunRecord]) -> list[SeedGroup]:
    """Return the measured runs grouped by recipe.

    Two runs with the same seed aren't independent samples, so they are in different groups.
    """
    found: list[SeedGroup] = []
    for record in (record for record in records if record.entries):
        for group in found:
            if group.records[0].recipe == record.recipe and all(record.seed != one.seed for one in group.records):
                group.records.append(record)
                break
        else:
            found.append(SeedGroup([record]))
    return found


@dataclass(frozen=True)
class SeedDifference:
    """The difference of two recipes in one metric, over seeds.

    Attributes:
        metric: name of the metric.
        one: name of a group.
        other: name of another group.
        value: mean over the seeds of ``one`` minus mean over those of ``other``.
        better: name of the group whose seeds are all better than all of the other's; None if they overlap.
        probability: probability that the two don't overlap if both recipes are equally good: 2 of (n + m choose n)
            orders, for n and m seeds.
    """

    metric: str
    one: str
    other: str
    value: float
    better: str | None
    probability: float


def seed_differences(records: Sequence[RunRecord]) -> list[SeedDifference]:
    """Return the differences of every two recipes with several seeds, in every metric with a better direction."""
    several = [group for group in group_by_recipe(records) if len(group.records) > 1]
    found = []
    for metric in filter(direction, metric_names(records)):
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
