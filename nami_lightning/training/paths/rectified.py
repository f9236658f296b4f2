"""The rectified path of a stage: straight from a point to where a frozen teacher arrives from there (PeRFlow).

Each stage is cut into the pieces that its student will take one Euler step each for. The teacher solves a piece in
several steps, with guidance; the student learns the velocity that leads to the same end in one. So a student of one
step a stage needs no guidance, and as many calls of the network as it has stages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from nami_lightning.models import flow
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.flow import SolverKind
from nami_lightning.models.pretrained import load_pretrained
from nami_lightning.models.text_encoder import TextStates
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.training import rng
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.frozen_encoders import EncodingModule
from nami_lightning.training.parallel.first_weights import make_with_first_weights
from nami_lightning.training.paths.straight import Path, PathPoint, StraightPath, TauDistribution, count_tokens


@dataclass(frozen=True)
class DistillationSettings:
    """How a student learns few steps from its teacher, which is the model of ``model.pretrained``.

    Args:
        steps: the Euler steps that the student will sample with, one number a stage, coarsest first.
        teacher_steps: solver steps that the teacher takes for each of them.
        solver: of the teacher: euler, heun or multistep.
        guidance_scale: the teacher's classifier-free guidance, which the student learns as its own; 1 is off.

    Raises:
        ValueError: a number below 1, or an unknown solver.
    """

    steps: list[int]
    teacher_steps: int = 4
    solver: SolverKind = "multistep"
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.steps or min(*self.steps, self.teacher_steps) < 1 or not self.guidance_scale >= 1:
            raise ValueError(
                "model.distillation needs steps (one number a stage), teacher_steps and a guidance_scale of at least "
                f"1; got {self.steps}, {self.teacher_steps} and {self.guidance_scale}"
            )
        if self.solver not in get_args(SolverKind):
            raise ValueError(
                f"model.distillation.solver must be one of {', '.join(get_args(SolverKind))}; got {self.solver!r}"
            )

    @property
    def sampler(self) -> dict[str, Any]:
        """How the student samples, by the names of a pipeline's arguments."""
        return {"num_inference_steps": list(self.steps), "guidance_scale": 1.0, "solver": "euler"}

    @property
    def teacher_calls(self) -> int:
        """The forward passes of the teacher for one sample."""
        return self.teacher_steps * (2 if self.solver == "heun" else 1) * (2 if self.guidance_scale > 1 else 1)


