"""LoRAs in a pipeline, against weights added by hand; one of another model is refused before anything is loaded."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from helpers.tiny_models import MakeFlux, TextModel, make_pipeline, make_transformer
from safetensors.torch import load_file, save_file
from torch import Tensor

from nami_lightning.models.lora import LoraSettings, add_adapter
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.lora import load_loras, save_lora, split_weight
from nami_lightning.pipelines.nami_pipeline import NamiPipeline

pytest_plugins = "helpers.tiny_models"

FILE = "pytorch_lora_weights.safetensors"
LAYER = "single_transformer_blocks.0.attn.to_q"


@pytest.fixture
def pipeline(t5: TextModel, clip: TextModel) -> NamiPipeline:
    return make_pipeline(t5, clip)


def make_lora(folder: Path, transformer: NamiTransformer2DModel, seed: int, settings: LoraSettings) -> Path:
    """Write a LoRA with random weights, whose alpha is not its rank."""
    network = copy.deepcopy(transformer)
    add_adapter(network, settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_lora(folder, network)
    return folder


@pytest.fixture
def loras(pipeline: NamiPipeline, tmp_path: Path) -> tuple[Path, Path]:
    one = make_lora(tmp_path / "one", pipeline.transformer, 1, LoraSettings(rank=4, alpha=8))
    two = make_lora(tmp_path / "two", pipeline.transformer, 2, LoraSettings(rank=2, target_modules=["attn.to_q"]))
    return one, two


def velocity(transformer: NamiTransformer2DModel, **keywords: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 8, 8), (2, 5, 16), (2, 12), (2,)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    with torch.no_grad():
        output: Tensor = transformer(*inputs, 1, **keywords)
    return output


def with_added(transformer: NamiTransformer2DModel, *loras: tuple[Path, float]) -> NamiTransformer2DModel:
    """Return a copy of a network to whose weights LoRAs are added by hand: factor * B A each."""
    network = copy.deepcopy(transformer)
    for folder, factor in loras:
        weights = load_file(folder / FILE)
        for name in (name for name in weights if name.endswith("lora_A.weight")):
            layer: Any = network.get_submodule(name.removeprefix("transformer.").removesuffix(".lora_A.weight"))
            layer.weight.data += factor * weights[name.replace("lora_A", "lora_B")] @ weights[name]
    return network


def test_several_loras_have_their_weights(pipeline: NamiPipeline, loras: tuple[Path, Path]) -> None:
    base = copy.deepcopy(pipeline.transformer)
    pipeline.load_lora_weights(loras[0], adapter_name="one")
    torch.testing.assert_close(velocity(pipeline.transformer), velocity(with_added(base, (loras[0], 8 / 4))))
    pipeline.load_lora_weights(loras[1], adapter_name="two")
    pipeline.set_adapters(["one", "two"], [0.5, -2.0])
    expected = velocity(with_added(base, (loras[0], 0.5 * 8 / 4), (loras[1], -2.0)))
    torch.testing.assert_close(velocity(pipeline.transformer), expected)
    assert (expected - velocity(base)).abs().max() > 0.1


def test_fused_is_unfused_and_unloaded_is_the_base(pipeline: NamiPipeline, loras: tuple[Path, Path]) -> None:
    before = velocity(pipeline.transformer)
    pipeline.load_lora_weights(loras[0])
    apart = velocity(pipeline.transformer)
    pipeline.fuse_lora()
    torch.testing.assert_close(velocity(pipeline.transformer), apart, rtol=0, atol=1e-5)
    pipeline.unfuse_lora()
    torch.testing.assert_close(velocity(pipeline.transformer), apart, rtol=0, atol=1e-5)
    pipeline.disable_lora()
    torch.testing.assert_close(velocity(pipeline.transformer), before, rtol=0, atol=1e-5)
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(loras[1])
    pipeline.unload_lora_weights()
    assert not any("lora" in name for name, _ in pipeline.transformer.named_modules())


def test_unloading_leaves_the_base_bit_for_bit(pipeline: NamiPipeline, loras: tuple[Path, Path]) -> None:
    before = velocity(pipeline.transformer)
    pipeline.load_lora_weights(loras[0])
    pipeline.disable_lora()
    assert torch.equal(velocity(pipeline.transformer), before)
    pipeline.unload_lora_weights()
    assert torch.equal(velocity(pipeline.transformer), before)


def test_scale_multiplies_all_loras_of_a_call(pipeline: NamiPipeline, loras: tuple[Path, Path]) -> None:
    base = copy.deepcopy(pipeline.transformer)
    assert torch.equal(velocity(base, joint_attention_kwargs={"scale": 0.5}), velocity(base))
    pipeline.load_lora_weights(loras[0])
    full = velocity(pipeline.transformer)
    scaled = velocity(pipeline.transformer, joint_attention_kwargs={"scale": 0.25})
    torch.testing.assert_close(scaled, velocity(with_added(base, (loras[0], 0.25 * 8 / 4))))
    assert torch.equal(velocity(pipeline.transformer), full)


def test_saved_again_it_is_the_same_lora(pipeline: NamiPipeline, loras: tuple[Path, Path], tmp_path: Path) -> None:
    pipeline.load_lora_weights(loras[0], adapter_name="one")
    expected = velocity(pipeline.transformer)
    pipeline.transformer.save_lora_adapter(tmp_path / "again", adapter_name="one")
    pipeline.unload_lora_weights()
    pipeline.transformer.load_lora_adapter(tmp_path / "again", prefix=None, use_safetensors=True)
    assert torch.equal(velocity(pipeline.transformer), expected)


def of_other_widths(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros(4, 48) if "lora_A" in name else torch.zeros(48, 4) for name in weights}


def of_unknown_layers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {name.replace("blocks.0", "blocks.7"): tensor.clone() for name, tensor in weights.items()}


def with_text_encoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"text_encoder.text_model.encoder.layers.0.q_proj.lora_A.weight": torch.zeros(4, 12)}


def with_half_a_layer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name != f"transformer.{LAYER}.lora_B.weight"}


def without_loras(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"transformer.norm_out.linear.weight": torch.zeros(64, 32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_other_widths, r"one is a LoRA of another model: its \S+ maps 48 numbers to 48, this model's 32 to"),
        (of_unknown_layers, r"one is not a LoRA of this model: the transformer has no place for its .*blocks.7"),
        (with_text_encoder, "no place for its text_encoder.text_model.encoder.layers.0.q_proj.lora_A.weight$"),
        (with_half_a_layer, rf"one is not whole: {LAYER} needs both lora_A.weight and lora_B.weight"),
        (without_loras, "no place for its transformer.norm_out.linear.weight$"),
    ],
)
def test_a_lora_of_another_model_is_refused(
    pipeline: NamiPipeline, loras: tuple[Path, Path], change: Any, message: str
) -> None:
    weights = load_file(loras[0] / FILE)
    save_file(change(weights), loras[0] / FILE)
    before = velocity(pipeline.transformer)
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora_weights(loras[0])
    assert pipeline.get_list_adapters() == {}
    assert torch.equal(velocity(pipeline.transformer), before)


def test_a_list_of_loras(pipeline: NamiPipeline, loras: tuple[Path, Path]) -> None:
    base = copy.deepcopy(pipeline.transformer)
    assert load_loras(pipeline, []) == []
    assert load_loras(pipeline, [f"{loras[0]}:0.5", str(loras[1])]) == ["lora_1", "lora_2"]
    expected = velocity(with_added(base, (loras[0], 0.5 * 8 / 4), (loras[1], 1.0)))
    torch.testing.assert_close(velocity(pipeline.transformer), expected)


def test_of_a_list_all_loras_are_loaded_or_none(pipeline: NamiPipeline, loras: tuple[Path, Path]) -> None:
    before = velocity(pipeline.transformer)
    save_file(of_other_widths(load_file(loras[1] / FILE)), loras[1] / FILE)
    with pytest.raises(ValueError, match="is a LoRA of another model"):
        load_loras(pipeline, [str(loras[0]), str(loras[1])])
    assert torch.equal(velocity(pipeline.transformer), before)
    with pytest.raises(FileNotFoundError, match=r"no LoRA at .*nothing"):
        load_loras(pipeline, [str(loras[0] / "nothing")])
    with pytest.raises(ValueError, match="a dict takes no LoRA"):
        load_loras({}, [str(loras[0])])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a/b", ("a/b", 1.0)),
        ("a/b:0.5", ("a/b", 0.5)),
        ("a/b:-2", ("a/b", -2.0)),
        ("c:/a", ("c:/a", 1.0)),
        ("0.5", ("0.5", 1.0)),
    ],
)
def test_a_weight_follows_the_last_colon(text: str, parts: tuple[str, float]) -> None:
    assert split_weight(text) == parts


def test_attention_can_be_fused_and_replaced() -> None:
    transformer = make_transformer(2)
    before = velocity(transformer)
    transformer.set_attn_processor(FluxAttnProcessor())
    assert torch.equal(velocity(transformer), before)
    assert len(transformer.attn_processors) == 3
    transformer.fuse_qkv_projections()
    torch.testing.assert_close(velocity(transformer), before)
    transformer.unfuse_qkv_projections()
    assert torch.equal(velocity(transformer), before)


def test_a_single_file_of_flux_is_a_start(make_flux: MakeFlux, tmp_path: Path) -> None:
    flux: FluxTransformer2DModel = make_flux(2, 4)
    flux.save_pretrained(tmp_path)
    nami = NamiTransformer2DModel.from_single_file(
        str(tmp_path / "diffusion_pytorch_model.safetensors"), [1, 1], [1, 3], config=str(tmp_path)
    )
    assert nami.num_stages == 2
    assert all(torch.equal(weight, flux.state_dict()[name]) for name, weight in nami.state_dict().items())
