"""How much memory a micro-batch takes beside weights and gradients, found by running it with tensors that hold nothing.

The network runs forward and backward under torch's ``FakeTensorMode``: every operation yields a tensor of the right
shape and number type without its numbers, so nothing is computed or allocated, and what is alive when is the same as in
a real run. What CUDA's kernels keep that the CPU's don't, or the other way round, is put right by :func:`as_on_cuda`.
"""

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.training.strategies import parallelize


@dataclass(frozen=True)
class MicroBatchShape:
    """What decides a micro-batch's memory.

    Attributes:
        stage: 0 (coarsest) to K-1.
        samples: of the micro-batch.
        side: of the latents.
        text_tokens: of a prompt, padding included.
        weights: number type of the weights that the network computes with.
        autocast: number type that autocast computes in, or None.
        activation_checkpointing: every so many-th block is recomputed; 0 none.
        cuda: keep what CUDA's kernels keep; False: the CPU's.
    """

    stage: int
    samples: int
    side: int
    text_tokens: int
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    activation_checkpointing: int = 0
    cuda: bool = True


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch.

    Attributes:
        saved: kept for the backward pass, with what the largest recomputed block keeps while it is gone through.
        peak: the most that is alive at once in the forward and backward pass, weights and their gradients left out.
    """

    saved: int
    peak: int


@cache
def activations(make: Callable[[], NamiTransformer2DModel], shape: MicroBatchShape) -> Activations:
    """The activations of one micro-batch; takes seconds, whatever the size.

    Args:
        make: makes the network.
        shape: of the micro-batch, and how it is computed.
    """
    with _quiet(), FakeTensorMode():
        model = _of_type(shape.weights, make)
        if shape.cuda:
            as_on_cuda(model, shape.autocast is not None)
        blocks = model.blocks(shape.stage)
        by_block: dict[nn.Module | None, int] = {}
        recomputed = 0
        if shape.activation_checkpointing:
            with count_saved(model, blocks, by_block):
                _loss(model, shape)
            every = {id(b) for part in model_parts(model) for b in part[:: shape.activation_checkpointing]}
            recomputed = max((size for b, size in by_block.items() if id(b) in every), default=0)
            by_block.clear()
            parallelize(model, None, shape.activation_checkpointing)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with LiveBytes(model) as live:
            with count_saved(model, [], by_block):
                loss = _loss(model, shape)
            loss.backward()
    return Activations(sum(by_block.values()) + recomputed, live.peak)


def model_parts(model: NamiTransformer2DModel) -> list[list[nn.Module]]:
    """The two lists in which checkpointing counts blocks."""
    return [list(model.transformer_blocks), list(model.single_transformer_blocks)]


def _of_type(dtype: torch.dtype, make: Callable[[], NamiTransformer2DModel]) -> NamiTransformer2DModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(before)


def _loss(model: NamiTransformer2DModel, shape: MicroBatchShape) -> Tensor:
    """As :meth:`NamiModule.flow_loss` computes it."""
    config, n = model.config, shape.samples
    x = torch.empty(n, config.in_channels, shape.side, shape.side)
    text = torch.empty(n, shape.text_tokens, config.joint_attention_dim)
    with torch.autocast("cpu", shape.autocast, enabled=shape.autocast is not None, cache_enabled=False):
        velocity = model(x, text, torch.empty(n, config.pooled_projection_dim), torch.empty(n), shape.stage)
        return F.mse_loss(velocity.float(), torch.empty_like(x))


def _drop_gradient(parameter: Tensor) -> None:
    """Gradients are counted apart."""
    parameter.grad = None


@contextmanager
def count_saved(model: nn.Module, blocks: list[nn.Module], by_block: dict[nn.Module | None, int]) -> Iterator[None]:
    """Add the bytes that autograd saves in a forward pass, each storage once and weights left out, to ``by_block``.

    Args:
        model: whose weights don't count.
        blocks: whose shares are to be told apart; all else goes to None.
        by_block: where to add.
    """
    seen = {parameter.untyped_storage()._cdata: parameter.untyped_storage() for parameter in model.parameters()}
    current: list[nn.Module | None] = [None]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage  # held, so that its address isn't used again
            by_block[current[0]] = by_block.get(current[0], 0) + storage.nbytes()
        return tensor

    def enter(block: nn.Module, *_: Any) -> None:
        current[0] = block

    def leave(*_: Any) -> None:
        current[0] = None

    handles = [h for b in blocks for h in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
    finally:
        for handle in handles:
            handle.remove()


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make until they are freed.

    Args:
        model: whose weights don't count.

    Attributes:
        now: bytes alive.
        peak: the most there were.
    """

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet(
            tensor.untyped_storage() for model in models for tensor in (*model.parameters(), *model.buffers())
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.now -= size


def as_on_cuda(model: nn.Module, autocast: bool) -> None:
    """Make normalisations what they are on CUDA: RMSNorm one kernel, and under autocast all of them in float32."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = partial(_fused_rms_norm, module.weight)  # type: ignore[method-assign]
        if autocast and isinstance(module, nn.RMSNorm | nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def _fused_rms_norm(weight: Tensor, x: Tensor) -> Tensor:
    output = _FusedRMSNorm.apply(x, weight)
    assert isinstance(output, Tensor)
    return output


class _FusedRMSNorm(torch.autograd.Function):
    """What the fused kernel keeps, without its numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
