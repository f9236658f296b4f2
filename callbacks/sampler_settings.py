"""How the callbacks draw: one set of sampler settings, one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nami_lightning.models.flow import SolverKind
from nami_lightning.training.module import NamiModule


@dataclass(frozen=True)
class Drawing:
    """Settings of the sampler.

    Args:
        num_inference_steps: steps a stage; one number, or one a stage.
        guidance_scale: classifier-free guidance; 1 is off.
        solver: euler (the paper's), heun (two calls a step), or multistep (second order at Euler's cost).
    """

    num_inference_steps: int | list[int] = 10
    guidance_scale: float = 3.5
    solver: SolverKind = "euler"

    def draw(
        self,
        module: NamiModule,
        prompts: list[str],
        seeds: Sequence[int],
        output_type: str = "pil",
        height: int | None = None,
        width: int | None = None,
    ) -> Any:
        """Images of ``prompts`` with the EMA's weights if there are any; image i from the noise of ``seeds[i]``."""
        with module.averaged:
            output = module.pipeline()(
                prompt_states=module.encode_prompts(prompts),
                negative_prompt_states=module.encode_prompts([""]),
                height=height,
                width=width,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                solver=self.solver,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type=output_type,
            )
        return output.images
