"""How long a model draws, stage by stage, next to FLUX-base and flow-only of the same size: the paper's Table 2.

All take as many steps of the solver in all. Weights are random, which time does not depend on; encoding prompts and
decoding latents, which is the same for all, is left out, as in the paper.
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
from nami_lightning.models.pipeline import NamiPipeline
from nami_lightning.models.text_encoder import TextStates
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.module import NamiModule
from nami_lightning.utils.text_table import table

WARM_UP = 1
"""Rounds that don't count."""


def sample(options: Namespace) -> None:
    """Seconds that a recipe's model, flow-only and FLUX-base take to draw, in turn, and by how much each is quicker.

    Args:
        options: ``recipe``; ``overrides``; ``steps`` of each stage; ``batch_size``, images at once; ``rounds``.
    """
    model = Recipe(options.recipe or "openmoji", options.overrides).make_model()
    device, number_type = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipelines = {name: make(model) for name, make in PIPELINES.items()}
    for pipeline in pipelines.values():
        nn.Module.to(pipeline.transformer, number_type)  # not its bridge: where a stage starts must not be rounded
        pipeline.to(device)
    steps, images = options.steps, options.batch_size
    times: dict[str, list[list[float]]] = {name: [] for name in pipelines}
    for number in tqdm(range(WARM_UP + options.rounds), "drawing in turn", leave=False):
        for name, pipeline in pipelines.items():
            taken = draw(pipeline, steps * model.num_stages // pipeline.bridge.num_stages, images)
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
        f"Seconds, medians of {options.rounds} rounds in turn, {images} image(s) at once, {steps} steps a stage "
        f"({steps * model.num_stages} in one stage), on {device}{threads}, in {number_type}."
    )


# --- the three models ------------------------------------------------------------------------------


def nami(model: NamiModule) -> NamiPipeline:
    """The recipe's own."""
    return make_pipeline(model, {}, model.bridge)


def flow_only(model: NamiModule) -> NamiPipeline:
    """All blocks at every stage."""
    rest = [0] * (model.num_stages - 1)
    return make_pipeline(model, {key: [total, *rest] for key, total in all_blocks(model).items()}, model.bridge)


def flux_base(model: NamiModule) -> NamiPipeline:
    """All blocks, and one stage at the finest resolution."""
    bridge = BridgeFlow(window_ratios=[1], channels=model.transformer_config["in_channels"])
    return make_pipeline(model, {key: [total] for key, total in all_blocks(model).items()}, bridge)


PIPELINES: dict[str, Callable[[NamiModule], NamiPipeline]] = {
    "NAMI": nami,
    "flow-only": flow_only,
    "FLUX-base": flux_base,
}


def all_blocks(model: NamiModule) -> dict[str, int]:
    """Double and single blocks of all stages together."""
    return {key: sum(model.transformer_config[key]) for key in ("num_layers", "num_single_layers")}


def make_pipeline(model: NamiModule, changes: dict[str, Any], bridge: BridgeFlow) -> NamiPipeline:
    """A pipeline of a random network that draws latents, as pixels of an image of their size."""
    transformer = NamiTransformer2DModel(**model.transformer_config | changes)
    bridge.fitted.fill_(True)
    side = model.resolutions[-1] // model.autoencoder_config.factor
    length = model.text_encoder_config.max_length
    pipeline = NamiPipeline(transformer, bridge, PixelCodec(), None, None, None, None, side, length)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: NamiPipeline, steps: int, images: int) -> list[float]:
    """Seconds of each stage, its bridge included, of one drawing without guidance."""
    config, length = pipeline.transformer.config, pipeline.config.max_sequence_length
    device = pipeline.device
    text = TextStates(
        torch.randn(images, length, config.joint_attention_dim, device=device),
        torch.randn(images, config.pooled_projection_dim, device=device),
    )
    ends = []

    def note(_: Any, step: int, t: float, state: dict[str, Any]) -> None:
        if (step + 1) % steps == 0:  # the last of a stage
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            ends.append(perf_counter())

    begin = perf_counter()
    pipeline(
        prompt_states=text,
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
        callback_on_step_end=note,
    )
    return [end - start for start, end in zip([begin, *ends], ends, strict=False)]
