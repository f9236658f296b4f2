"""The memory that the activations of a micro-batch take, measured without allocating anything.

The network runs forward and backward under torch's ``FakeTensorMode``: every operation gives a tensor of the right
shape and dtype, but without values. So nothing is computed or allocated, and at every moment the same tensors are alive
as in a real run. CUDA's kernels keep other tensors for the backward pass than the CPU's:
:func:`mimic_cuda_kernels` makes up for the difference.
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
    """The properties of a micro-batch that decide how much memory it takes.

    Attributes:
        stage: index of the stage, from 0 (coarsest) to K-1.
        samples: number of samples in the micro-batch.
        side: height and width of the latents.
        text_tokens: number of tokens of a prompt, padding included.
        weight_dtype: dtype of the weights that the network computes with.
        autocast_dtype: dtype that autocast computes in; None without autocast.
        activation_checkpointing: N: every N-th block is recomputed; 0: none is.
        cuda: True: keep for the backward pass what CUDA's kernels keep; False: what the CPU's keep.
    """

    stage: int
    samples: int
    side: int
    text_tokens: int
    weight_dtype: torch.dtype = torch.float32
    autocast_dtype: torch.dtype | None = None
    activation_checkpointing: int = 0
    cuda: bool = True


@dataclass(frozen=True)
class Activations:
    """Bytes that the activations of a micro-batch take.

    Attributes:
        saved: bytes kept for the backward pass, with those of the largest recomputed block while it is recomputed.
        peak: the most bytes alive at once in the forward and backward pass, without weights and their gradients.
    """

    saved: int
    peak: int


@cache
def measure_activations(make: Callable[[], NamiTransformer2DModel], shape: MicroBatchShape) -> Activations:
    """Return the memory of the activations of one micro-batch; this takes seconds, whatever the size.

    Args:
        make: function that creates the network.
        shape: the micro-batch, and how it is computed.
    """
    with _quiet(), FakeTensorMode():
        model = _make_with_dtype(shape.weight_dtype, make)
        if shape.cuda:
            mimic_cuda_kernels(model, shape.autocast_dtype is not None)
        blocks = model.blocks(shape.stage)
        by_block: dict[nn.Module | None, int] = {}
        recomputed = 0
        if shape.activation_checkpointing:
            with count_saved_bytes(model, blocks, by_block):
                _loss(model, shape)
            every = {id(block) for block in model.recomputed_blocks(shape.activation_checkpointing)}
            recomputed = max((size for b, size in by_block.items() if id(b) in every), default=0)
            by_block.clear()
            parallelize(model, None, shape.activation_checkpointing)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with LiveBytes(model) as live:
            with count_saved_bytes(model, [], by_block):
                loss = _loss(model, shape)
            loss.backward()
    return Activations(sum(by_block.values()) + recomputed, live.peak)


def _make_with_dtype(dtype: torch.dtype, make: Callable[[], NamiTransformer2DModel]) -> NamiTransformer2DModel:
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
    dtype = shape.autocast_dtype
    with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
        velocity = model(x, text, torch.empty(n, config.pooled_projection_dim), torch.empty(n), shape.stage)
        return F.mse_loss(velocity.float(), torch.empty_like(x))


def _drop_gradient(parameter: Tensor) -> None:
    """Free a gradient as soon as it is complete: the plan counts gradients elsewhere."""
    parameter.grad = None


@contextmanager
def count_saved_bytes(
    model: nn.Module, blocks: list[nn.Module], by_block: dict[nn.Module | None, int]
) -> Iterator[None]:
    """Add the bytes that autograd saves in a forward pass to ``by_block``.

    Each storage counts once, and weights don't count.

    Args:
        model: the network, whose weights don't count.
        blocks: blocks whose bytes are counted separately; all others count under the key None.
        by_block: bytes of each block, which this function adds to.
    """
    seen = {parameter.untyped_storage()._cdata: parameter.untyped_storage() for parameter in model.parameters()}
    current: list[nn.Module | None] = [None]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage  # keep a reference, so that its address isn't used again
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
    """A mode that follows the storages that operations allocate until they are freed.

    Args:
        models: modules whose weights and buffers don't count.

    Attributes:
        now: number of bytes that are alive now.
        peak: largest number of bytes that were alive at once.
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


def mimic_cuda_kernels(model: nn.Module, autocast: bool) -> None:
    """Make the normalisations of a model keep what they keep on CUDA.

    There RMSNorm is one fused kernel, and under autocast all normalisations compute in float32.
    """
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
    """An RMSNorm that keeps the tensors that CUDA's fused kernel keeps, without computing anything."""

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
