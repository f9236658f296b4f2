"""The precision in which a run draws its samples, and in which a saved model draws."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from nami_lightning.callbacks import SamplerSettings
from nami_lightning.callbacks.generation import generate
from nami_lightning.models.autoencoder import PixelCodec
from nami_lightning.runs.load import fast_dtype
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.module import NamiModule

CONVOLUTIONS: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # torch adds it at run time
TINY = Path(__file__).parents[1] / "tiny.yaml"


def make(precision: Any) -> NamiModule:
    module = Recipe(TINY).make_model()
    module.configure_model()
    module.bridge.fitted.fill_(True)
    module.trainer = L.Trainer(accelerator="cpu", precision=precision, logger=False)
    return module


@pytest.mark.parametrize(("precision", "autocast"), [("bf16-mixed", True), ("32-true", False)])
def test_a_run_draws_in_the_trainers_precision_and_crosses_bridges_in_float32(
    precision: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, seen = make(precision), []
    decode = PixelCodec.decode

    def note(part: str) -> Any:
        return lambda *_: seen.append((part, torch.is_autocast_enabled("cpu"), CONVOLUTIONS.fp32_precision))

    module.transformer.register_forward_pre_hook(note("network"))
    for map_ in module.bridge.maps:
        map_.register_forward_pre_hook(note("bridge"))
    monkeypatch.setattr(PixelCodec, "decode", lambda *inputs: (note("decoder")(), decode(*inputs))[1])
    before = CONVOLUTIONS.fp32_precision
    assert before == "tf32"  # cuDNN's default
    sampler = SamplerSettings(num_inference_steps=3, guidance_scale=1.0)
    images = generate(module, sampler, ["red apple"], [1], output_type="pt")
    assert images.dtype == torch.float32
    assert {step[:2] for step in seen} == {("network", autocast), ("bridge", False), ("decoder", False)}
    assert {step[2] for step in seen if step[0] == "bridge"} == {"ieee"}
    assert CONVOLUTIONS.fp32_precision == before


def test_a_saved_network_draws_in_bfloat16_on_a_gpu_alone() -> None:
    gpu, host = torch.device("cuda", 0), torch.device("cpu")
    assert fast_dtype(torch.float32, gpu) == torch.bfloat16
    assert fast_dtype(torch.float16, gpu) == torch.float16
    assert fast_dtype(torch.float32, host) == torch.float32
