"""The callbacks on a small run of real data: against formulas, scipy, and each other."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nami_lightning.callbacks import EMA, BridgePretraining, Metrics, RunCheckpoint, Throughput
from nami_lightning.callbacks.throughput import StageMemory
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.module import NamiModule

SHORT = [
    "--curriculum.phases",
    "[{steps: 6, ratio: [2, 1, 1], learning_rate: 0.002}]",
    "--data.init_args.num_workers",
    "0",
]


def fit(
    tiny: list[str], callbacks: list[L.Callback], overrides: list[str] = SHORT
) -> tuple[NamiModule, Any, L.Trainer]:
    """Train the tiny recipe with other callbacks."""
    model, data, trainer = Recipe(tiny[0], [*tiny[1:], *overrides]).make()
    trainer.callbacks = [*callbacks, *[c for c in trainer.callbacks if isinstance(c, RunCheckpoint)]]  # type: ignore[attr-defined]
    trainer.fit(model, data)
    return model, data, trainer


class Recorder(L.Callback):
    """Copies the weights after each step."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.weights.append([p.detach().double().clone() for p in pl_module.transformer.parameters()])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.on_train_start(trainer, pl_module)


@pytest.mark.parametrize("every", [1, 2])
def test_ema_is_the_moving_average_of_the_weights(tiny: list[str], every: int) -> None:
    recorder = Recorder()
    model, _, _ = fit(tiny, [BridgePretraining(samples=16), recorder, EMA(decay=0.5, every_n_steps=every)])
    expected = recorder.weights[0]
    for step, weights in enumerate(recorder.weights[1:], start=1):
        if step % every == 0:
            decay = min(0.5, (1 + step) / (10 + step)) ** every
            expected = [decay * old + (1 - decay) * new for old, new in zip(expected, weights, strict=True)]
    assert model.ema is not None
    for found, value in zip(model.ema.parameters(), expected, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-7)


def outputs(bridge: BridgeFlow, stage: int) -> Tensor:
    coarse = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.7
    with torch.no_grad():
        return bridge(stage, coarse)


def test_both_methods_fit_the_same_bridges_and_fitted_ones_are_left_alone(tiny: list[str]) -> None:
    solved, _, _ = fit(tiny, [BridgePretraining(samples=400)])
    learnt, _, _ = fit(tiny, [BridgePretraining(method="gradient", steps=500, learning_rate=0.03)])
    for stage in (1, 2):
        one, other = outputs(solved.bridge, stage), outputs(learnt.bridge, stage)
        assert (one - other).square().mean().sqrt() < 0.06 * one.std()
    before = outputs(solved.bridge, 1)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    BridgePretraining(samples=8).on_fit_start(trainer, solved)
    assert torch.equal(outputs(solved.bridge, 1), before)
    assert not any(parameter.requires_grad for parameter in solved.bridge.parameters())


def test_throughput_counts_every_image_token_and_operation(tiny: list[str], tmp_path: Path) -> None:
    settings = [*SHORT, "--trainer.log_every_n_steps", "6", "--model.activation_checkpointing", "1"]
    throughput = Throughput(every_n_steps=6, peak_flops=1e12)
    model, _, trainer = fit(tiny, [BridgePretraining(samples=16), throughput], settings)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs" / "tiny"))
    events.Reload()
    rate = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if tag.startswith("throughput")}
    seconds = rate["throughput/seconds_per_step"]
    assert rate["throughput/images_per_second"] * seconds == pytest.approx((2 + 1 + 1) * 2, rel=1e-4)
    # Stage 3: two images of 8 x 8 image tokens and 8 text tokens.
    assert rate["throughput/tokens_per_second_stage3"] * seconds == pytest.approx(2 * (64 + 8), rel=1e-4)
    assert 0 <= rate["throughput/share_waiting_for_data"] < 1
    waited = rate["throughput/seconds_waiting_for_data"]
    assert waited == pytest.approx(rate["throughput/share_waiting_for_data"] * seconds, rel=1e-4)

    model.encode_prompts(["dog"])  # cached: encoders don't count
    with FlopCounterMode(display=False) as counter:
        for micro in throughput_batch(model):
            model.flow_loss(model, model.transformer, micro, micro.step)[0].backward()
    computed = counter.get_total_flops() / 1e12 / seconds
    assert rate["throughput/hardware_flops_utilization"] == pytest.approx(computed, rel=0.01)
    assert rate["throughput/tflops_per_second"] == pytest.approx(rate["throughput/model_flops_utilization"])
    assert 0.6 * computed < rate["throughput/model_flops_utilization"] < 0.9 * computed
    assert {"images_per_second", "model_flops_utilization"} <= {
        name.removeprefix("throughput/") for name in trainer.progress_bar_metrics
    }
    assert not any("peak_memory" in name for name in rate)


def throughput_batch(model: NamiModule) -> list[MicroBatch]:
    """Micro-batches of one step of the short recipe: 4, 2 and 2 samples."""
    return [
        MicroBatch(0, stage, torch.zeros(n, 3, side, side, dtype=torch.uint8), ["dog"] * n, ["a"] * n, list(range(n)))
        for stage, (side, n) in enumerate(zip(model.resolutions, (4, 2, 2), strict=True))
    ]


def test_peak_memory_is_told_apart_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an allocator of ours in CUDA's place."""
    peak = 0

    def reset() -> None:
        nonlocal peak
        peak = 0

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)

    class Network(nn.Module):
        def forward(self, size: int, text: None, pooled: None, time: None, stage: int) -> None:
            nonlocal peak
            peak = max(peak, size)

    network = Network()
    memory = StageMemory(network)
    for sizes in ((7, 5, 20), (3, 9, 10)):
        network(100, None, None, None, 0)  # drawing between steps
        memory.start()
        for stage, size in zip((0, 0, 2), sizes, strict=True):
            network(size, None, None, None, stage)
        memory.stop()
    assert memory.peaks == {0: 9, 2: 20}
    memory.remove()
    memory.start()
    network(50, None, None, None, 0)
    memory.stop()
    assert memory.peaks == {0: 9, 2: 20}


@pytest.mark.parametrize(
    "make",
    [
        lambda: EMA(decay=1.0),
        lambda: RunCheckpoint(keep=0),
        lambda: BridgePretraining(samples=0),
        lambda: Metrics(samples=1),
        lambda: Throughput(every_n_steps=0),
        lambda: Throughput(peak_flops=0.0),
    ],
)
def test_settings_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"at least|needs|above 0"):
        make()
