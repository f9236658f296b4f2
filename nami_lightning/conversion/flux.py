"""A FLUX of diffusers as a pipeline of ours: its blocks split over the stages, its head for each of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from nami_lightning.conversion.pipeline_folder import INDEX, OURS, PipelineFolder
from nami_lightning.conversion.weights import assign, read_config, read_weights
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.text_encoder import TextSettings
from nami_lightning.models.transformer import HeadKind, NamiTransformer2DModel

PATCH_SIZE = 2
TEXT = TextSettings(max_length=512, attention_mask=False, zero_padding=False, pooling="pooler")
"""How FLUX makes text states: no mask, padding kept, CLIP's pooler. Its pipeline's default is 512 tokens a prompt;
CLIP's 77 are its tokenizer's limit."""

FIT_LATER = "Its bridges are fitted at the first run: lightning run RECIPE --model.pretrained FOLDER"

UNSUPPORTED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
    "invert_sigmas",
    "shift_terminal",
)
"""Settings of FLUX's scheduler that change its steps in ways that ours don't know."""


@dataclass(frozen=True)
class FluxSplit:
    """How FLUX's blocks and noise levels are shared out over the stages.

    Attributes:
        num_layers: the double blocks that each stage adds; None: all in one stage.
        num_single_layers: the single blocks that each stage adds; likewise.
        window_ratios: relative widths of the stages' windows; None: even.
        output_head: one head ``shared`` by all stages, or a copy of it ``per_stage``.
        resolution: px of the finest stage.
    """

    num_layers: Sequence[int] | None = None
    num_single_layers: Sequence[int] | None = None
    window_ratios: Sequence[float] | None = None
    output_head: HeadKind = "shared"
    resolution: int = 1024

    def ratios(self, stages: int) -> list[float]:
        """Return the windows' ratios.

        Raises:
            ValueError: their number is not that of the stages.
        """
        if self.window_ratios and len(self.window_ratios) != stages:
            raise ValueError(f"{stages} stages can't have {len(self.window_ratios)} window_ratios")
        return [float(ratio) for ratio in self.window_ratios or [1.0] * stages]


def is_flux_transformer(folder: Path) -> bool:
    """Tell whether a folder is that of a FLUX transformer alone."""
    file = folder / "config.json"
    return file.is_file() and read_config(file).get("_class_name") == FluxTransformer2DModel.__name__


def convert_flux(folder: Path, encoders: Path, target: PipelineFolder, split: FluxSplit) -> list[str]:
    """Write a FLUX as a pipeline of NAMI, whose bridges are fitted at the first run.

    Args:
        folder: of the transformer.
        encoders: of the FLUX pipeline that has the other parts.
        target: the pipeline's.
        split: over the stages.

    Returns:
        Notes for the user.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a split that doesn't fit, a FLUX with a guidance embedding, weights that don't fit their config, a
            scheduler with settings that NAMI doesn't have.
    """
    flux = load_flux(folder)
    transformer = NamiTransformer2DModel.from_flux(
        flux, split.num_layers, split.num_single_layers, PATCH_SIZE, output_head=split.output_head
    )
    scheduler = read_config(encoders / "scheduler" / "scheduler_config.json")
    bridge = make_bridge(scheduler, split.ratios(transformer.num_stages), transformer.config.in_channels)
    target.save("transformer", transformer, OURS)
    target.save("bridge", bridge, OURS)
    target.copy_encoders(encoders)
    target.finish(split.resolution, TEXT)
    return [] if bridge.fitted else [FIT_LATER]


def load_flux(folder: Path) -> FluxTransformer2DModel:
    """Load a FLUX transformer with its weights in the dtype that they are stored in, mapped from the disk.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it has a guidance embedding, or weights that don't fit its config.
    """
    config = read_config(folder / "config.json")
    with torch.device("meta"):
        flux: FluxTransformer2DModel = FluxTransformer2DModel.from_config(config)
    assign(flux, read_weights(folder), folder)
    return flux


def make_bridge(scheduler: dict[str, Any], ratios: list[float], channels: int) -> BridgeFlow:
    """Return windows with the time shift of FLUX's scheduler; its bridges are to be fitted.

    A fixed shift s is ``mu = ln s`` at every size; a dynamic one is linear in the number of tokens.

    Raises:
        ValueError: the scheduler has settings that NAMI doesn't have.
    """
    if unknown := [name for name in UNSUPPORTED if scheduler.get(name)]:
        raise ValueError(f"the scheduler's {', '.join(unknown)} can't be converted: NAMI's steps don't have it")
    if scheduler.get("use_dynamic_shifting"):
        if (kind := scheduler.get("time_shift_type", "exponential")) != "exponential":
            raise ValueError(f"the scheduler's time_shift_type {kind} can't be converted: only exponential can")
        base, most = shifts_at_256_and_4096(scheduler)
        return BridgeFlow(ratios, channels, shift=True, base_shift=base, max_shift=most)
    mu = math.log(scheduler.get("shift", 1.0))
    return BridgeFlow(ratios, channels, shift=mu != 0, base_shift=mu, max_shift=mu)


def shifts_at_256_and_4096(scheduler: dict[str, Any]) -> tuple[float, float]:
    """Return the dynamic shift at 256 and at 4096 tokens: it is stated at two sizes, and linear between them."""
    fewest, most = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    slope = (high - low) / (most - fewest)
    return low + slope * (256 - fewest), low + slope * (4096 - fewest)


def pipeline_of(folder: Path, encoders: Path | None) -> tuple[Path, Path]:
    """Return the folders of the transformer and of the pipeline that has the other parts.

    Raises:
        ValueError: a transformer alone, without a pipeline that has the other parts.
    """
    if (folder / INDEX).is_file():
        return folder / "transformer", encoders or folder
    if encoders is None:
        raise ValueError(
            f"{folder} is a transformer alone: name the FLUX pipeline whose autoencoder and text encoders it uses with "
            "--encoders (black-forest-labs/FLUX.1-schnell, say)"
        )
    return folder, encoders
