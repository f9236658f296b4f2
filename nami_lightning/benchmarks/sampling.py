"""Measures how long a model samples, stage by stage, compared with FLUX-base and flow-only of the same size.

This is the paper's Table 2, its Figure 2 (several resolutions) and its Figure 26 (what the stages and the nested blocks
save). All models take the same total number of solver steps. The weights are random, because time does not depend on
them. The frozen encoders are the same for all models; they are measured apart, and only if that is asked for.
"""

import statistics
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from nami_lightning.benchmarks.sampling_report import Measurement, render_tables, with_paper, write_csv, write_plot
from nami_lightning.models.autoencoder import PixelCodec, decode_latents
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.text_encoder import PromptEncoder
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.planning.flops import transformer_flops
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.module import NamiModule

PROMPT = "A lighthouse on a cliff above the sea at dusk, painted in oil."
"""What the text encoders get; any prompt is padded to the same length."""


def measure_sampling(options: Namespace) -> None:
    """Print the seconds and operations that a recipe's model, flow-only and FLUX-base take to sample.

    The models take turns.

    Args:
        options: ``recipe``; ``overrides``; ``resolutions`` of the finest stage in px, or None for the recipe's;
            ``steps`` of each stage; ``batch_size``, the number of images at once; ``rounds``, and ``warm_up`` rounds
            before them that don't count; ``with_encoders``: measure the recipe's encoders too; ``output``: the folder
            of ``sampling.csv`` and the plot, or None.

    Raises:
        ValueError: a resolution that the model can't have.
        FileNotFoundError: the encoders are to be measured, and can't be found.
    """
    model = Recipe(options.recipe or "openmoji", options.overrides).make_model()
    sides = options.resolutions or [model.resolutions[-1]]
    for side in sides:
        check_resolution(model, side)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoders = Encoders(model, device) if options.with_encoders else None
    with torch.device(device):  # random weights are made where they are used
        pipelines = {name: make(model) for name, make in PIPELINES.items()}
    for pipeline in pipelines.values():
        dtype = move(pipeline, device)
    measured = [one for side in sides for one in measure_resolution(model, pipelines, encoders, side, options)]
    shown = with_paper(measured)

    print("\n\n".join(render_tables(shown)))
    processor = f"cpu with {torch.get_num_threads()} thread(s)"
    where = torch.cuda.get_device_name() if device == "cuda" else processor
    print(
        f"\nMedians of {options.rounds} round(s) in turns, {options.batch_size} image(s) at once, "
        f"{options.steps} steps per stage ({options.steps * model.num_stages} in one stage), on {where}, in {dtype}, "
        "without guidance."
    )
    if options.output:
        folder = Path(options.output)
        write_csv(shown, folder / "sampling.csv")
        print(f"Wrote {folder / 'sampling.csv'} and {write_plot(shown, folder / 'sampling').with_suffix('.png')}")


def check_resolution(model: NamiModule, side: int) -> None:
    """Refuse a side of the finest stage, in px, that isn't a whole number of the coarsest stage's tokens.

    Raises:
        ValueError: naming the multiple that it must be.
    """
    patch = model.transformer_config["patch_size"]
    multiple = model.autoencoder_config.factor * patch * 2 ** (model.num_stages - 1)
    if side % multiple:
        raise ValueError(f"--resolutions: {side} px is not a multiple of {multiple}, a token of the coarsest stage")


