"""A script written for FluxPipeline, with the class name changed; and what a NAMI's stages add to it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TorchAoConfig,
)
from helpers.tiny_models import TextModel, make_pipeline
from PIL import Image
from torch import Tensor

from nami_lightning.models import flow
from nami_lightning.models.autoencoder import PixelCodec
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.pipelines.stages import share_steps

pytest_plugins = "helpers.tiny_models"


@pytest.fixture
def pipeline(t5: TextModel, clip: TextModel) -> NamiPipeline:
    """Two stages of pixels: 8 and 16."""
    return make_pipeline(t5, clip)


@pytest.fixture
def deep(t5: TextModel, clip: TextModel) -> NamiPipeline:
    """Two stages of pixels, the first with three blocks."""
    torch.manual_seed(0)
    transformer = NamiTransformer2DModel(3, 2, [1, 0], [2, 2], 16, 2, 16, 12, [4, 6, 6]).eval()
    bridge = BridgeFlow([1, 1], 3, "matched")
    pipeline = NamiPipeline(transformer, bridge, PixelCodec(), *t5, *clip, resolution=16, max_sequence_length=8)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: NamiPipeline, seed: int = 0, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"num_inference_steps": [2, 3], "output_type": "pt"}
    return pipeline("a red cat", generator=torch.Generator().manual_seed(seed), **defaults | settings).images


def test_a_script_for_flux_runs(pipeline: NamiPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)

    pipe = NamiPipeline.from_pretrained(str(tmp_path), torch_dtype=torch.bfloat16)  # written for FluxPipeline
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.set_attention_backend("native")
    seen: list[int] = []

    def on_step_end(pipe: Any, step: int, timestep: Tensor, callback_kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(int(timestep.item()))
        assert set(callback_kwargs) == {"latents", "prompt_embeds"}
        return callback_kwargs

    images = pipe(
        prompt=["a red cat", "the house"],
        negative_prompt="a dog",
        height=16,
        width=24,
        num_inference_steps=5,
        guidance_scale=3.5,
        num_images_per_prompt=2,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="pil",
        joint_attention_kwargs={"scale": 0.5},
        callback_on_step_end=on_step_end,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        max_sequence_length=4,
    ).images

    assert [image.size for image in images] == [(24, 16)] * 4
    assert pipe.num_timesteps == 5
    assert seen[0] == 1000
    assert len(seen) == 5
    assert seen == sorted(seen, reverse=True)


# --- steps and guidance of the stages ------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "default", "steps"),
    [
        (28, [10, 10, 10], [10, 9, 9]),
        (30, [10, 10, 10], [10, 10, 10]),
        (3, [10, 10, 10], [1, 1, 1]),
        (20, [12, 6, 2], [12, 6, 2]),
        (10, [12, 6, 2], [6, 3, 1]),
        (3, [12, 6, 2], [1, 1, 1]),
        (4, [100, 1, 1, 1], [1, 1, 1, 1]),
        (7, [7], [7]),
    ],
)
def test_a_total_is_shared_out_as_the_default_says(total: int, default: list[int], steps: list[int]) -> None:
    assert share_steps(total, default) == steps
    assert share_steps(steps, default) == steps


def test_the_models_defaults_are_saved_and_used(pipeline: NamiPipeline, tmp_path: Path) -> None:
    pipeline.register_to_config(num_inference_steps=[4, 1], guidance_scale=[2.0, 1.0], solver="multistep")
    pipeline.save_pretrained(tmp_path)
    loaded = NamiPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    stated = draw(pipeline, num_inference_steps=[4, 1], guidance_scale=[2.0, 1.0], solver="multistep")
    torch.testing.assert_close(draw(loaded, num_inference_steps=None), stated)
    assert not torch.allclose(draw(loaded, num_inference_steps=None, solver="euler"), stated)
    torch.testing.assert_close(
        draw(loaded, num_inference_steps=10), draw(pipeline, num_inference_steps=[8, 2]), msg="shared out as 4 to 1"
    )


def test_guidance_of_a_stage(pipeline: NamiPipeline) -> None:
    rows: list[tuple[int, int]] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, inputs: rows.append((inputs[4], len(inputs[0]))))
    draw(pipeline, guidance_scale=[3.0, 1.0])
    assert rows == [(0, 2)] * 2 + [(1, 1)] * 3
    torch.testing.assert_close(draw(pipeline, guidance_scale=[3.0, 3.0]), draw(pipeline, guidance_scale=3.0))


# --- between and after the stages ----------------------------------------------------------------


def test_images_of_the_stages(pipeline: NamiPipeline) -> None:
    output = pipeline("a red cat", num_inference_steps=4, output_type="pil", output_stages=True)
    assert [stage[0].size for stage in output.stages] == [(8, 8), (16, 16)]
    assert list(output.stages[-1][0].getdata()) == list(output.images[0].getdata())


def test_the_estimate_of_stage_1_is_exact_for_a_straight_flow() -> None:
    noise, clean = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for window in (*flow.make_windows([2, 1, 1]), flow.make_windows([1, 1], velocity_time="local")[0]):
        start, end = (flow.add_noise(clean, noise, sigma) for sigma in (window.start, window.end))
        x, velocity = 0.3 * start + 0.7 * end, flow.velocity_target(start, end, window)
        torch.testing.assert_close(flow.clean_estimate(x, velocity, 0.3, window), clean)


def test_an_interrupt_returns_what_there_is(pipeline: NamiPipeline) -> None:
    steps: list[int] = []

    def stop(pipe: NamiPipeline, step: int, _: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(step)
        pipe.interrupt = step == 0
        assert tensors["clean_latents"].shape == (1, 3, 8, 8)
        return {}

    inputs: dict[str, Any] = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ["clean_latents"]}
    assert draw(pipeline, **inputs).shape == (1, 3, 8, 8)
    assert steps == [0]
    assert draw(pipeline).shape == (1, 3, 16, 16)


# --- an image, drawn anew ------------------------------------------------------------------------


def picture() -> Image.Image:
    """A picture with a coarse layout and a fine pattern."""
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 8, 16))
    for x in range(0, 16, 2):
        image.putpixel((x, 3), (255, 0, 0))
    return image


def test_all_of_an_image_drawn_anew_is_drawn_from_noise(pipeline: NamiPipeline) -> None:
    torch.testing.assert_close(draw(pipeline, image=picture()), draw(pipeline))


def test_strength_is_the_share_of_steps_that_run(pipeline: NamiPipeline) -> None:
    stages: list[int] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, inputs: stages.append(inputs[4]))
    for settings, expected in (
        ({"strength": 0.8}, [0, 1, 1, 1]),
        ({"strength": 0.2}, [1]),
        ({"entry_stage": 1}, [1, 1, 1]),
        ({"entry_stage": 1, "strength": 0.67}, [1, 1]),
    ):
        stages.clear()
        draw(pipeline, image=picture(), guidance_scale=1.0, **settings)
        assert stages == expected


@torch.no_grad()
def test_entering_at_a_stage_is_its_flow_from_the_images_own_point(pipeline: NamiPipeline) -> None:
    drawn = draw(pipeline, image=picture(), entry_stage=1, strength=0.67, guidance_scale=1.0, output_type="latent")

    window, noise = pipeline.bridge.windows[1], torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    fine, coarse = (pipeline.image_processor.preprocess(picture().resize((side, side), 3)) for side in (16, 8))
    start, end = pipeline.bridge.endpoints(1, fine, coarse, noise)
    x = 2 / 3 * start + 1 / 3 * end
    states = pipeline.encode_prompt("a red cat")
    for tau in (2 / 3, 1 / 3):
        v = pipeline.transformer(x, *states, torch.tensor([window.timestep(tau)]), 1)
        x = x - window.duration / 3 * v
    # The small image: Pillow rounds to whole levels, torch doesn't.
    torch.testing.assert_close(drawn, x, rtol=0, atol=0.03)


def test_the_detail_may_stay_the_images(pipeline: NamiPipeline) -> None:
    latents = draw(pipeline, image=picture(), keep_detail=True, output_type="latent")
    image = pipeline.image_processor.preprocess(picture())
    torch.testing.assert_close(flow.detail(latents), flow.detail(image), rtol=0, atol=1e-5)
    assert (flow.pool(latents) - flow.pool(image)).abs().mean() > 0.1


# --- what makes it smaller or faster -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["first block", "broadcast"])
def test_step_caches_start_anew_at_each_stage(deep: NamiPipeline, kind: str) -> None:
    expected = draw(deep, guidance_scale=1.0)
    calls: list[int] = []
    last = deep.transformer.single_transformer_blocks[1]
    counted, forward = calls.append, last.attn.forward

    def count(*arguments: Any, **keywords: Any) -> Any:
        counted(1)
        return forward(*arguments, **keywords)

    last.attn.forward = count
    timestep = {"current_timestep_callback": lambda: deep.current_timestep}
    ranges: dict[str, Any] = {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 1001),
        "spatial_attention_block_identifiers": ("transformer_blocks",),
    }
    config = {
        "first block": lambda: FirstBlockCacheConfig(threshold=1e9),
        "broadcast": lambda: PyramidAttentionBroadcastConfig(**ranges, **timestep),
    }[kind]()
    deep.transformer.enable_cache(config)
    cached, again = draw(deep, guidance_scale=1.0), draw(deep, guidance_scale=1.0)
    torch.testing.assert_close(cached, again)
    assert len(calls) < 2 * 5
    assert not torch.equal(cached, expected)
    deep.transformer.disable_cache()
    torch.testing.assert_close(draw(deep, guidance_scale=1.0), expected)


def test_a_cache_that_never_skips_changes_nothing(deep: NamiPipeline) -> None:
    expected = draw(deep)
    deep.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    torch.testing.assert_close(draw(deep), expected)


def test_a_first_block_cache_needs_two_blocks(t5: TextModel) -> None:
    one = NamiTransformer2DModel(3, 2, [1, 1], [0, 0], 16, 2, 16, 12, [4, 6, 6])
    with pytest.raises(ValueError, match="two blocks in stage 1"):
        one.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="FasterCacheConfig takes a call for one flow"):
        one.enable_cache(FasterCacheConfig())


def test_layerwise_casting_and_group_offloading(deep: NamiPipeline) -> None:
    expected = draw(deep)
    deep.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "block_level", 1)
    torch.testing.assert_close(draw(deep), expected)
    deep.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert deep.transformer.x_embedder.weight.dtype == torch.bfloat16
    torch.testing.assert_close(draw(deep), expected, rtol=0, atol=0.05)


def test_an_autoencoder_in_tiles_and_slices(t5: TextModel, clip: TextModel, vae: AutoencoderKL) -> None:
    torch.manual_seed(0)
    transformer = NamiTransformer2DModel(4, 2, [1, 0], [1, 1], 16, 2, 16, 12, [4, 6, 6]).eval()
    pipeline = NamiPipeline(transformer, BridgeFlow([1, 1], 4, "matched"), vae, *t5, *clip, resolution=32)
    pipeline.set_progress_bar_config(disable=True)
    expected = draw(pipeline, num_images_per_prompt=2)
    vae.enable_slicing()
    torch.testing.assert_close(draw(pipeline, num_images_per_prompt=2), expected)
    vae.disable_slicing()
    vae.enable_tiling()  # blends the tiles' borders
    assert draw(pipeline, num_images_per_prompt=2).shape == expected.shape


def test_8_bit_weights_by_torchao(deep: NamiPipeline, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao", reason="needs the extra float8")
    assert torchao
    from torchao.quantization import Int8WeightOnlyConfig

    expected = draw(deep)
    deep.transformer.save_pretrained(tmp_path)
    deep.transformer = NamiTransformer2DModel.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    layer = deep.transformer.single_transformer_blocks[0].proj_mlp.weight
    assert type(layer).__name__ == "Int8Tensor", type(layer)
    quantized = draw(deep)
    assert not torch.equal(quantized, expected)
    torch.testing.assert_close(quantized, expected, rtol=0, atol=0.1)
