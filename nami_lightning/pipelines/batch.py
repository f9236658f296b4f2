"""A batch of images from any text-to-image pipeline of diffusers: each from its own seed, and checked to be finite."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from nami_lightning.pipelines.checks import CHECKED, NonFiniteImages
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.pipelines.stages import share_steps


def generate_batch(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], settings: Mapping[str, Any]
) -> tuple[list[Image.Image], dict[int, str]]:
    """Return the images of a batch, and where those that are not finite stopped being so, by their number.

    Args:
        pipeline: of diffusers; it takes one generator an image.
        prompts: one an image.
        seeds: one an image, of its noise.
        settings: further arguments of the call, for all images.
    """
    origins: dict[int, str] = {}
    try:
        output = pipeline(
            prompt=list(prompts),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            **settings,
        ).images
    except NonFiniteImages as error:
        output = error.images
        origins = {i: f"since {origin}" for i, origin in error.origins.items()}
    arrays = np.asarray(output)
    finite = np.isfinite(arrays).reshape(len(arrays), -1).all(1)  # other pipelines than ours don't say it
    origins |= {int(i): "in the result" for i in np.flatnonzero(~finite) if int(i) not in origins}
    return DiffusionPipeline.numpy_to_pil(np.nan_to_num(arrays)), origins


def check_settings(pipeline: Any, source: str, settings: Mapping[str, Any]) -> None:
    """Check that a pipeline takes the settings of a call, before anything runs.

    Args:
        pipeline: of diffusers.
        source: what it was loaded from, for messages.
        settings: arguments of its call.

    Raises:
        ValueError: it doesn't know a setting, or the setting doesn't fit it.
    """
    known = inspect.signature(pipeline.__call__).parameters
    if unknown := [name for name in settings if name not in known]:
        raise ValueError(f"{type(pipeline).__name__} of {source} does not take {', '.join(unknown)}")
    if "negative_prompt" in settings and "true_cfg_scale" in known:
        raise ValueError(f"{source} is a guidance-distilled model: a negative prompt would change nothing")
    if isinstance(pipeline, NamiPipeline):
        inputs = _with_defaults(pipeline, settings) | {"prompt": "", "negative_prompt": None, "generator": None}
        pipeline.check_inputs(**{name: inputs[name] for name in CHECKED})
    for name, option in (("num_inference_steps", "steps"), ("guidance_scale", "guidance_scale")):
        if isinstance(settings.get(name), list) and not isinstance(pipeline, NamiPipeline):
            raise ValueError(f"{source} has only one stage: give --{option} a single number")


def settings_in_full(pipeline: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a call by the names of a row, with the pipeline's own defaults where they say nothing.

    They are ``height``, ``width``, ``steps`` (of a NAMI one number a stage), ``guidance_scale`` and ``solver``, as far
    as the pipeline takes them; None where it doesn't say its default.
    """
    values = _with_defaults(pipeline, settings)
    if isinstance(pipeline, NamiPipeline):
        values["num_inference_steps"] = share_steps(values["num_inference_steps"], _default_steps(pipeline))
    names = {"height": "height", "width": "width", "num_inference_steps": "steps"}
    names |= {"guidance_scale": "guidance_scale", "solver": "solver"}
    return {own: values[name] for name, own in names.items() if name in values}


def _with_defaults(pipeline: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call."""
    parameters = inspect.signature(pipeline.__call__).parameters
    values = {name: parameter.default for name, parameter in parameters.items()} | dict(settings)
    if isinstance(pipeline, NamiPipeline):
        config = pipeline.config
        own = {
            "height": config.resolution,
            "width": config.resolution,
            "num_inference_steps": _default_steps(pipeline),
            "guidance_scale": config.guidance_scale,
            "solver": config.solver,
        }
        values |= {name: default for name, default in own.items() if values[name] is None}
    return values


def _default_steps(pipeline: NamiPipeline) -> list[int]:
    return list(pipeline.config.num_inference_steps or [10] * pipeline.bridge.num_stages)
