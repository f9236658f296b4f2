"""Measures how long a model samples, stage by stage, compared with FLUX-base and flow-only of the same size (Table 2).

All models take the same total number of solver steps. The weights are random, because time does not depend on them. As
in the paper, encoding prompts and decoding latents is not measured: both are the same for all models.
"""

import statistics
from argparse import Namespace
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from nami_lightning.models.autoencoder import PixelCodec
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.module import NamiModule
from nami_lightning.utils.text_table import table

WARM_UP = 1
"""Number of first rounds that don't count."""


def measure_sampling(options: Namespace) -> None:
    """Print the seconds that a recipe's model, flow-only and FLUX-base take to sample, and the differences.

    The models take turns.

    Args:
        options: ``recipe``; ``overrides``; ``steps`` of each stage; ``batch_size``, the number of images at once;
            ``rounds``.
    """
    model = Recipe(options.recipe or "openmoji", options.overrides).make_model()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipelines = {name: make(model) for name, make in PIPELINES.items()}
    for pipeline in pipelines.values():
        # The bridge stays in float32: rounding must not change where a stage starts.
        nn.Module.to(pipeline.transformer, dtype)
        pipeline.to(device)
    steps, images = options.steps, options.batch_size
    times: dict[str, list[list[float]]] = {name: [] for name in pipelines}
    for number in tqdm(range(WARM_UP + options.rounds), "sampling in turns", leave=False):
        for name, pipeline in pipelines.items():
            taken = time_sampling(pipeline, steps * model.num_stages // pipeline.bridge.num_stages, images)
            if number >= WARM_UP:
                times[name].append(taken)

    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    overall = {name: statistics.median(map(sum, rows)) for name, rows in times.items()}
    header = ["model", *(f"{side} px" for side in model.resolutions), "overall", "less than FLUX-base"]
    rows = [header]
    for name, stages in medians.items():
        blank = ["-"] * (model.num_stages - len(stages))
        less = f"{1 - overall[name] / overall['FLUX-base']:.1%}"
        rows.append([name, *blank, *(f"{seconds:.3f}" for seconds in (*stages, overall[name])), less])
    print("\n".join(table(rows, "<" + ">" * (len(header) - 1))))
    threads = f" with {torch.get_num_threads()} thread(s)" if device == "cpu" else ""
    print(
        f"Seconds, medians of {options.rounds} rounds in turns, {images} image(s) at once, {steps} steps per stage "
        f"({steps * model.num_stages} in one stage), on {device}{threads}, in {dtype}."
    )


# --- the three models ------------------------------------------------------------------------------


def nami_pipeline(model: NamiModule) -> NamiPipeline:
    """Return a pipeline of the recipe's own model."""
    return make_pipeline(model, {}, model.bridge)


def flow_only_pipeline(model: NamiModule) -> NamiPipeline:
    """Return a pipeline that runs all blocks at every stage."""
    rest = [0] * (model.num_stages - 1)
    return make_pipeline(model, {key: [total, *rest] for key, total in all_blocks(model).items()}, model.bridge)


def flux_base_pipeline(model: NamiModule) -> NamiPipeline:
    """Return a pipeline with all blocks and one stage, at the finest resolution."""
    bridge = BridgeFlow(window_ratios=[1], channels=model.transformer_config["in_channels"])
    return make_pipeline(model, {key: [total] for key, total in all_blocks(model).items()}, bridge)


PIPELINES: dict[str, Callable[[NamiModule], NamiPipeline]] = {
    "NAMI": nami_pipeline,
    "flow-only": flow_only_pipeline,
    "FLUX-base": flux_base_pipeline,
}


def all_blocks(model: NamiModule) -> dict[str, int]:
    """Return the number of double and of single blocks of all stages together."""
    return {key: sum(model.transformer_config[key]) for key in ("num_layers", "num_single_layers")}


def make_pipeline(model: NamiModule, changes: dict[str, Any], bridge: BridgeFlow) -> NamiPipeline:
    """Return a pipeline with a random network that samples latents, and returns them as pixels."""
    transformer = NamiTransformer2DModel(**model.transformer_config | changes)
    bridge.fitted.fill_(True)
    side = model.resolutions[-1] // model.autoencoder_config.factor
    length = model.text_encoder_config.max_length
    pipeline = NamiPipeline(transformer, bridge, PixelCodec(), None, None, None, None, side, length)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def time_sampling(pipeline: NamiPipeline, steps: int, images: int) -> list[float]:
    """Return the seconds of each stage, its bridge included, of one call without guidance."""
    config, length = pipeline.transformer.config, pipeline.config.max_sequence_length
    device = pipeline.device
    ends = []

    def record_end_of_stage(_: Any, step: int, t: float, state: dict[str, Any]) -> None:
        if (step + 1) % steps == 0:  # the last step of a stage
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            ends.append(perf_counter())

    begin = perf_counter()
    pipeline(
        prompt_embeds=torch.randn(images, length, config.joint_attention_dim, device=device),
        pooled_prompt_embeds=torch.randn(images, config.pooled_projection_dim, device=device),
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
        callback_on_step_end=record_end_of_stage,
    )
    return [end - start for start, end in zip([begin, *ends], ends, strict=False)]
