"""The EMA's network beside the trained one, sharded in the same way, on the device or on the host.

On the device it samples as it is: under FSDP2 it gathers its own blocks as they run, never all of it. On the host it
costs the device nothing; for sampling and validation its weights and the trained ones are swapped, tensor by tensor.
So are those of a LoRA, wherever they are kept: its EMA is of the adapter alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nami_lightning.models.lora import in_adapter, trained_parameters
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.training.strategies import local_shards, parallelize


class AdapterCopy(nn.Module):
    """The weights of a network's adapter, with the same names and sharded in the same way, and nothing else."""

    def __init__(self, transformer: NamiTransformer2DModel) -> None:
        super().__init__()
        for name, parameter in trained_parameters(transformer):
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(last, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def make_ema_model(
    transformer: NamiTransformer2DModel,
    make: Callable[[], NamiTransformer2DModel],
    strategy: Strategy | None,
    on_host: bool,
) -> nn.Module:
    """Make a network with the same weights, sharded in the same way, that is never trained; of a LoRA its adapter.

    Args:
        transformer: the trained network, parallelized.
        make: makes another one.
        strategy: Lightning's, if there is one.
        on_host: keep it in the host's memory, whatever its parents are moved to.
    """
    ema: nn.Module
    if any(in_adapter(name) for name, _ in transformer.named_parameters()):
        ema = AdapterCopy(transformer)
        ema.to("cpu" if on_host else transformer.device)
    else:
        ema = _network_copy(transformer, make, strategy, "cpu" if on_host else transformer.device)
    if on_host:
        ema._apply = lambda function, recurse=True: ema  # type: ignore[method-assign]
    return ema


def _network_copy(
    transformer: NamiTransformer2DModel,
    make: Callable[[], NamiTransformer2DModel],
    strategy: Strategy | None,
    device: str | torch.device,
) -> NamiTransformer2DModel:
    with torch.device("meta"):
        copy = make().requires_grad_(False)
    parallelize(copy, strategy)
    copy.to_empty(device=device)
    for average, weight in zip(local_shards(copy), local_shards(transformer), strict=True):
        average.copy_(weight)
    return copy


def leave_out_of_ddp(module: nn.Module, child: str) -> None:
    """Let DDP take no notice of a module's child, in place: it is never trained, and may lie on another device."""
    names = {f"{child}.{name}" for name in getattr(module, child).state_dict()}
    names |= set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def adapt_ema(weights: dict[str, torch.Tensor], wanted: bool) -> None:
    """Give a checkpoint's weights an EMA, or take it from them, in place, as the module that loads them has one or not.

    An EMA that is new to a run starts from the trained weights.
    """
    has_ema = any(name.startswith("ema.") for name in weights)
    if wanted and not has_ema:
        trained = [name for name in weights if name.startswith("transformer.")]
        weights |= {name.replace("transformer.", "ema.", 1): weights[name].clone() for name in trained}
    if has_ema and not wanted:
        for name in [name for name in weights if name.startswith("ema.")]:
            del weights[name]


def ema_note(saved: dict[str, Any], wanted: bool) -> str | None:
    """Return what is to be said of a checkpoint's EMA if the module that loads it has one and the checkpoint not, or
    the reverse.

    Args:
        saved: what the checkpoint says of itself: its ``step``, and whether it has an ``ema``.
        wanted: whether the module has an EMA.
    """
    if saved["ema"] == wanted:
        return None
    if wanted:
        return f"The checkpoint has no EMA: it starts from the weights of step {saved['step']}."
    return "The recipe has no EMA callback any more: the checkpoint's EMA is dropped."


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """Move averages towards a network's trained weights: ``decay * average + (1 - decay) * weight``, in place."""
    averages = local_shards(ema)
    weights = [weight.to(averages[0].device) for weight in local_shards(network)]
    torch._foreach_lerp_(averages, weights, 1 - decay)


@torch.no_grad()
def swap_weights(first: nn.Module, second: nn.Module) -> None:
    """Swap the trained weights of two networks, each staying on its device; this needs memory for one more tensor."""
    for a, b in zip(local_shards(first), local_shards(second), strict=True):
        kept = a.to(b.device, copy=True)
        a.copy_(b)
        b.copy_(kept)


class SwapWeights:
    """A ``with`` block in which a network holds another one's weights; inside another such block it does nothing.

    Compiled blocks run as they are written meanwhile: drawing and validation have batches of many shapes, and each
    would be compiled.

    Args:
        network: the network that is used.
        source: holds the weights, and the network's own meanwhile; None: nothing is swapped.
    """

    def __init__(self, network: NamiTransformer2DModel, source: nn.Module | None) -> None:
        self.network, self.source = network, source
        self.depth = 0

    def __enter__(self) -> None:
        self.depth += 1
        if self.depth == 1:
            self.eager = torch.compiler.set_stance("force_eager")
            if self.source is not None:
                swap_weights(self.network, self.source)

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            if self.source is not None:
                swap_weights(self.network, self.source)
            self.eager.__exit__(None, None, None)
