"""A training stays on the GPU: its parts, run on fake CUDA tensors (see ``helpers/fake_cuda.py``)."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.fake_cuda import CUDA, Waits, devices, fake_cuda, give_gradients
from helpers.tiny_models import make_bert, make_clip, make_t5
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

from nami_lightning.callbacks import EMA
from nami_lightning.models.autoencoder import PixelCodec, Posterior, decode_latents, encode_posterior
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.flow import SolverKind
from nami_lightning.models.lora import LoraSettings, add_adapter, trained_parameters
from nami_lightning.models.text_encoder import PromptEncoder, TextSettings, TextStates
from nami_lightning.pipelines import nami_pipeline
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training import module as module_file
from nami_lightning.training.batch import Encodings, MicroBatch
from nami_lightning.training.module import NamiModule
from nami_lightning.training.step_sync import Agreement

TINY = Path(__file__).parents[1] / "tiny.yaml"
pytest_plugins = "helpers.tiny_models"

FUSED = ["--model.optimizer", "{class_path: torch.optim.AdamW, init_args: {fused: true}}"]
SIDES = (8, 16, 32)
TEXT_MODELS = {"t5": make_t5, "bert": make_bert, "clip": make_clip}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_cuda(monkeypatch):
        yield


def make() -> NamiModule:
    """The tiny recipe's module as it is on a GPU, with text states in place of a text encoder."""
    with CUDA:
        module = Recipe(TINY, FUSED).make_model()
        module.transformer = module.make_transformer()
        module.__dict__["vae"] = PixelCodec()  # not a submodule, as the property has it
    module._device = CUDA
    module.text_encoder = lambda prompts: texts(len(prompts))  # type: ignore[assignment]
    strategy = SimpleNamespace(optimizer_step=lambda optimizer, closure, **_: (closure(), optimizer.step()))
    module._trainer = SimpleNamespace(strategy=strategy, log_every_n_steps=10**9)  # type: ignore[assignment]
    return module


def texts(number: int) -> TextStates:
    return TextStates(torch.empty(number, 8, 384, device=CUDA), torch.empty(number, 384, device=CUDA))


def micro_batch(stage: int, encodings: Encodings | None = None) -> MicroBatch:
    """What a loader hands over: on the host, page-locked."""
    images = torch.zeros(2, 3, SIDES[stage], SIDES[stage], dtype=torch.uint8)
    micro = MicroBatch(0, stage, images, ["a", "b"], ["1", "2"], [0, 1], encodings=encodings)
    return micro.to(CUDA, non_blocking=True)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_loss_stays_on_the_gpu(gpu: None, stage: int) -> None:
    module, micro = make(), micro_batch(stage)
    with Waits() as waits:
        loss, tau, _ = module.flow_loss(module, module.transformer, micro, 0, 0.1)
    assert (loss.device, loss.dtype, tau.device) == (CUDA, torch.float32, CUDA)
    assert waits.copies == []


def test_text_states_on_the_host_are_found(gpu: None) -> None:
    """The tests' own test: a mixture of devices does not pass."""
    module, micro = make(), micro_batch(0)
    on_host = TextStates(torch.empty(1, 8, 384), torch.empty(1, 384))
    module.text_encoder = lambda prompts: TextStates(*(part.expand(2, *part.shape[1:]) for part in on_host))  # type: ignore[assignment]
    with pytest.raises(Exception, match=r"cuda:0.*cpu|cpu.*cuda:0"):
        module.flow_loss(module, module.transformer, micro, 0, 0.1)
    with Waits() as waits:
        torch.empty(3, device=CUDA).cpu()
        torch.empty(3).to(CUDA, non_blocking=True)
    assert waits.copies == ["cuda to cpu (3,)"]


