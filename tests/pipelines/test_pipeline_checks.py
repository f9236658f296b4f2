"""What the pipeline refuses, images that are not finite, half precision and offloading, with tiny random parts."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ModelMixin
from helpers.tiny_models import TextModel, make_pipeline
from torch import Tensor

from nami_lightning.models.autoencoder import PixelCodec
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.pipelines.checks import NonFiniteImages
from nami_lightning.pipelines.nami_pipeline import NamiPipeline

pytest_plugins = "helpers.tiny_models"


@pytest.fixture
def pipeline(t5: TextModel, clip: TextModel) -> NamiPipeline:
    """Two stages of pixels: 8 and 16."""
    return make_pipeline(t5, clip)


def draw(pipeline: NamiPipeline, prompt: Any = "a red cat", **settings: Any) -> Any:
    defaults: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    return pipeline(prompt, **defaults | settings).images


def generators(number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(5 + i) for i in range(number)]


# --- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "give either a prompt or prompt_embeds"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": 7}, "prompt must be a string or a list of strings; got int"),
        ({"prompt": ["a", None]}, r"prompt\[1\] must be a string; got NoneType"),
        ({"negative_prompt": []}, "negative_prompt is an empty list"),
        ({"negative_prompt": {"a": 1}}, "negative_prompt must be a string or a list"),
        ({"prompt": ["a"] * 3, "negative_prompt": ["a"] * 2}, "2 negative prompts for 3 prompts"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number of at least 1; got 0"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt must be a whole number"),
        ({"prompt": ["a", "a"], "generator": generators(3)}, "3 generators for 2 images"),
        ({"num_images_per_prompt": 3, "generator": generators(1)}, "1 generators for 3 images"),
        ({"generator": 7}, "generator must be a torch.Generator or a list of them; got int"),
        ({"generator": [None]}, "generator must be a torch.Generator or a list of them; got NoneType"),
        ({"height": 0}, "height 0 and width 16 must be multiples of 4 px"),
        ({"width": 17}, "must be multiples of 4 px"),
        ({"height": -16}, "must be multiples of 4 px"),
        ({"height": 16.0}, "must be multiples of 4 px"),
        (
            {"num_inference_steps": 0},
            "num_inference_steps 0 must be the number of all stages' steps",
        ),
        ({"num_inference_steps": 1}, "num_inference_steps 1 must be .* at least 2"),
        ({"num_inference_steps": 1.5}, "num_inference_steps 1.5 must be .* a list of 2"),
        ({"num_inference_steps": []}, "num_inference_steps"),
        ({"num_inference_steps": [4]}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number, or one a stage; got nan"),
        ({"guidance_scale": "high"}, "guidance_scale must be a number, or one a stage; got 'high'"),
        ({"guidance_scale": [1.0, 2.0, 3.0]}, r"guidance_scale .* must be one number, or 2 \(one a stage\)"),
        ({"max_sequence_length": 0}, "max_sequence_length must be a whole number"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"callback_on_step_end_tensor_inputs \['noise'\] are none"),
        ({"strength": 0.5}, "strength, entry_stage and keep_detail .* give an image"),
        ({"image": torch.zeros(1, 3, 16, 16), "strength": 0.0}, "strength must be above 0 and at most 1; got 0.0"),
        ({"image": torch.zeros(1, 3, 16, 16), "entry_stage": 2}, "entry_stage must be a stage, 0 to 1; got 2"),
        ({"image": torch.zeros(3, 3, 16, 16)}, "3 images for a batch of 1"),
        ({"solver": "rk4"}, "solver must be one of euler, heun, multistep; got 'rk4'"),
        ({"output_type": "jpg"}, "output_type must be one of pil, np, pt, latent; got 'jpg'"),
    ],
)
def test_wrong_inputs_are_named_before_anything_runs(
    pipeline: NamiPipeline, arguments: dict[str, Any], message: str
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a model ran")

    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        part.register_forward_pre_hook(never)
    with pytest.raises(ValueError, match=message):
        draw(pipeline, **arguments)


def test_noise_is_of_the_coarsest_stage_or_of_all(pipeline: NamiPipeline) -> None:
    shapes = [(2, 3, 8, 8), (2, 3, 16, 16)]
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    drawn = draw(pipeline, ["a", "the"], latents=noise)
    again = draw(pipeline, ["a", "the"], latents=noise, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(drawn, again)
    coarse = draw(pipeline, ["a", "the"], latents=noise[0], generator=torch.Generator().manual_seed(7))
    assert not torch.allclose(drawn, coarse)
    for wrong, message in ((noise[1], r"got \(2, 3, 16, 16\)"), (noise[::-1], "got "), ([], "got an empty list")):
        with pytest.raises(ValueError, match=f"latents must be the noise of the coarsest stage.*{message}"):
            draw(pipeline, ["a", "the"], latents=wrong)


def test_encoded_prompts_are_checked_too(pipeline: NamiPipeline) -> None:
    sequence, pooled = pipeline.encode_prompt(["a", "the"])
    states = {"prompt_embeds": sequence, "pooled_prompt_embeds": pooled}
    negative = {f"negative_{name}": value for name, value in states.items()}
    narrow = {"prompt_embeds": sequence[..., :5], "pooled_prompt_embeds": pooled}
    for arguments, message in (
        ({"prompt": "a"} | states, "either a prompt or prompt_embeds, not both"),
        ({"negative_prompt": "a"} | negative, "either a negative_prompt or negative_prompt_embeds, not both"),
        ({"prompt": None} | narrow, r"\(prompts, tokens, 16\) and \(prompts, 12\); got \(2, \d+, 5\)"),
        (
            {"prompt": None, "prompt_embeds": sequence},
            "pooled_prompt_embeds must both .* got Tensor and NoneType",
        ),
        ({"prompt": None, "prompt_embeds": [1], "pooled_prompt_embeds": pooled}, "got list and Tensor"),
        ({"prompt": ["a"] * 3} | negative, "2 negative prompts for 3 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pipeline, **arguments)


def test_one_string_is_one_prompt(pipeline: NamiPipeline) -> None:
    one, listed = pipeline.encode_prompt("red cat"), pipeline.encode_prompt(["red cat"])
    assert one.pooled.shape == (1, 12)
    assert torch.equal(one.sequence, listed.sequence)
    for wrong in ([], None, [1]):
        with pytest.raises(ValueError, match="prompt"):
            pipeline.encode_prompt(wrong)  # type: ignore[arg-type]


def test_no_negative_prompt_is_the_empty_one(pipeline: NamiPipeline) -> None:
    none, empty = (draw(pipeline, negative_prompt=text, generator=generators(1)) for text in (None, ""))
    assert torch.equal(none, empty)


def test_generators_may_come_as_a_tuple(pipeline: NamiPipeline) -> None:
    listed, given = (draw(pipeline, ["a", "the"], generator=kind(generators(2))) for kind in (list, tuple))
    assert torch.equal(listed, given)


# --- images that are not finite ------------------------------------------------------------------


def poison(pipeline: NamiPipeline, stage: int, rows: list[int]) -> None:
    """Let the network give NaN for some rows of a batch at one stage."""

    def spoil(_: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if inputs[4] == stage:
            output[rows] = float("nan")
        return output

    pipeline.transformer.register_forward_hook(spoil)


@pytest.mark.parametrize("kind", ["latent", "pt", "np", "pil"])
def test_images_that_are_not_finite_are_an_error_that_names_them(pipeline: NamiPipeline, kind: str) -> None:
    poison(pipeline, 1, [2])
    prompts = ["a red cat", "the tree"]
    settings: dict[str, Any] = {"guidance_scale": 1.0, "generator": generators(4), "num_images_per_prompt": 2}
    with pytest.raises(NonFiniteImages, match=r"image 2 \(prompt 'the tree', seed 7, since stage 2\)") as caught:
        draw(pipeline, prompts, output_type=kind, **settings)
    assert caught.value.origins == {2: "stage 2"}
    assert len(caught.value.images) == 4, "the others are there"


def test_all_images_of_a_damaged_network_are_counted(pipeline: NamiPipeline) -> None:
    poison(pipeline, 0, [0, 1, 2, 3, 4])
    with pytest.raises(NonFiniteImages, match=r"image 0 \(prompt 'a', since stage 1\).* and 2 more") as caught:
        draw(pipeline, ["a"] * 5, guidance_scale=1.0)
    assert set(caught.value.origins.values()) == {"stage 1"}


def test_a_decoder_that_overflows_is_named(t5: TextModel, clip: TextModel, vae: AutoencoderKL) -> None:
    pipeline = make_pipeline(t5, clip, vae=vae)
    vae.decoder.register_forward_hook(lambda _, inputs, output: output / 0)
    with pytest.raises(NonFiniteImages, match="since decoding"):
        draw(pipeline, output_type="pil")
    draw(pipeline, output_type="latent")


# --- half precision and offloading -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("latent", [False, True])
def test_half_precision(
    t5: TextModel, clip: TextModel, vae: AutoencoderKL, dtype: torch.dtype, latent: bool, tmp_path: Path
) -> None:
    exact = make_pipeline(t5, clip, vae=vae if latent else None)
    exact.save_pretrained(tmp_path)
    weights = {name: weight.clone() for name, weight in exact.bridge.state_dict().items()}
    expected = draw(exact, output_type="pt", generator=generators(1))
    loaded = NamiPipeline.from_pretrained(tmp_path, torch_dtype=dtype)

    def watch(_: NamiPipeline, step: int, t: float, state: dict[str, Any]) -> None:
        assert state["latents"].dtype == torch.float32, "the solver's state is not rounded"

    for half in (loaded, exact.to(dtype)):
        half.set_progress_bar_config(disable=True)
        assert half.transformer.dtype == half.text_encoder_2.dtype == dtype
        kept = half.bridge.state_dict()
        assert all(torch.equal(kept[name], weight) for name, weight in weights.items()), "bridges stay as they were"
        image = draw(
            half,
            output_type="pt",
            generator=generators(1),
            callback_on_step_end=watch,
        )
        torch.testing.assert_close(image, expected, rtol=0, atol=0.1)


def test_small_exact_models_move_but_never_lose_precision() -> None:
    models: list[ModelMixin] = [BridgeFlow([1.0, 1.0], 3), PixelCodec()]
    for model in models:
        for change in (
            model.half,
            model.bfloat16,
            partial(model.to, torch.float16),
            partial(model.to, "cpu", torch.half),
        ):
            change()
            assert {tensor.dtype for tensor in model.state_dict().values()} <= {torch.float32, torch.bool}
        assert model.to("meta").device.type == "meta"


@pytest.mark.parametrize("latent", [False, True])
def test_offloading_of_whole_models(t5: TextModel, clip: TextModel, vae: AutoencoderKL, latent: bool) -> None:
    pipeline = make_pipeline(t5, clip, vae=vae if latent else None)
    expected = draw(pipeline, output_type="pt", generator=generators(1))
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        image = draw(pipeline, output_type="pt", generator=generators(1))
        torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("latent", [False, True])
def test_offloading_computes_on_one_device(
    t5: TextModel, clip: TextModel, vae: AutoencoderKL, latent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights lie on the CPU, and everything is computed on another device: torch's meta, which has no numbers."""
    pipeline = make_pipeline(t5, clip, vae=vae if latent else None)
    states = pipeline.encode_prompt("a red cat")
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.empty_device_cache", lambda _: None)
    pipeline.enable_model_cpu_offload(device="meta")
    assert pipeline.text_encoder_2.device.type == pipeline.transformer.device.type == "cpu"
    monkeypatch.setattr("accelerate.hooks.UserCpuOffloadHook.offload", lambda _: None)  # nothing comes back from meta
    monkeypatch.setattr(pipeline, "maybe_free_model_hooks", lambda: None)
    monkeypatch.setattr("nami_lightning.pipelines.nami_pipeline.find_non_finite", lambda finite: {})
    monkeypatch.setattr(pipeline, "check_inputs", lambda **_: None)  # it asks whether the bridges are fitted
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())  # meta has none
    for kind in ("bidirectional", "causal"):  # they look at the numbers of the masks
        monkeypatch.setattr(f"transformers.masking_utils._ignore_{kind}_mask_sdpa", lambda *_, **__: False)
    encoded = {"prompt": None, "prompt_embeds": states.sequence, "pooled_prompt_embeds": states.pooled}
    for given in ({"prompt": "a red cat"}, encoded):
        image = draw(pipeline, **given, output_type="pt", generator=generators(1))
        assert (image.device.type, image.shape) == ("meta", (1, 3, 16, 16))
