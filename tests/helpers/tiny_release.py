"""The recorded run of the code that the paper's authors published: its numbers, and its weights in their layout.

``nami_t2i.safetensors`` holds a network of their layout at a tiny size with random weights, each call of it and the
final latents, computed in float32 on a CPU. Their code is under the MIT licence.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.tiny_models import make_bert, make_mt5, make_vae
from nami_lightning.cli.main import main
from nami_lightning.models import flow
from nami_lightning.pipelines.nami_pipeline import NamiPipeline

RECORD = load_file(Path(__file__).parents[1] / "conversion" / "nami_t2i.safetensors")
SINGLE_LAYERS = ("--num_single_layers", "1", "1", "2")


def part_of(prefix: str) -> dict[str, Tensor]:
    """Return the recorded weights whose names start with ``prefix``, without it."""
    return {key.removeprefix(prefix): value.clone() for key, value in RECORD.items() if key.startswith(prefix)}


def write_release(folder: Path, weights: dict[str, Tensor] | None = None, encoders: bool = False) -> Path:
    """Write the record's weights in the authors' layout."""
    (folder / "transformer").mkdir(parents=True)
    torch.save(weights or part_of("transformer."), folder / "transformer" / "pytorch_model_fsdp.bin")
    torch.save(part_of("bridge_flow."), folder / "bridge_flow.bin")
    make_vae(0).save_pretrained(folder / "vae")
    if encoders:
        for model, where in (
            (make_mt5(), ("mt5", "mt5")),
            (make_bert(), ("mclip/clip_text_encoder", "mclip/tokenizer")),
        ):
            for part, subfolder in zip(model, where, strict=True):
                part.save_pretrained(folder / subfolder)
    return folder


def convert(source: Path, output: Path, *options: str) -> NamiPipeline:
    """Convert a release as a user does, and load the result."""
    assert main(["convert", str(source), "--output", str(output), *SINGLE_LAYERS, *options]) == 0
    pipeline = NamiPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: NamiPipeline, **arguments: Any) -> Tensor:
    """Generate latents from the record's prompts and noise."""
    noise = flow.pyramid(RECORD["noise"], 3, flow.coarsen_noise)[0]
    embeds: dict[str, Any] = {name: RECORD[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    embeds |= {f"negative_{name}": RECORD[f"negative_{name}"] for name in embeds}
    defaults: dict[str, Any] = {
        "latents": noise,
        "num_inference_steps": [3, 2, 2],
        "guidance_scale": 3.0,
        "output_type": "latent",
    }
    images: Tensor = pipeline(**embeds | defaults | arguments).images
    return images
