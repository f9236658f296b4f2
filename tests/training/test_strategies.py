"""Float8 layers against exact ones, and the bytes that FSDP2 sends against the formula that strategies.py states."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.tiny_models import make_two_stages
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from nami_lightning import NamiTransformer2DModel
from nami_lightning.training.strategies import FSDP2Strategy, local_shards, parallelize

RANKS = 4


def make_model() -> NamiTransformer2DModel:
    return make_two_stages(
        attention_head_dim=32, axes_dims_rope=[8, 12, 12], joint_attention_dim=64, pooled_projection_dim=64
    )


def backward(model: nn.Module, stage: int, sides: tuple[int, int] = (8, 8)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 4, *sides), (2, 8, 64), (2, 64), (2,)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    output: Tensor = model(*inputs, stage)
    output.square().mean().backward()
    return output.detach()


def distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def test_float8_layers_round_and_nothing_else() -> None:
    pytest.importorskip("torchao")
    exact = make_model()
    rounded = copy.deepcopy(exact)
    parallelize(rounded, None, activation_checkpointing=1, float8=True)
    assert [name for name, _ in rounded.named_parameters()] == [name for name, _ in exact.named_parameters()]
    changed = {name for name, layer in rounded.named_modules() if type(layer).__name__ == "Float8Linear"}
    assert "transformer_blocks.0.attn.to_q" in changed
    assert all("blocks." in name and ".norm" not in name for name in changed)
    error = distance(backward(rounded, 1), backward(exact, 1))
    assert 1e-4 < error < 0.02  # float8 has three bits of mantissa: some rounding there is, but little
    pairs = [(a.grad, b.grad) for a, b in zip(rounded.parameters(), exact.parameters(), strict=True)]
    gradients = [torch.cat([p.flatten() for p in of if p is not None]) for of in zip(*pairs, strict=True)]
    assert 1e-4 < distance(*gradients) < 0.05


def test_float8_takes_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs' kernels multiply over multiples of 16; an aspect bucket's tokens are any number."""
    pytest.importorskip("torchao")
    exact = make_model()
    rounded = copy.deepcopy(exact)
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(torch.cuda, "is_available", lambda: True)
        on_a_gpu.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        parallelize(rounded, None, float8=True)
    multiply, inner = torch._scaled_mm, []

    def checked(a: Tensor, b: Tensor, **settings: Any) -> Tensor:
        assert not any(side % 16 for side in (a.shape[1], *b.shape))
        inner.append(a.shape[1])
        return multiply(a, b, **settings)

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    sides = 6, 10  # 15 image tokens
    assert distance(backward(rounded, 1, sides), backward(exact, 1, sides)) < 0.02
    assert {2 * 15 + 2, 2 * 8, 2 * (15 + 8) + 2} <= set(inner)
    pairs = [(a.grad, b.grad) for a, b in zip(rounded.parameters(), exact.parameters(), strict=True)]
    gradients = [torch.cat([p.flatten() for p in of if p is not None]) for of in zip(*pairs, strict=True)]
    assert distance(*gradients) < 0.05


def test_a_checkpoint_copies_to_the_host_once(ranks: None) -> None:
    """The state is handed over where it lies, here on meta, from where nothing can be copied."""
    strategy = FSDP2Strategy()
    strategy._device_mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("replicate", "shard"))
    with torch.device("meta"):
        model = make_model()
    parallelize(model, strategy)
    strategy.model = model
    optimizer = torch.optim.AdamW(model.parameters())
    next(model.parameters()).grad = torch.empty_like(next(model.parameters()))
    optimizer.step()
    weights = strategy.lightning_module_state_dict()
    states = strategy.optimizer_state(optimizer)["state"]
    assert weights.keys() == states.keys() == model.state_dict().keys()
    moments = [state[name] for state in states.values() for name in ("exp_avg", "exp_avg_sq")]
    assert {tensor.device.type for tensor in (*weights.values(), *moments)} == {"meta"}


class Sent(TorchDispatchMode):
    """Counts the bytes that a rank gets by all-gathers and gives to reduce-scatters."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.scattered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].nbytes - args[1].nbytes
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.scattered += args[1].nbytes - args[0].nbytes
        return func(*args, **(kwargs or {}))


@pytest.fixture
def ranks() -> Iterator[None]:
    """A process group of ``RANKS``, of which only this one is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def test_shards_are_shards_after_a_pass_that_left_weights_whole(ranks: None) -> None:
    model = make_model()
    whole = [p.numel() for p in model.parameters()]
    for block in model.single_transformer_blocks:
        fully_shard(block, mesh=init_device_mesh("cpu", (RANKS,)), reshard_after_forward=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), reshard_after_forward=False)
    with torch.no_grad():
        model(torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 64), torch.zeros(2, 64), torch.zeros(2), 1)
    shards = [shard.numel() for shard in local_shards(model)]
    assert sum(shards) == pytest.approx(sum(whole) / RANKS, rel=0.03)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_micro_batch_sends_what_strategies_says(ranks: None, stage: int) -> None:
    model = make_model()
    mesh = init_device_mesh("cpu", (RANKS,))
    for part in model.parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    running = model.parts_used(stage)
    inside = {id(p) for part in model.parts for p in part.parameters()}
    numbers = sum(p.numel() for part in running for p in part.parameters())
    numbers += sum(p.numel() for p in model.parameters() if id(p) not in inside)
    with Sent() as sent:
        backward(model, stage)
    share = (RANKS - 1) / RANKS * 4
    assert sent.gathered == pytest.approx(2 * share * numbers, rel=0.03)  # parameters are padded to whole rows a rank
    # The text's way out of a last double block leads nowhere: at stage 1 it has no gradient.
    reduced = sum(p.numel() for p in model.parameters() if p.grad is not None)
    assert sent.scattered == pytest.approx(share * reduced, rel=0.03)
    assert reduced == numbers or stage == 0


def test_training_never_takes_cudnns_attention() -> None:
    """Its backward pass in bfloat16 gave NaN and illegal memory accesses on an H200."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        parallelize(make_model(), None)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
