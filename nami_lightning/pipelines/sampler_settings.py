"""Settings of a pipeline's sampler, as a recipe, a callback and a benchmark state them."""

from dataclasses import asdict, dataclass
from typing import Any

from nami_lightning.models.flow import SolverKind


@dataclass(frozen=True)
class SamplerSettings:
    """How a pipeline samples; what is null is left to the pipeline's own default.

    Args:
        num_inference_steps: solver steps: their total, shared out over the stages, or a list with one number a stage.
            NamiPipeline's default: 10 a stage, or what the model was tuned to.
        guidance_scale: weight of classifier-free guidance, one number or one a stage; 1 is off. NamiPipeline's default:
            3.5, or what the model was tuned to.
        solver: of a NAMI: euler (as in the paper, and the default), heun (two calls of the network a step), or
            multistep (second order at Euler's cost).
        negative_prompt: the prompt that guidance leads away from.
        height: of the images in px; the default is the model's resolution.
        width: of the images in px; the default is the model's resolution.
    """

    num_inference_steps: int | list[int] | None = None
    guidance_scale: float | list[float] | None = None
    solver: SolverKind | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the settings that are not null, by the names of a pipeline call's arguments."""
        return {name: value for name, value in asdict(self).items() if value is not None}