class RectifiedPath:
    """The line from a point on a piece's beginning to where the teacher arrives at its end.

    The teacher is no submodule of what is trained, so it is neither in the checkpoint nor in the EMA.

    Args:
        bridge: the windows, which the teacher has too.
        patch_size: side of the square of latents that makes one token.
        settings: the pieces, and how the teacher solves them.

    Raises:
        ValueError: the settings are for another number of stages.
    """

    def __init__(self, bridge: BridgeFlow, patch_size: int, settings: DistillationSettings) -> None:
        if len(settings.steps) != bridge.num_stages:
            raise ValueError(
                f"model.distillation.steps {settings.steps} must have one number for each of the {bridge.num_stages} "
                "stages"
            )
        self.bridge, self.patch_size, self.settings = bridge, patch_size, settings
        self.teacher: NamiTransformer2DModel
        self._times: dict[tuple[int, int], Tensor] = {}

    def load_teacher(
        self,
        source: str | None,
        make: Callable[[], NamiTransformer2DModel],
        strategy: Strategy | None = None,
        compile_blocks: bool = False,
    ) -> None:
        """Load the teacher, and shard it as the student is sharded.

        Args:
            source: folder of a pipeline.
            make: makes a network of its shape.
            strategy: Lightning's, if there is one.
            compile_blocks: compile each block.

        Raises:
            FileNotFoundError: there is no such pipeline.
            ValueError: its network or its flow is another one than the student's, or it has no bridges.
        """
        assert source is not None

        def make_teacher(weights: bool) -> NamiTransformer2DModel:
            with torch.device("meta"):
                teacher = make()
            differences = load_pretrained(source, teacher, self.bridge, weights)
            if not differences and not self.bridge.fitted:
                differences.append(f"{source} holds no bridges of the recipe's model.bridge.")
            if differences:
                raise ValueError(
                    "model.distillation: a student has the network and the bridges of its teacher. "
                    f"{' '.join(differences)}"
                )
            return teacher.eval().requires_grad_(False)

        self.teacher = make_with_first_weights(make_teacher, strategy, compile=compile_blocks)

    def __call__(
        self,
        encoders: EncodingModule,
        micro: MicroBatch,
        start: Tensor,
        end: Tensor,
        text: TextStates,
        random: rng.RandomNumbers,
    ) -> PathPoint:
        """Return the beginning of one of each sample's pieces, and the velocity from there to the teacher's end."""
        pieces, window = self.settings.steps[micro.stage], self.bridge.windows[micro.stage]
        times = self._local_times(micro.stage, count_tokens(start, self.patch_size), start.device)
        piece = (random.uniform[:, 0] * pieces).long()
        tau, tau_next = times[piece], times[piece + 1]

        x = flow.interpolate(start, end, tau)
        empty = encoders.empty_prompt_states(micro) if self.settings.guidance_scale > 1 else None
        x_next = self.solve(micro.stage, x, tau, tau_next, text, empty)
        return PathPoint(x, tau, (x - x_next) / (_column(tau - tau_next) * window.duration))

    @torch.no_grad()
    def solve(
        self, stage: int, x: Tensor, tau: Tensor, tau_next: Tensor, text: TextStates, empty: TextStates | None = None
    ) -> Tensor:
        """Return where the teacher arrives at ``tau_next`` ``(n,)`` from ``x`` ``(n, C, H, W)`` at ``tau`` ``(n,)``.

        Args:
            stage: 0..K-1.
            x: of n samples.
            tau: local times.
            tau_next: local times below ``tau``.
            text: of the samples.
            empty: one row of the empty prompt, for guidance; None: no guidance.
        """
        settings, window = self.settings, self.bridge.windows[stage]
        teacher = self.teacher.to(x.device)
        if empty is not None:
            text = TextStates(*(torch.cat([e.expand_as(t), t]) for e, t in zip(empty, text, strict=True)))

        def velocity(x: Tensor, tau: Tensor) -> Tensor:
            t = window.timestep(tau.flatten())
            if empty is None:
                return teacher(x, text.sequence, text.pooled, t, stage).float()
            v = teacher(torch.cat([x, x]), text.sequence, text.pooled, torch.cat([t, t]), stage).float()
            v_empty, v_text = v.chunk(2)
            return v_empty + settings.guidance_scale * (v_text - v_empty)

        parts = settings.teacher_steps
        state = None
        for now, after in pairwise(_column(torch.lerp(tau, tau_next, n / parts)) for n in range(parts + 1)):
            state = flow.solver_step(settings.solver, velocity, x, now, after, window.duration, state)
            x = state.x
        return x

    def _local_times(self, stage: int, tokens: int, device: torch.device) -> Tensor:
        """Return the ends of a stage's pieces, sent to the device once: a copy makes the host wait."""
        if (stage, tokens) not in self._times:
            times = self.bridge.local_times(stage, self.settings.steps[stage], tokens)
            self._times[stage, tokens] = torch.tensor(times, device=device)
        return self._times[stage, tokens]


def make_path(
    bridge: BridgeFlow, patch_size: int, tau_distribution: TauDistribution, distillation: DistillationSettings | None
) -> Path:
    """Return the path that a network is trained on: the flow's own, or its teacher's."""
    if distillation is None:
        return StraightPath(bridge, patch_size, tau_distribution)
    return RectifiedPath(bridge, patch_size, distillation)


def _column(tau: Tensor) -> Tensor:
    """Give local times ``(n,)`` the dimensions of images."""
    return tau.view(-1, 1, 1, 1)
