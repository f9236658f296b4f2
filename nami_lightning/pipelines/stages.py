"""The loop of the pipeline: solve a stage, cross the bridge to the next, from pure noise or from an image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nami_lightning.models import flow
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.flow import SolverKind
from nami_lightning.models.text_encoder import TextStates
from nami_lightning.pipelines.checks import finite_rows

StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]


def share_steps(total: int | Sequence[int], default: Sequence[int]) -> list[int]:
    """Share a number of solver steps out over the stages, in proportion to ``default``; each stage gets at least one.

    What doesn't divide goes where the rounding took most, and to the coarser stage of two equals: its steps cost less.

    Args:
        total: at least one a stage; or a list with one number a stage, which stays as it is.
        default: the model's own steps, one a stage.
    """
    if not isinstance(total, int):
        return list(total)
    quotas = [total * number / sum(default) for number in default]
    steps = [max(1, int(quota)) for quota in quotas]
    while sum(steps) != total:
        change = 1 if sum(steps) < total else -1
        gaps = [
            change * (quota - number) if number + change >= 1 else -torch.inf
            for quota, number in zip(quotas, steps, strict=True)
        ]
        steps[gaps.index(max(gaps))] += change
    return steps


@dataclass
class Reference:
    """An image that is drawn anew in part: where sampling enters the flow, and what of the image stays.

    Attributes:
        latents: of the image at each stage's resolution, coarsest first.
        entry_stage: the first stage that runs.
        strength: the share of the solver steps from there on that run.
        keep_detail: after each step of the finer stages, the detail is the image's: the layout is drawn anew.
    """

    latents: list[Tensor]
    entry_stage: int = 0
    strength: float = 1.0
    keep_detail: bool = False

    def at(self, bridge: BridgeFlow, stage: int, tau: float, noise: Tensor) -> Tensor:
        """Return the image's own point on the flow of a stage, at local time ``tau``."""
        start, end = bridge.endpoints(stage, self.latents[stage], self.latents[max(stage - 1, 0)], noise)
        return tau * start + (1 - tau) * end

    def skipped(self, steps: Sequence[int]) -> list[int]:
        """Return how many solver steps of each stage don't run."""
        skipped = list(steps[: self.entry_stage])
        left = sum(steps[self.entry_stage :])
        left -= max(1, int(left * self.strength + 1e-9))
        for number in steps[self.entry_stage :]:
            skipped.append(min(number, left))
            left -= skipped[-1]
        return skipped


