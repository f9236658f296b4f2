"""The validation loss by stage and by bin of tau."""

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

TAU_BINS = 4
"""Equal parts of [0, 1]."""


class LossByTau:
    """Sums of losses by stage and bin of tau, added up over ranks at the end.

    Args:
        stages: K.
        device: where the losses are.
    """

    def __init__(self, stages: int, device: torch.device) -> None:
        self.sums = torch.zeros(2, stages, TAU_BINS, device=device)

    def add(self, stage: int, tau: Tensor, losses: Tensor) -> None:
        """One micro-batch: tau and losses ``(n,)``."""
        bins = (tau * TAU_BINS).long().clamp(0, TAU_BINS - 1)
        self.sums[0, stage].index_add_(0, bins, losses.float())
        self.sums[1, stage].index_add_(0, bins, torch.ones_like(losses, dtype=torch.float))

    def means(self, strategy: Strategy) -> dict[str, Tensor]:
        """``val/loss_stage1_tau_0.00-0.25`` and so on, over all ranks; a bin without a sample is left out."""
        sums, counts = strategy.reduce(self.sums, reduce_op="sum")
        return {
            f"val/loss_stage{stage + 1}_tau_{part / TAU_BINS:.2f}-{(part + 1) / TAU_BINS:.2f}": (
                sums[stage, part] / counts[stage, part]
            )
            for stage, part in (counts > 0).nonzero().tolist()
        }
