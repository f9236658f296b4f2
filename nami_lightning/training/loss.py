"""The loss of NAMI: one function for training and for validation, and the validation loss by stage and by tau."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.training import rng
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.frozen_encoders import EncodingModule
from nami_lightning.training.parallel.token_groups import TokenGroup
from nami_lightning.training.paths.straight import Path
from nami_lightning.training.techniques.technique import ForwardPass, Technique


class FlowError(NamedTuple):
    """How far a network's velocity is off.

    Attributes:
        loss: the squared error in float32: a number, or ``(n, C, H, W)``.
        tau: the local times ``(n,)``.
        added: what techniques add to the loss, by their names.
    """

    loss: Tensor
    tau: Tensor
    added: dict[str, Tensor]


TAU_BINS = 4
"""Equal parts of [0, 1]."""


@dataclass(frozen=True)
class FlowLoss:
    """The squared error of the velocity, of training and of validation.

    Attributes:
        bridge: the windows, and the start of each stage.
        path: the points that the network sees, and the velocity that it should give there.
        local_velocity: measure the error in the stage's local time, as written in the paper: times the square of the
            window's duration.
        groups: the ranks that train together on a sample, by the number of the stage, where there are such.
    """

    bridge: BridgeFlow
    path: Path
    local_velocity: bool
    groups: dict[int, TokenGroup] = field(default_factory=dict)

    def __call__(
        self,
        encoders: EncodingModule,
        transformer: nn.Module,
        micro: MicroBatch,
        seed_key: int | str,
        prompt_dropout: float = 0.0,
        reduction: Literal["mean", "none"] = "mean",
        techniques: Sequence[Technique] = (),
    ) -> FlowError:
        """Compare the velocity that a network predicts for a micro-batch with the true one (NAMI, section 3.2).

        Args:
            encoders: makes latents and text states; its seed is the run's.
            transformer: the trained network, or the averaged one.
            micro: n samples of one stage.
            seed_key: fixes all random numbers, with the run's seed and the samples' indices: the number of the global
                batch in training, a word in validation.
            prompt_dropout: probability that a sample is trained on the empty prompt.
            reduction: return the ``mean`` of the squared error, or all of it: ``none``.
            techniques: that are on in this step of training.
        """
        stage, window = micro.stage, self.bridge.windows[micro.stage]
        latents, coarse_latents = encoders.latents(micro, seed_key)
        random = rng.sample(encoders.seed, seed_key, micro.global_indices, latents.shape[1:], encoders.device)
        text = encoders.text_states(micro, drop=random.uniform[:, 2] < prompt_dropout)

        start, end = self.bridge.endpoints(stage, latents, coarse_latents, random.noise)
        x, tau, target = self.path(encoders, micro, start, end, text, random)
        t = window.timestep(tau)

        scale = window.duration**2 if self.local_velocity else 1.0
        forward = ForwardPass(micro, encoders.seed, window, x, tau, target, scale)
        hooks = [hook for technique in techniques if (hook := technique.block_hook(forward)) is not None]
        # In a validation each rank has samples of its own.
        group = self.groups.get(stage) if isinstance(seed_key, int) else None
        if group is None:
            velocity = transformer(x, text.sequence, text.pooled, t, stage, block_hooks=hooks)
        else:
            assert isinstance(transformer, NamiTransformer2DModel)
            velocity = group.predict(transformer, x, text, t, stage)
        forward.velocity = velocity.float()
        loss = F.mse_loss(forward.velocity, target, reduction=reduction)
        added = {technique.name: one for technique in techniques if (one := technique.loss(forward)) is not None}
        return FlowError(loss * scale, tau, added)


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
        """Return ``val/loss_stage1``, ``val/loss_stage1_tau_0.00-0.25`` and so on, over all ranks.

        A stage or a bin without a sample is left out.
        """
        sums, counts = strategy.reduce(self.sums, reduce_op="sum")
        stages = (counts.sum(1) > 0).nonzero().flatten().tolist()
        return {f"val/loss_stage{stage + 1}": sums[stage].sum() / counts[stage].sum() for stage in stages} | {
            f"val/loss_stage{stage + 1}_tau_{part / TAU_BINS:.2f}-{(part + 1) / TAU_BINS:.2f}": (
                sums[stage, part] / counts[stage, part]
            )
            for stage, part in (counts > 0).nonzero().tolist()
        }
