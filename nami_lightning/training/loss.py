"""The loss of NAMI: one function for training and for validation, and the validation loss by stage and by tau."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from nami_lightning.models import flow
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.flow import TauKind
from nami_lightning.training import rng
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.frozen_encoders import EncodingModule

TAU_BINS = 4
"""Equal parts of [0, 1]."""


@dataclass(frozen=True)
class TauDistribution:
    """The distribution of the local time in training.

    Attributes:
        kind: ``logit_normal``, ``uniform``, or a ``mixture`` of both.
        mean: mean of the logit, one number a stage.
        std: standard deviation of the logit, one number a stage.
        uniform_share: share of the uniform part of a mixture.
    """

    kind: TauKind
    mean: list[float]
    std: list[float]
    uniform_share: float

    def sample(self, stage: int, random: rng.RandomNumbers, shift: float | None) -> Tensor:
        """Return tau ``(n,)`` of a stage's samples, moved towards noise by FLUX's ``mu`` if ``shift`` is that."""
        uniform = random.uniform[:, :2]
        tau = flow.sample_tau(self.kind, random.normal, uniform, self.mean[stage], self.std[stage], self.uniform_share)
        return tau if shift is None else flow.shift_tau(tau, shift)


@dataclass(frozen=True)
class FlowLoss:
    """The squared error of the velocity, of training and of validation.

    Attributes:
        bridge: the windows, and the start of each stage.
        tau_distribution: of the local time.
        patch_size: side of the square of latents that makes one token.
        local_velocity: measure the error in the stage's local time, as written in the paper: times the square of the
            window's duration.
    """

    bridge: BridgeFlow
    tau_distribution: TauDistribution
    patch_size: int
    local_velocity: bool

    def __call__(
        self,
        encoders: EncodingModule,
        transformer: nn.Module,
        micro: MicroBatch,
        seed_key: int | str,
        prompt_dropout: float = 0.0,
        reduction: Literal["mean", "none"] = "mean",
    ) -> tuple[Tensor, Tensor]:
        """Compare the velocity that a network predicts for a micro-batch with the true one (NAMI, section 3.2).

        Args:
            encoders: makes latents and text states; its seed is the run's.
            transformer: the trained network, or the averaged one.
            micro: n samples of one stage.
            seed_key: fixes all random numbers, with the run's seed and the samples' indices: the number of the global
                batch in training, a word in validation.
            prompt_dropout: probability that a sample is trained on the empty prompt.
            reduction: return the ``mean`` of the squared error, or all of it: ``none``.

        Returns:
            The squared error in float32, a number or ``(n, C, H, W)``; and tau ``(n,)``.
        """
        stage, window = micro.stage, self.bridge.windows[micro.stage]
        latents, coarse_latents = encoders.latents(micro, seed_key)
        random = rng.sample(encoders.seed, seed_key, micro.global_indices, latents.shape[1:], encoders.device)
        text = encoders.text_states(micro, drop=random.uniform[:, 2] < prompt_dropout)
        tau = self.tau_distribution.sample(stage, random, shift=self.bridge.time_shift(self.tokens(latents)))

        start, end = self.bridge.endpoints(stage, latents, coarse_latents, random.noise)
        x = flow.interpolate(start, end, tau)
        t = window.timestep(tau)

        velocity = transformer(x, text.sequence, text.pooled, t, stage).float()
        target = flow.velocity_target(start, end, window)
        loss = F.mse_loss(velocity, target, reduction=reduction)
        return (loss * window.duration**2 if self.local_velocity else loss), tau

    def tokens(self, latents: Tensor) -> int:
        """Return the number of image tokens of latents ``(n, C, H, W)``."""
        return latents.shape[-2] * latents.shape[-1] // self.patch_size**2


class LossByTau:
    """Sums of losses by stage and by bin of tau, added up over ranks at the end.

    Args:
        stages: K.
        device: where the losses are.
    """

    def __init__(self, stages: int, device: torch.device) -> None:
        self.sums = torch.zeros(2, stages, TAU_BINS, device=device)

    def add(self, stage: int, tau: Tensor, losses: Tensor) -> None:
        """Add the losses ``(n,)`` of a micro-batch at tau ``(n,)``."""
        bins = (tau * TAU_BINS).long().clamp(0, TAU_BINS - 1)
        self.sums[0, stage].index_add_(0, bins, losses.float())
        self.sums[1, stage].index_add_(0, bins, torch.ones_like(losses, dtype=torch.float))

    def means(self, strategy: Strategy) -> dict[str, Tensor]:
        """Return ``val/loss_stage1_tau_0.00-0.25`` and so on, over all ranks; a bin without a sample is left out."""
        sums, counts = strategy.reduce(self.sums, reduce_op="sum")
        return {
            f"val/loss_stage{stage + 1}_tau_{part / TAU_BINS:.2f}-{(part + 1) / TAU_BINS:.2f}": (
                sums[stage, part] / counts[stage, part]
            )
            for stage, part in (counts > 0).nonzero().tolist()
        }
