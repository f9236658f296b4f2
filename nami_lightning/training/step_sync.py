"""Agreement of the ranks in every step, before the optimizer moves: whether to skip it, and whether to stop.

A step with a loss or gradient that isn't finite, on any rank, is skipped by all: weights, optimizer and EMA stay as
they are, its batch counts as consumed. All ranks decide on the same numbers, those of the one small all-reduce that the
losses need anyway; the gradient's norm is that of clipping. The decision is the host's, so a step waits for its device
once, where its gradients are ready: only some (fused) optimizers could be told on the device to leave their state
alone. Workers read ahead meanwhile, and only the few launches of the optimizer's own kernels are not queued in advance.
What is logged comes to the host with the same numbers. (DDP waits once more in a step that leaves a parameter without a
gradient on this rank: it asks whether another rank has one.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from nami_lightning.training.batch import MicroBatch
from nami_lightning.utils.collectives import gather_objects

NAMED = 8
"""Sample ids that a message names, at most, for each rank."""


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after they agreed; the same on each.

    Attributes:
        losses: ``(K,)`` mean over the ranks of each stage's loss, on the device.
        stage_losses: the same K numbers on the host.
        figures: means over the ranks of other numbers, on the host, by their names.
        norm: of the gradient of all ranks.
        finite: whether all losses and the norm are finite.
        stop: whether any rank was asked to stop.
    """

    losses: Tensor
    stage_losses: list[float]
    figures: dict[str, float]
    norm: float
    finite: bool
    stop: bool


def agree(strategy: Strategy, losses: Tensor, figures: Mapping[str, Tensor], norm: Tensor, stop: bool) -> Agreement:
    """Agree on a step: one small all-reduce, and one wait for the device, which brings all that is logged to the host.

    Args:
        strategy: Lightning's, which reduces.
        losses: ``(K,)`` of this rank.
        figures: numbers of this rank that are to be logged, by their names.
        norm: of the whole gradient.
        stop: whether this rank was asked to stop.
    """
    numbers = [number.reshape(1).to(losses) for number in (*figures.values(), norm)]
    mine = torch.cat([losses, *numbers, losses.new_full((1,), float(stop))])
    agreed = strategy.reduce(mine, reduce_op="mean")
    *values, ranks_told = agreed.tolist()
    stages = len(losses)
    named = dict(zip(figures, values[stages:-1], strict=True))
    finite = all(map(math.isfinite, values))
    return Agreement(agreed[:stages], values[:stages], named, values[-1], finite, ranks_told > 0)


@dataclass
class SkippedSteps:
    """Counts the steps that were skipped, and ends a run that does nothing else.

    Args:
        total: so far.
        in_row: without a good step since.
    """

    total: int = 0
    in_row: int = 0

    def add(self, step: int, micro_batches: list[MicroBatch], losses: list[Tensor]) -> None:
        """Count a skipped step and name its samples; all ranks take part.

        Args:
            step: its number.
            micro_batches: this rank's.
            losses: the loss of each.
        """
        self.total += 1
        self.in_row += 1
        ranks = gather_objects(suspects(micro_batches, losses))
        samples = "; ".join(f"rank {rank}, {text}" for rank, text in enumerate(ranks) if text)
        cause = f"the loss of {samples}" if samples else f"the gradient, of {names(micro_batches)} and those beside"
        rank_zero_info(f"Step {step} is skipped: {cause} is not finite ({self.in_row} in a row, {self.total} in all).")

    def check(self, step: int, limit: int) -> None:
        """Refuse to go on after ``limit`` skipped steps in a row, of which ``step`` was the last.

        Raises:
            RuntimeError: on all ranks at once.
        """
        if self.in_row >= limit:
            raise RuntimeError(
                f"steps {step - self.in_row + 1} to {step} had a loss or gradient that is not finite: stopped after "
                f"model.max_skipped_steps = {limit} in a row. The newest checkpoint is from before them. Look at the "
                "samples named above, lower the learning rate, or compute in a wider dtype"
            )


def suspects(micro_batches: list[MicroBatch], losses: list[Tensor]) -> str:
    """Name the samples of the micro-batches whose loss isn't finite; empty if all are finite."""
    finite = torch.stack(losses).isfinite().tolist()
    return names([micro for micro, good in zip(micro_batches, finite, strict=True) if not good])


def names(micro_batches: list[MicroBatch]) -> str:
    """Name the first few samples: ``a (stage 2), b (stage 2)``."""
    rows = [(micro.stage, name) for micro in micro_batches for name in micro.ids]
    shown = ", ".join(f"{name} (stage {stage + 1})" for stage, name in rows[:NAMED])
    return shown + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")


def require_same_start(values: dict[str, Any]) -> None:
    """Refuse to train if the ranks start from different things; all ranks take part.

    Args:
        values: what must be the same on all ranks, by a name for people.

    Raises:
        RuntimeError: on all ranks at once, naming the first thing in which they differ.
    """
    ranks = gather_objects(values)
    for name in values:
        found = [rank.get(name) for rank in ranks]
        if other := next((number for number, value in enumerate(found) if value != found[0]), None):
            raise RuntimeError(
                f"the ranks don't start from the same {name}: rank 0 has {found[0]}, rank {other} has {found[other]}. "
                "Start all ranks again, with one command and one data set"
            )
