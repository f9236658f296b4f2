"""The pipeline, with tiny random parts, against a hand-written loop of rectified flow over the transformer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from helpers.tiny_models import make_transformer
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nami_lightning.models.autoencoder import PixelCodec
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.text_encoder import TextStates
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.cuda_graphs import CudaGraphs
from nami_lightning.pipelines.nami_pipeline import NamiPipeline

pytest_plugins = "helpers.tiny_models"

TextModel = tuple[Any, PreTrainedTokenizerFast]


def _bridge(stages: int, channels: int = 3, **settings: Any) -> BridgeFlow:
    torch.manual_seed(1)
    bridge = BridgeFlow([1.0] * stages, channels, **settings)
    bridge.fitted.fill_(True)
    return bridge


def _pipeline(t5: TextModel, clip: TextModel, stages: int = 3, vae: AutoencoderKL | None = None) -> NamiPipeline:
    channels = 3 if vae is None else 4
    pipeline = NamiPipeline(
        make_transformer(stages, channels),
        _bridge(stages, channels),
        PixelCodec() if vae is None else vae,
        t5[0],
        t5[1],
        clip[0],
        clip[1],
        resolution=16 if vae is None else 32,
        max_sequence_length=8,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(t5: TextModel, clip: TextModel) -> NamiPipeline:
    """Three stages of pixels: 4, 8, 16."""
    return _pipeline(t5, clip)


def _draw(pipeline: NamiPipeline, prompt: str | list[str] | None = "a red cat", seed: int = 0, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(seed),
        "num_inference_steps": 6,
        "output_type": "latent",
    }
    return pipeline(prompt, **defaults | settings).images


# --- what comes out ------------------------------------------------------------------------------


def test_output_types(pipeline: NamiPipeline) -> None:
    prompts = ["a red cat", "the house"]
    (latents, tensor, array, pictures) = (
        _draw(pipeline, prompts, output_type=kind) for kind in ("latent", "pt", "np", "pil")
    )
    assert isinstance(latents, Tensor)
    assert latents.shape == (2, 3, 16, 16)
    assert isinstance(tensor, Tensor)
    torch.testing.assert_close(tensor, latents.clamp(-1, 1) / 2 + 0.5)
    assert isinstance(array, np.ndarray)
    np.testing.assert_allclose(array, tensor.movedim(1, -1).numpy(), atol=1e-6)
    assert [type(picture) for picture in pictures] == [Image.Image] * 2
    assert pictures[0].size == (16, 16)
    np.testing.assert_allclose(np.asarray(pictures[1]), array[1] * 255, atol=0.51)


def test_a_plain_tuple(pipeline: NamiPipeline) -> None:
    result = pipeline("a cat", num_inference_steps=3, output_type="latent", return_dict=False)
    assert isinstance(result, tuple)
    assert result[0].shape == (1, 3, 16, 16)


def test_other_sizes_and_several_images_a_prompt(pipeline: NamiPipeline) -> None:
    images = _draw(pipeline, ["a", "the"], height=24, width=8, num_images_per_prompt=3)
    assert images.shape == (6, 3, 24, 8)


def test_with_an_autoencoder(t5: TextModel, clip: TextModel, vae: AutoencoderKL) -> None:
    pipeline = _pipeline(t5, clip, vae=vae)
    latents = _draw(pipeline)
    assert latents.shape == (1, 4, 16, 16)
    images = _draw(pipeline, output_type="pt")
    with torch.no_grad():
        expected = vae.decode(latents / 0.7 + 0.2).sample
    torch.testing.assert_close(images, expected.clamp(-1, 1) / 2 + 0.5)


def test_without_a_pooled_encoder(t5: TextModel) -> None:
    torch.manual_seed(0)
    transformer = NamiTransformer2DModel(3, 2, [1], [1], 16, 2, 16, 16, [4, 6, 6]).eval()
    pipeline = NamiPipeline(transformer, _bridge(1), PixelCodec(), *t5, resolution=8, max_sequence_length=8)
    pipeline.set_progress_bar_config(disable=True)
    assert _draw(pipeline).shape == (1, 3, 8, 8)


# --- rectified flow --------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@torch.no_grad()
def test_one_stage_is_eulers_method_on_rectified_flow(t5: TextModel, clip: TextModel, guidance: float) -> None:
    pipeline = _pipeline(t5, clip, stages=1)
    image = _draw(pipeline, num_inference_steps=5, guidance_scale=guidance, negative_prompt="a dog", output_type="pt")

    states, negative = pipeline.encode_prompt(["a red cat"]), pipeline.encode_prompt(["a dog"])
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for step in range(5):
        t = torch.tensor([1 - step / 5])
        v = pipeline.transformer(x, *states, t, 0)
        if guidance > 1:
            v_negative = pipeline.transformer(x, *negative, t, 0)
            v = v_negative + guidance * (v - v_negative)
        x = x - v / 5
    torch.testing.assert_close(image, (x.clamp(-1, 1) + 1) / 2, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_stages_are_joined_by_the_bridge_and_fresh_noise(t5: TextModel, clip: TextModel) -> None:
    """Two stages written out: windows 1..1/2 and 1/2..0, and noise without its 2x2 means in between."""
    pipeline = _pipeline(t5, clip, stages=2)
    latents = _draw(pipeline, num_inference_steps=[2, 3], guidance_scale=1.0)

    states, generator = pipeline.encode_prompt(["a red cat"]), torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 8, 8, generator=generator)
    for t in (1.0, 0.75):
        x = x - pipeline.transformer(x, *states, torch.tensor([t]), 0) * 0.25
    noise = torch.randn(1, 3, 16, 16, generator=generator)
    means = noise.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = pipeline.bridge(1, x) + 0.5 * (noise - means)
    for step in range(3):
        x = x - pipeline.transformer(x, *states, torch.tensor([0.5 - step / 6]), 1) / 6
    torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-5)


# --- chance ------------------------------------------------------------------------------------------


def test_the_same_generator_gives_the_same_image(pipeline: NamiPipeline) -> None:
    assert torch.equal(_draw(pipeline), _draw(pipeline))
    assert not torch.allclose(_draw(pipeline), _draw(pipeline, seed=1), atol=0.1)


def test_images_with_their_own_generators_do_not_depend_on_the_batch(pipeline: NamiPipeline) -> None:
    prompts = ["a red cat", "the house", "a dog on the tree"]
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    together = _draw(pipeline, prompts, generator=generators)
    for index in (2, 0):
        alone = _draw(pipeline, prompts[index], generator=[torch.Generator().manual_seed(5 + index)])
        torch.testing.assert_close(together[index], alone[0], rtol=1e-4, atol=1e-4)


# --- guidance ------------------------------------------------------------------------------------------


def test_guidance_of_1_is_off(pipeline: NamiPipeline) -> None:
    rows: list[int] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    plain = _draw(pipeline, guidance_scale=1.0)
    assert set(rows) == {1}
    assert torch.equal(plain, _draw(pipeline, guidance_scale=1.0, negative_prompt="the house"))
    rows.clear()
    guided = _draw(pipeline, guidance_scale=1.0001)
    assert set(rows) == {2}
    torch.testing.assert_close(guided, plain, rtol=1e-2, atol=1e-2)


def test_negative_prompts_change_the_image(pipeline: NamiPipeline) -> None:
    empty, house = _draw(pipeline), _draw(pipeline, negative_prompt="the house")
    assert (empty - house).abs().max() > 1e-3
    assert torch.equal(empty, _draw(pipeline, negative_prompt=""))


def test_guidance_towards_the_negative_prompt_itself_is_no_guidance(pipeline: NamiPipeline) -> None:
    guided = _draw(pipeline, negative_prompt="a red cat", guidance_scale=7.0)
    torch.testing.assert_close(guided, _draw(pipeline, guidance_scale=1.0), rtol=1e-3, atol=1e-3)


def test_negative_prompts_one_for_all_or_one_a_prompt(pipeline: NamiPipeline) -> None:
    prompts = ["a red cat", "the house"]
    settings: dict[str, Any] = {"num_images_per_prompt": 2}
    each = _draw(pipeline, prompts, negative_prompt=["a dog", "a tree"], **settings)
    dog, tree = (_draw(pipeline, prompts, negative_prompt=word, **settings) for word in ("a dog", "a tree"))
    torch.testing.assert_close(each, torch.cat([dog[:2], tree[2:]]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="negative prompts"):
        _draw(pipeline, prompts, negative_prompt=["a", "the", "cat"])


def test_encoded_prompts_instead_of_prompts(pipeline: NamiPipeline) -> None:
    states, negative = pipeline.encode_prompt(["a red cat"]), pipeline.encode_prompt(["the house"])
    assert isinstance(states, TextStates)
    given = _draw(
        pipeline,
        None,
        prompt_embeds=states.sequence,
        pooled_prompt_embeds=states.pooled,
        negative_prompt_embeds=negative.sequence,
        negative_pooled_prompt_embeds=negative.pooled,
    )
    torch.testing.assert_close(given, _draw(pipeline, negative_prompt="the house"), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="prompt"):
        _draw(pipeline, None)


# --- steps ---------------------------------------------------------------------------------------------


def test_steps_are_one_number_or_one_a_stage(pipeline: NamiPipeline) -> None:
    assert torch.equal(_draw(pipeline, num_inference_steps=9), _draw(pipeline, num_inference_steps=[3, 3, 3]))
    for steps in ([3, 3], [1, 2, 3, 4], [2, 0, 2], 0):
        with pytest.raises(ValueError, match="num_inference_steps"):
            _draw(pipeline, num_inference_steps=steps)


@pytest.mark.parametrize(("height", "width"), [(20, 16), (16, 12), (4, 16)])
def test_sizes_that_do_not_fit_are_refused(pipeline: NamiPipeline, height: int, width: int) -> None:
    """One token of the coarsest of three stages covers 8 px."""
    with pytest.raises(ValueError, match="multiples of 8"):
        _draw(pipeline, height=height, width=width)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 1), ("heun", 2), ("multistep", 1)])
def test_solvers_cost_what_they_say(pipeline: NamiPipeline, solver: str, calls: int) -> None:
    seen: list[int] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[4]))
    _draw(pipeline, num_inference_steps=[1, 2, 4], solver=solver)
    assert seen == [0] * calls + [1] * 2 * calls + [2] * 4 * calls


def test_callback_sees_every_step_and_may_replace_the_latents(pipeline: NamiPipeline) -> None:
    seen: list[tuple[int, float, int, int]] = []

    def watch(pipe: NamiPipeline, step: int, t: Tensor, tensors: dict[str, Any]) -> None:
        assert pipe.current_timestep == t
        seen.append((step, float(t) / 1000, pipe.stage, tensors["latents"].shape[-1]))

    watched = _draw(pipeline, num_inference_steps=[1, 2, 2], callback_on_step_end=watch)
    assert torch.equal(watched, _draw(pipeline, num_inference_steps=[1, 2, 2]))
    assert [row[0] for row in seen] == [0, 1, 2, 3, 4]
    assert [row[1] for row in seen] == pytest.approx([1, 2 / 3, 1 / 2, 1 / 3, 1 / 6])
    assert [row[2:] for row in seen] == [(0, 4), (1, 8), (1, 8), (2, 16), (2, 16)]

    def replace(_: NamiPipeline, step: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any] | None:
        return {"latents": torch.full_like(tensors["latents"], 0.5)} if step == 4 else None

    replaced = _draw(pipeline, num_inference_steps=[1, 2, 2], callback_on_step_end=replace)
    assert torch.equal(replaced, torch.full((1, 3, 16, 16), 0.5))


# --- the house -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", [False, True])
def test_save_and_load(t5: TextModel, clip: TextModel, vae: AutoencoderKL, latent: bool, tmp_path: Path) -> None:
    pipeline = _pipeline(t5, clip, vae=vae if latent else None)
    expected = _draw(pipeline, output_type="pt")
    pipeline.save_pretrained(tmp_path)
    parts = {"transformer", "bridge", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == parts
    loaded = NamiPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for part in ("transformer", "bridge", "vae", "text_encoder", "text_encoder_2"):
        weights = getattr(loaded, part).state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in getattr(pipeline, part).state_dict().items())
    torch.testing.assert_close(_draw(loaded, output_type="pt"), expected, rtol=1e-5, atol=1e-5)


def test_save_and_load_without_a_pooled_encoder(t5: TextModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = NamiTransformer2DModel(3, 2, [1], [1], 16, 2, 16, 16, [4, 6, 6]).eval()
    pipeline = NamiPipeline(transformer, _bridge(1), PixelCodec(), *t5, resolution=8, max_sequence_length=8)
    pipeline.save_pretrained(tmp_path)
    loaded = NamiPipeline.from_pretrained(tmp_path)
    assert loaded.text_encoder is None
    torch.testing.assert_close(_draw(loaded), _draw(pipeline), rtol=1e-5, atol=1e-5)


def test_a_saved_pipeline_names_the_package_and_one_that_names_old_files_loads(t5: TextModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = NamiTransformer2DModel(3, 2, [1], [1], 16, 2, 16, 16, [4, 6, 6]).eval()
    pipeline = NamiPipeline(transformer, _bridge(1), PixelCodec(), *t5, resolution=8, max_sequence_length=8)
    pipeline.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    content = json.loads(index.read_text())
    old_homes = {"transformer": "transformer", "bridge": "bridge", "vae": "encoders"}
    assert {content[part][0] for part in old_homes} == {"nami_lightning.models"}
    for part, file in old_homes.items():
        content[part][0] = f"nami_lightning.{file}"  # as version 0.1.0 wrote it
    index.write_text(json.dumps(content))
    torch.testing.assert_close(_draw(NamiPipeline.from_pretrained(tmp_path)), _draw(pipeline), rtol=1e-5, atol=1e-5)


def test_parts_that_do_not_fit_are_refused(t5: TextModel) -> None:
    with pytest.raises(ValueError, match="2 stages, bridge 3"):
        NamiPipeline(make_transformer(2), _bridge(3), PixelCodec(), *t5)
    NamiPipeline(make_transformer(2), BridgeFlow([1, 1], 3, "matched"), PixelCodec(), *t5)


def test_bridges_that_were_never_fitted_are_saved_but_not_used(t5: TextModel, tmp_path: Path) -> None:
    """What is converted from FLUX is such a model until it is trained."""
    NamiPipeline(make_transformer(2), BridgeFlow([1, 1], 3), PixelCodec(), *t5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="never fitted"):
        _draw(NamiPipeline.from_pretrained(tmp_path))


def test_a_step_does_not_ask_all_modules_for_their_dtype(
    pipeline: NamiPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' property goes through all modules; asked thrice a step, it took longer than a small network."""
    asked: list[torch.dtype] = []

    def dtype(_: NamiTransformer2DModel) -> torch.dtype:
        asked.append(torch.float32)
        return asked[-1]

    monkeypatch.setattr(NamiTransformer2DModel, "dtype", property(dtype))
    _draw(pipeline, num_inference_steps=[1, 1, 1])
    once = len(asked)
    _draw(pipeline, num_inference_steps=[4, 4, 4])
    assert len(asked) == 2 * once


def test_cuda_graphs_need_a_gpu(pipeline: NamiPipeline) -> None:
    with pytest.raises(ValueError, match="CUDA graphs need a network on a GPU; this one is on cpu"):
        CudaGraphs(pipeline.transformer)
