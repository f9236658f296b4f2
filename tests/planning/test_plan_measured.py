"""What a plan counts against what is measured: torch's counter and autograd in real forward and backward passes."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.planning.flops import transformer_flops
from nami_lightning.planning.inputs import Network
from nami_lightning.planning.memory import MicroBatchShape, measure_activations
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.strategies import parallelize

SMALL: dict[str, Any] = {
    "in_channels": 3,
    "patch_size": 4,
    "num_layers": [1, 0, 0],
    "num_single_layers": [0, 1, 1],
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
}
LARGER = SMALL | {
    "in_channels": 16,
    "patch_size": 2,
    "num_layers": [2, 1, 0],
    "num_single_layers": [1, 3, 2],
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 12, 12],
}
SIZES = pytest.mark.parametrize("config", [SMALL, LARGER], ids=["small", "larger"])
CHECKPOINTING = pytest.mark.parametrize("every", [0, 1], ids=["kept", "recomputed"])
SIDES = (8, 16, 32)
TEXT = 12


def inputs(config: dict[str, Any], stage: int, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    side = SIDES[stage]
    return (
        torch.randn(samples, config["in_channels"], side, side),
        torch.randn(samples, TEXT, config["joint_attention_dim"]),
        torch.randn(samples, config["pooled_projection_dim"]),
        torch.rand(samples),
    )


class Saved:
    """Bytes that autograd keeps between forward and backward, each storage once, weights left out; and their peak."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.users: dict[int, int] = {}
        self.now = self.peak = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        with saved_tensors_hooks(self._pack, lambda box: box[0]):
            yield

    def _pack(self, tensor: Tensor) -> "Box":
        storage = tensor.untyped_storage()
        box = Box([tensor])
        if storage.data_ptr() not in self.weights:
            self._use(storage.data_ptr(), storage.nbytes(), 1)
            weakref.finalize(box, self._use, storage.data_ptr(), storage.nbytes(), -1)
        return box

    def _use(self, address: int, size: int, change: int) -> None:
        before = self.users.get(address, 0)
        self.users[address] = before + change
        if 0 in (before, before + change):
            self.now += change * size
            self.peak = max(self.peak, self.now)


class Box(list[Tensor]):
    """A saved tensor, and a place for a weak reference."""


@SIZES
@CHECKPOINTING
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_operations_are_those_of_torchs_counter(config: dict[str, Any], every: int, stage: int) -> None:
    model = NamiTransformer2DModel(**config)
    parallelize(model, None, every)
    with FlopCounterMode(display=False) as counter:
        model(*inputs(config, stage, 3), stage).sum().backward()
    flops = transformer_flops(config, stage, (SIDES[stage] // config["patch_size"]) ** 2, TEXT, every)
    assert counter.get_total_flops() == pytest.approx(3 * flops.hardware, rel=0.01)
    assert (flops.recomputed > 0) == bool(every)


@SIZES
@CHECKPOINTING
def test_activations_are_what_autograd_saves(config: dict[str, Any], every: int) -> None:
    stage, samples = 2, 3
    network = Network.from_config(NamiTransformer2DModel, config)
    shape = MicroBatchShape(stage, samples, SIDES[stage], TEXT, activation_checkpointing=every, cuda=False)
    planned = measure_activations(network.make, shape)

    model = network.make()
    recomputed = largest_block(model, stage, *inputs(config, stage, samples)) if every else 0
    parallelize(model, None, every)
    saved = Saved(model)
    with saved.counted():
        loss = model(*inputs(config, stage, samples), stage).square().mean()
    kept = saved.now
    loss.backward()
    assert saved.now == 0
    assert planned.saved == pytest.approx(kept + recomputed, rel=0.15)
    assert planned.peak >= planned.saved * 0.99


def largest_block(model: NamiTransformer2DModel, stage: int, *arguments: Tensor) -> int:
    """Bytes that the most demanding block saves, run alone on what it is given in a forward pass."""
    calls: list[tuple[nn.Module, Any]] = []
    handles = [
        block.register_forward_pre_hook(lambda block, given: calls.append((block, given)))
        for block in model.blocks(stage)
    ]
    with torch.no_grad():
        model(*arguments, stage)
    for handle in handles:
        handle.remove()
    sizes = []
    for block, given in calls:
        saved = Saved(block)
        with saved.counted():
            kept = block(*(x.requires_grad_() if isinstance(x, Tensor) else x for x in given))
        sizes.append(saved.now)
        del kept
    return max(sizes)


def test_activations_grow_with_samples_and_shrink_with_checkpointing_and_bfloat16() -> None:
    make = Network.from_config(NamiTransformer2DModel, LARGER).make
    shape = MicroBatchShape(2, 2, 32, TEXT)
    one, two = (measure_activations(make, replace(shape, samples=n)).saved for n in (2, 4))
    assert two == pytest.approx(2 * one, rel=0.02)
    assert measure_activations(make, replace(shape, weight_dtype=torch.bfloat16)).saved < 0.7 * one
    by_every = [measure_activations(make, replace(shape, activation_checkpointing=n)).saved for n in (0, 2, 1)]
    assert by_every[0] > by_every[1] > by_every[2]


def test_a_step_of_three_stages_keeps_as_much_as_its_largest_micro_batch(tiny: list[str]) -> None:
    model, data, trainer = Recipe(
        tiny[0], [*tiny[1:], "--curriculum.phases", "[{steps: 1, ratio: [4, 2, 1], learning_rate: 0.001}]"]
    ).make()
    data.prepare_data()
    batch = data.steps()[0]  # type: ignore[attr-defined]
    assert [micro.stage for micro in batch] == [0, 0, 1, 2]
    model.use_ema = True
    model.configure_model()
    alone = []
    for micro in batch:
        saved = Saved(model)
        with saved.counted():
            loss = model.flow_loss(model, model.transformer, micro, micro.step)[0]
        alone.append(saved.now)
        del loss

    steps: list[Saved] = []
    original = model.training_step

    def training_step(*arguments: Any) -> None:
        steps.append(Saved(model))
        with steps[-1].counted():
            original(*arguments)

    model.training_step = training_step  # type: ignore[method-assign, assignment]
    trainer.fit(model, data)
    assert len(steps) == 1
    assert max(alone) <= steps[0].peak <= 1.1 * max(alone)
    assert sum(alone) > 1.5 * max(alone)