@dataclass
class StageSampler:
    """Solves the stages one after the other.

    Attributes:
        pipeline: whose network and bridges are used, and which is told the stage and the time.
        prompts: text states, one row an image.
        negatives: what guidance leads away from, one row an image; None without guidance.
        steps: solver steps of each stage.
        guidance: weight of guidance at each stage; 1 or less is off.
        solver: of the steps.
        noise: returns a stage's unit noise, always the same.
        reference: an image to draw anew; None: all is drawn from noise.
        joint_attention_kwargs: for the network's attention.
        callback: called after each step.
        tensor_inputs: names of the tensors that it gets.
        keep_stages: note each stage's clean latents.
    """

    pipeline: Any  # a NamiPipeline
    prompts: TextStates
    negatives: TextStates | None
    steps: list[int]
    guidance: list[float]
    solver: SolverKind
    noise: Callable[[int], Tensor]
    reference: Reference | None = None
    joint_attention_kwargs: dict[str, Any] | None = None
    callback: StepCallback | None = None
    tensor_inputs: Sequence[str] = ("latents",)
    keep_stages: bool = False
    stages: list[Tensor] = field(default_factory=list)
    finite: list[tuple[str, Tensor]] = field(default_factory=list)
    done: int = 0

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the network's inputs; diffusers asks all modules for it, longer than a small network takes for a step."""
        dtype: torch.dtype = self.pipeline.transformer.dtype
        return dtype

    def __call__(self) -> Tensor:
        """Return the latents at the end of the last stage, or where :attr:`NamiPipeline.interrupt` stopped them."""
        bridge, reference = self.pipeline.bridge, self.reference
        skipped = [0] * len(self.steps) if reference is None else reference.skipped(self.steps)
        x: Tensor | None = None
        with self.pipeline.progress_bar(total=sum(self.steps) - sum(skipped)) as progress:
            for stage, (steps, first) in enumerate(zip(self.steps, skipped, strict=True)):
                if first == steps or self.pipeline.interrupt:
                    continue
                noise = self.noise(stage)
                taus = bridge.local_times(stage, steps, self._tokens(noise))[first:]
                if x is not None:
                    x = bridge.start(stage, x, noise)
                elif reference is not None and (stage or first):
                    x = reference.at(bridge, stage, taus[0], noise)
                else:
                    x = noise
                x = self._solve(stage, x, taus, progress)
        assert x is not None
        return x

    def _solve(self, stage: int, x: Tensor, taus: list[float], progress: Any) -> Tensor:
        """Solve what is left of a stage's window; caches of steps start anew."""
        window, clean = self.pipeline.bridge.windows[stage], x
        state: flow.SolverStep | None = None
        self.pipeline.stage = stage
        if self.pipeline.transformer.is_cache_enabled:
            self.pipeline.transformer._reset_stateful_cache()
        for tau, tau_next in pairwise(taus):
            if self.pipeline.interrupt:
                break
            t = torch.tensor(1000 * window.timestep(tau))
            self.pipeline.current_timestep = t
            state = flow.solver_step(
                self.solver, lambda x, tau: self._velocity(stage, x, tau), x, tau, tau_next, window.duration, state
            )
            x = state.x
            if self.reference is not None and self.reference.keep_detail and stage:
                image = self.reference.at(self.pipeline.bridge, stage, tau_next, self.noise(stage))
                x = flow.upsample(flow.pool(x)) + flow.detail(image)
            clean = flow.clean_estimate(x, state.velocity, tau_next, window)
            x = self._call_back(t, x, clean)
            self.done += 1
            progress.update()
        self.finite.append((f"stage {stage + 1}", finite_rows(x)))
        if self.keep_stages:
            self.stages.append(clean)
        return x

    def _velocity(self, stage: int, x: Tensor, tau: float) -> Tensor:
        """Return the network's velocity, guided where the stage's guidance is on."""
        transformer, scale = self.pipeline.transformer, self.guidance[stage]
        guided = self.negatives is not None and scale > 1
        rows = [self.negatives, self.prompts] if guided else [self.prompts]
        x = torch.cat([x] * len(rows))
        sequence, pooled = (torch.cat(parts).to(self.dtype) for parts in zip(*rows, strict=True))
        time = torch.full((len(x),), self.pipeline.bridge.windows[stage].timestep(tau), device=x.device)
        with transformer.cache_context(f"stage {stage}"):
            v = transformer(x.to(self.dtype), sequence, pooled, time, stage, self.joint_attention_kwargs).float()
        if not guided:
            return v
        negative, positive = v.chunk(2)
        return negative + scale * (positive - negative)

    def _call_back(self, t: Tensor, x: Tensor, clean: Tensor) -> Tensor:
        """Hand the callback what it asked for, and take over what it returns."""
        if self.callback is None:
            return x
        tensors = {
            "latents": x,
            "clean_latents": clean,
            "prompt_embeds": self.prompts.sequence,
            "pooled_prompt_embeds": self.prompts.pooled,
        }
        asked = {name: tensors[name] for name in self.tensor_inputs}
        changed = self.callback(self.pipeline, self.done, t, asked) or {}
        self.prompts = TextStates(
            changed.get("prompt_embeds", self.prompts.sequence),
            changed.get("pooled_prompt_embeds", self.prompts.pooled),
        )
        return changed.get("latents", x)

    def _tokens(self, x: Tensor) -> int:
        return x.shape[-2] * x.shape[-1] // self.pipeline.transformer.config.patch_size**2
