"""A FLUX that was converted, against diffusers' own FluxPipeline."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from helpers.tiny_models import MakeFlux, TextModel
from torch import Tensor

from nami_lightning.cli.main import main
from nami_lightning.pipelines.nami_pipeline import NamiPipeline

pytest_plugins = "helpers.tiny_models"

PROMPTS = ["a red cat", "the house on a tree"]
SPLIT = ("--num_layers", "2", "0", "0", "--num_single_layers", "1", "1", "2")


@pytest.fixture
def flux(make_flux: MakeFlux, t5: TextModel, clip: TextModel, vae: AutoencoderKL) -> FluxPipeline:
    """A FLUX pipeline with random weights."""
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, *clip, *t5, make_flux())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def convert(source: Path | str, output: Path, *options: str) -> NamiPipeline:
    """Convert a FLUX as a user does, to a finest stage of 32 px, and load the result."""
    assert main(["convert", str(source), "--output", str(output), "--resolution", "32", *options]) == 0
    pipeline = NamiPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise() -> Tensor:
    """Noise of two images of 32 px."""
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def pack(latents: Tensor) -> Tensor:
    """Return latents as FLUX's tokens."""
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


@pytest.mark.parametrize(
    "scheduler",
    [
        {},  # FLUX.1-schnell
        {"shift": 3.0},
        {"shift": 3.0, "use_dynamic_shifting": True},  # FLUX.1-dev
        {"use_dynamic_shifting": True, "base_image_seq_len": 30, "max_image_seq_len": 900, "max_shift": 1.4},
    ],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_one_stage_gives_fluxs_images(
    flux: FluxPipeline, scheduler: dict[str, Any], guidance_scale: float, tmp_path: Path
) -> None:
    """From the same prompts and noise, text encoders and autoencoder included."""
    flux.scheduler = FlowMatchEulerDiscreteScheduler(**scheduler)
    flux.save_pretrained(tmp_path / "flux")
    nami = convert(tmp_path / "flux", tmp_path / "nami")
    settings: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt"}
    guidance: dict[str, Any] = {"negative_prompt": ["a dog"] * 2} if guidance_scale > 1 else {}
    expected = flux(
        PROMPTS, height=32, width=32, latents=pack(noise()), true_cfg_scale=guidance_scale, **guidance, **settings
    ).images
    images = nami(PROMPTS, latents=noise(), guidance_scale=guidance_scale, **guidance, **settings).images
    assert expected.std() > 0.05
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("output_head", ["shared", "per_stage"])
@torch.no_grad()
def test_the_last_of_three_stages_has_fluxs_velocity(flux: FluxPipeline, output_head: str, tmp_path: Path) -> None:
    flux.save_pretrained(tmp_path / "flux")
    nami = convert(tmp_path / "flux", tmp_path / "nami", *SPLIT, "--output_head", output_head)
    assert nami.transformer.config.num_single_layers == [1, 1, 2]
    states = nami.encode_prompt(PROMPTS)
    window, x = nami.bridge.windows[2], noise()
    time = torch.full((2,), window.timestep(1.0))
    assert window.start == pytest.approx(1 / 3)
    expected = flux.transformer(
        hidden_states=pack(x),
        encoder_hidden_states=flux.encode_prompt(PROMPTS, None)[0],
        pooled_projections=flux.encode_prompt(PROMPTS, None)[1],
        timestep=time,
        img_ids=FluxPipeline._prepare_latent_image_ids(2, 8, 8, x.device, x.dtype),
        txt_ids=torch.zeros(512, 3),
    ).sample
    velocity = nami.transformer(x, states.sequence, states.pooled, time, stage=2)
    torch.testing.assert_close(pack(velocity), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="never fitted"):
        nami(PROMPTS)


def test_a_transformer_alone_takes_the_rest_from_a_pipeline(flux: FluxPipeline, tmp_path: Path, capsys: Any) -> None:
    flux.save_pretrained(tmp_path / "flux")
    alone = tmp_path / "flux" / "transformer"
    assert main(["convert", str(alone), "--output", str(tmp_path / "out")]) == 2
    assert "is a transformer alone: name the FLUX pipeline" in capsys.readouterr().err
    nami = convert(alone, tmp_path / "out", "--encoders", str(tmp_path / "flux"))
    arguments: dict[str, Any] = {"latents": noise(), "num_inference_steps": 2, "output_type": "pt"}
    whole = convert(tmp_path / "flux", tmp_path / "whole")
    torch.testing.assert_close(nami(PROMPTS, **arguments).images, whole(PROMPTS, **arguments).images)


def test_it_converts_back(flux: FluxPipeline, tmp_path: Path) -> None:
    flux.save_pretrained(tmp_path / "flux")
    back = convert(tmp_path / "flux", tmp_path / "nami", *SPLIT).transformer.to_flux()
    assert isinstance(back, FluxTransformer2DModel)
    for name, tensor in flux.transformer.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)


def test_weights_keep_their_dtype(flux: FluxPipeline, tmp_path: Path) -> None:
    flux.to(torch.bfloat16).save_pretrained(tmp_path / "flux")
    assert main(["convert", str(tmp_path / "flux"), "--output", str(tmp_path / "nami")]) == 0
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "nami" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_layers", "1", "0", "--num_single_layers", "1", "3"], "must add up to FLUX's 2 and 4"),
        ([*SPLIT, "--window_ratios", "1", "1"], "3 stages.*2 window_ratios"),
        (["--jump", "released"], "--jump is for the authors' release"),
        (["--add_stage", "64"], "--add_stage is for a pipeline of NAMI or a run"),
    ],
)
def test_what_does_not_fit_is_refused(
    flux: FluxPipeline, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flux.save_pretrained(tmp_path / "flux")
    assert main(["convert", str(tmp_path / "flux"), "--output", str(tmp_path / "nami"), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "nami").exists()


def test_settings_that_nami_lacks_are_refused(
    flux: FluxPipeline, make_flux: MakeFlux, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flux.scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    flux.save_pretrained(tmp_path / "karras")
    assert main(["convert", str(tmp_path / "karras"), "--output", str(tmp_path / "nami")]) == 2
    assert "the scheduler's use_karras_sigmas can't be converted" in capsys.readouterr().err
    flux.scheduler = FlowMatchEulerDiscreteScheduler()
    flux.transformer = make_flux(1, 1, guidance_embeds=True)
    flux.save_pretrained(tmp_path / "dev")
    assert main(["convert", str(tmp_path / "dev"), "--output", str(tmp_path / "nami")]) == 2
    assert "has a guidance embedding" in capsys.readouterr().err
    index = tmp_path / "dev" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusion3Pipeline"}))
    assert main(["convert", str(tmp_path / "dev"), "--output", str(tmp_path / "nami")]) == 2
    assert "it is a StableDiffusion3Pipeline" in capsys.readouterr().err