def test_a_whole_step_waits_nowhere_but_where_the_ranks_agree(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make()
    optimizer = LightningOptimizer(module.configure_optimizers())
    optimizer._strategy = module._trainer.strategy  # type: ignore[union-attr]
    agreed, logged = list[tuple[torch.Tensor, ...]](), list[torch.Tensor]()

    def agree(
        _: Any, losses: torch.Tensor, figures: dict[str, torch.Tensor], norm: torch.Tensor, stop: bool
    ) -> Agreement:
        agreed.append((losses, *figures.values(), norm))
        return Agreement(losses, [1.0] * 3, dict.fromkeys(figures, 1.0), 1.0, finite=True, stop=False)

    monkeypatch.setattr(module_file, "agree", agree)
    monkeypatch.setattr(module, "optimizers", lambda: optimizer)
    monkeypatch.setattr(module, "manual_backward", lambda loss: give_gradients(module.transformer))
    monkeypatch.setattr(module, "log", lambda _, value, **__: logged.append(value))
    module.ratio()  # sent once a phase
    batch = [micro_batch(stage) for stage in (0, 1, 2)]
    with Waits() as waits:
        module.training_step(batch, 0)
    assert waits.copies == []
    assert (module.step, len(agreed)) == (1, 1)
    assert devices(agreed[0]) == {"cuda"}
    assert devices(logged) == {"cpu"}  # the progress bar reads it in every step
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    assert len(states) == 3 * len(list(module.transformer.parameters()))
    assert devices(states) == {"cuda"}


@pytest.mark.parametrize("name", ["t5", "bert", "clip"])
def test_encoding_prompts_waits_nowhere(gpu: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda _: False)  # as on a real device
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # needs a driver
    with CUDA:
        model, tokenizer = TEXT_MODELS[name]()
    encoder = PromptEncoder(model, tokenizer, settings=TextSettings(max_length=12))
    with Waits() as waits:
        states = encoder(["red", "a small green tree"])
        assert waits.copies == []
        mask = torch.ones(2, 12, device=CUDA)
        model(input_ids=torch.ones(2, 12, dtype=torch.long, device=CUDA), attention_mask=mask)
    assert devices(states) == {"cuda"}
    assert waits.copies  # transformers asks whether there is padding


def test_clipping_stays_on_the_gpu(gpu: None) -> None:
    module = make()
    give_gradients(module.transformer)
    with Waits() as waits:
        norm = module.clip_gradients_by_norm()
    assert (norm.device, waits.copies) == (CUDA, [])


def test_validation_stays_on_the_gpu(gpu: None) -> None:
    module = make()
    module.on_validation_epoch_start()
    micros = [micro_batch(stage) for stage in range(3)]
    with torch.no_grad(), Waits() as waits:
        for number, micro in enumerate(micros):
            module.validation_step(micro, number)
    assert (module.losses_by_tau.sums.device, waits.copies) == (CUDA, [])


@pytest.mark.parametrize("on_host", [False, True])
def test_an_ema_waits_only_if_it_is_on_the_host(gpu: None, on_host: bool) -> None:
    module = make()
    with torch.device("cpu") if on_host else CUDA:
        module.ema = module.make_transformer().requires_grad_(False)
    module.step, trainer = 1, SimpleNamespace()
    with Waits() as waits:
        EMA(device="host" if on_host else "device").on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]
    assert devices(module.ema.parameters()) == {"cpu" if on_host else "cuda"}
    assert len(waits.copies) == on_host * len(list(module.ema.parameters()))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stored_encodings_stay_on_the_gpu(gpu: None, stage: int) -> None:
    def on_host(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    def latents(side: int) -> Posterior:
        return Posterior(on_host(2, 3, side, side), on_host(2, 3, side, side))

    text, empty = TextStates(on_host(2, 8, 384), on_host(2, 384)), TextStates(on_host(1, 8, 384), on_host(1, 384))
    coarse = latents(SIDES[stage] // 2) if stage else None
    module, micro = make(), micro_batch(stage, Encodings(latents(SIDES[stage]), coarse, text, empty))
    with Waits() as waits:
        loss = module.flow_loss(module, module.transformer, micro, 0, 0.1).loss
    assert (loss.device, loss.dtype, waits.copies) == (CUDA, torch.float32, [])


def test_an_autoencoder_computes_in_its_own_dtype_under_autocast(gpu: None, vae: AutoencoderKL) -> None:
    images = torch.empty(2, 3, 32, 32, device=CUDA)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with CUDA:
            half = AutoencoderKL.from_config(vae.config)
    finally:
        torch.set_default_dtype(torch.float32)
    seen = []
    half.encoder.conv_norm_out.register_forward_hook(lambda *inputs: seen.append(inputs[-1].dtype))
    with Waits() as waits:
        posterior = encode_posterior(half, images)
        decoded = decode_latents(half, posterior.mean)
    assert seen == [torch.bfloat16]  # autocast would make it float32
    assert posterior.std is not None
    assert devices([posterior.mean, posterior.std, decoded]) == {"cuda"}
    assert {part.dtype for part in (posterior.mean, posterior.std, decoded)} == {torch.float32}
    assert waits.copies == []


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
def test_drawing_stays_on_the_gpu(gpu: None, solver: SolverKind, monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = make(), list[torch.Tensor]()
    # What reads values: whether bridges are fitted, the places of the steps (on the host), the verdict at the end.
    monkeypatch.setattr(NamiPipeline, "check_inputs", lambda *_, **__: None)
    monkeypatch.setattr(BridgeFlow, "local_times", lambda *_: [1.0, 0.5, 0.0])
    monkeypatch.setattr(nami_pipeline, "find_non_finite", lambda finite: seen.extend(flag for _, flag in finite))
    pipeline = NamiPipeline(module.transformer, module.bridge, module.vae, resolution=32)
    pipeline.set_progress_bar_config(disable=True)
    prompts, negatives = texts(2), texts(1)
    with Waits() as waits:
        images = pipeline(
            prompt_embeds=prompts.sequence,
            pooled_prompt_embeds=prompts.pooled,
            negative_prompt_embeds=negatives.sequence,
            negative_pooled_prompt_embeds=negatives.pooled,
            num_inference_steps=[2, 2, 2],
            guidance_scale=3.0,
            solver=solver,
            output_type="pt",
        ).images
    assert (images.device, images.dtype, tuple(images.shape)) == (CUDA, torch.float32, (2, 3, 32, 32))
    assert devices(seen) == {"cuda"}
    assert waits.copies == []


def test_a_lora_trains_on_the_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make()
    with CUDA, monkeypatch.context() as still:
        still.setattr(nn.Module, "_apply", lambda self, *_, **__: self)  # peft moves layers to where they are
        add_adapter(module.transformer, LoraSettings(rank=2))
    trained = [parameter for _, parameter in trained_parameters(module.transformer)]
    assert devices(trained) == {"cuda"}
    optimizer, micro = module.configure_optimizers(), micro_batch(2)
    with Waits() as waits:
        loss = module.flow_loss(module, module.transformer, micro, 0, 0.1).loss
        give_gradients(module.transformer)
        module.clip_gradients_by_norm()
        optimizer.step()
    assert (loss.device, waits.copies) == (CUDA, [])
    assert all(parameter.grad is None for parameter in module.transformer.parameters() if not parameter.requires_grad)
    assert sum(parameter.numel() for parameter in trained) == sum(
        parameter.numel() for group in optimizer.param_groups for parameter in group["params"]
    )