def measure_resolution(
    model: NamiModule, pipelines: dict[str, NamiPipeline], encoders: "Encoders | None", side: int, options: Namespace
) -> list[Measurement]:
    """Return what each model takes at one resolution: medians over rounds in which the models take turns."""
    latent_side, images = side // model.autoencoder_config.factor, options.batch_size
    steps = {
        name: [options.steps * model.num_stages // pipeline.bridge.num_stages] * pipeline.bridge.num_stages
        for name, pipeline in pipelines.items()
    }
    timings: dict[str, list[Timing]] = {name: [] for name in pipelines}
    encoding, decoding = [], []
    for number in tqdm(range(options.warm_up + options.rounds), f"sampling at {side} px, in turns", leave=False):
        taken = {name: time_sampling(one, steps[name], images, latent_side) for name, one in pipelines.items()}
        coded = encoders.time(images, latent_side) if encoders else None
        if number >= options.warm_up:
            for name, timing in taken.items():
                timings[name].append(timing)
            if coded:
                encoding.append(coded[0])
                decoding.append(coded[1])
    return [
        Measurement(
            model=name,
            side=side,
            steps=steps[name],
            images=images,
            stages=[statistics.median(column) for column in zip(*(one.stages for one in timings[name]), strict=True)],
            seconds=statistics.median(one.whole for one in timings[name]),
            overhead=statistics.median(one.whole / one.network - 1 for one in timings[name]),
            operations=count_operations(pipeline, steps[name], images, latent_side),
            encoding=statistics.median(encoding) if encoding else None,
            decoding=statistics.median(decoding) if decoding else None,
        )
        for name, pipeline in pipelines.items()
    ]


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


def move(pipeline: NamiPipeline, device: str) -> torch.dtype:
    """Move a pipeline to a device, its network in the dtype that is fast there; return that dtype."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # The bridge stays in float32: rounding must not change where a stage starts.
    nn.Module.to(pipeline.transformer, dtype)
    pipeline.to(device)
    return dtype


def all_blocks(model: NamiModule) -> dict[str, int]:
    """Return the number of double and of single blocks of all stages together."""
    return {key: sum(model.transformer_config[key]) for key in ("num_layers", "num_single_layers")}


def make_pipeline(model: NamiModule, changes: dict[str, Any], bridge: BridgeFlow) -> NamiPipeline:
    """Return a pipeline with a random network that samples latents, and returns them as pixels."""
    return without_encoders(model, NamiTransformer2DModel(**model.transformer_config | changes), bridge)


def without_encoders(model: NamiModule, transformer: NamiTransformer2DModel, bridge: BridgeFlow) -> NamiPipeline:
    """Return a pipeline of a network that takes text states, and returns the latents as pixels."""
    bridge.fitted.fill_(True)
    side = model.resolutions[-1] // model.autoencoder_config.factor
    length = model.text_encoder_config.max_length
    pipeline = NamiPipeline(transformer, bridge, PixelCodec(), None, None, None, None, side, length)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- seconds and operations ------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """The seconds of one call.

    Attributes:
        stages: of each stage, its bridge included.
        whole: of the call.
        network: spent in the forward passes of the network.
    """

    stages: list[float]
    whole: float
    network: float


def time_sampling(pipeline: NamiPipeline, steps: Sequence[int], images: int, side: int | None = None) -> Timing:
    """Time one call without guidance and without encoders.

    Args:
        pipeline: one of :data:`PIPELINES`.
        steps: of each stage, all equal.
        images: at once.
        side: of the finest stage's latents; None: as in the recipe.
    """
    config, length = pipeline.transformer.config, pipeline.config.max_sequence_length
    device = pipeline.device
    ends, borders = [], []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter()

    def record_end_of_stage(_: Any, step: int, t: Any, state: dict[str, Any]) -> dict[str, Any]:
        if (step + 1) % steps[0] == 0:  # the last step of a stage
            ends.append(now())
        return state

    hooks = [
        pipeline.transformer.register_forward_pre_hook(lambda *_: borders.append(now())),
        pipeline.transformer.register_forward_hook(lambda *_: borders.append(now())),
    ]
    sequence = torch.randn(images, length, config.joint_attention_dim, device=device)
    pooled = torch.randn(images, config.pooled_projection_dim, device=device)
    begin = now()
    pipeline(
        prompt_embeds=sequence,
        pooled_prompt_embeds=pooled,
        height=side,
        width=side,
        num_inference_steps=list(steps),
        guidance_scale=1.0,
        output_type="latent",
        callback_on_step_end=record_end_of_stage,
    )
    whole = now() - begin
    for hook in hooks:
        hook.remove()
    network = sum(end - start for start, end in zip(borders[::2], borders[1::2], strict=True))
    return Timing([end - start for start, end in zip([begin, *ends], ends, strict=False)], whole, network)


def count_operations(pipeline: NamiPipeline, steps: Sequence[int], images: int, side: int) -> int:
    """Return the operations of the network in a call without guidance, by formula.

    Args:
        pipeline: one of :data:`PIPELINES`.
        steps: of each stage.
        images: at once.
        side: of the finest stage's latents.
    """
    config, last = dict(pipeline.transformer.config), len(steps) - 1
    tokens = [((side >> last - stage) // config["patch_size"]) ** 2 for stage in range(len(steps))]
    length = pipeline.config.max_sequence_length
    return images * sum(
        count * transformer_flops(config, stage, tokens[stage], length).forward for stage, count in enumerate(steps)
    )


class Encoders:
    """The recipe's frozen encoders, loaded to be timed.

    Args:
        model: of the recipe.
        device: on which they run.

    Raises:
        FileNotFoundError: one can be neither found nor fetched.
    """

    def __init__(self, model: NamiModule, device: str) -> None:
        self.device, self.channels = device, model.transformer_config["in_channels"]
        self.text = PromptEncoder.load(replace(model.text_encoder_config, cache=False)).to(device)
        self.vae = model.vae.to(device)

    @torch.no_grad()
    def time(self, images: int, side: int) -> tuple[float, float]:
        """Return the seconds to encode as many prompts as images, and to decode their latents of that side."""
        latents = torch.randn(images, self.channels, side, side, device=self.device)
        begin = perf_counter()
        self.text([PROMPT] * images)[0].cpu()  # the copy waits until a GPU is done
        middle = perf_counter()
        decode_latents(self.vae, latents).cpu()
        return middle - begin, perf_counter() - middle
