"""Checks across the parts of a recipe: that all describe the same stages, before anything is read or built."""

from itertools import pairwise
from typing import Any

from nami_lightning.bridge import BridgeFlow
from nami_lightning.curriculum import Curriculum
from nami_lightning.encoders import AutoencoderConfig


def check_stages(
    transformer: dict[str, Any],
    bridge: BridgeFlow,
    resolutions: list[int],
    curriculum: Curriculum,
    vae: AutoencoderConfig,
) -> None:
    """Refuse parts that do not describe the same stages.

    Raises:
        ValueError: naming the recipe key.
    """
    stages = {
        "resolutions": len(resolutions),
        "curriculum.phases[].ratio": curriculum.num_stages,
        "model.bridge.window_ratios": bridge.num_stages,
        "model.transformer.num_layers": len(transformer["num_layers"]),
    }
    if len(set(stages.values())) > 1:
        listing = ", ".join(f"{key} has {number}" for key, number in stages.items())
        raise ValueError(f"every stage needs one entry in each list, but {listing}")
    if transformer["in_channels"] != bridge.config.channels:
        raise ValueError(
            f"model.bridge.channels is {bridge.config.channels} and model.transformer.in_channels "
            f"{transformer['in_channels']}: both are the channels of the latents, make them equal"
        )
    if any(fine != 2 * coarse for coarse, fine in pairwise(resolutions)):
        raise ValueError(f"each of resolutions {resolutions} must be twice the one before")
    multiple = transformer["patch_size"] * vae.factor
    if odd := [side for side in resolutions if side % multiple or side < multiple]:
        raise ValueError(
            f"resolutions {odd} are not multiples of {multiple} px, the patch size {transformer['patch_size']} times "
            f"the autoencoder's factor {vae.factor}"
        )


def per_stage(value: float | list[float], stages: int) -> list[float]:
    """One number a stage, from one for all or a list.

    Raises:
        ValueError: a list of another length.
    """
    values = [float(value)] * stages if isinstance(value, int | float) else value
    if len(values) != stages:
        raise ValueError(f"tau_mean and tau_std need one number, or {stages} (one a stage); got {value}")
    return values
