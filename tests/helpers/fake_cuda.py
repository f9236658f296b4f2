"""CUDA tensors without values, and without a GPU: what would fail or wait on one is found where it happens.

Under torch's FakeTensorMode a tensor knows its device, shape and dtype. An operation on tensors of two devices raises,
and so does reading a value. Three things need a driver all the same, and are replaced: generators on the device, the
backward pass, and moving a module (so modules are built on the device).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nami_lightning.training import rng

CUDA = torch.device("cuda", 0)


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch, autocast: bool = True) -> Iterator[None]:
    """Let all tensors that are made in a ``with`` block be fake, under autocast as with ``bf16-mixed``.

    They lie on the host if nobody says otherwise, as in a real run: build what is on the GPU inside ``with CUDA``.
    """
    monkeypatch.setattr(rng, "sample", _sample)
    monkeypatch.setattr(rng, "sample_normal", _sample_normal)
    # torch.autocast asks the driver; the state that it would set does not.
    torch.set_autocast_enabled("cuda", autocast)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)


class Waits(TorchDispatchMode):
    """Notes the copies between the host and the device, and the readings of single numbers, for which the host waits.

    Attributes:
        copies: a line for each: from where, to where, and the shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        settings = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.copies += ["cuda to cpu ()"] * (args[0].device.type == "cuda")
            return False  # there is no value to read
        output = func(*args, **settings)
        if name in ("copy_", "_to_copy"):
            source = args[1] if name == "copy_" else args[0]
            waits = not settings.get("non_blocking") and not (name == "copy_" and True in args[2:])
            if source.device.type != output.device.type and waits:
                self.copies.append(f"{source.device.type} to {output.device.type} {tuple(source.shape)}")
        return output


def give_gradients(model: nn.Module) -> None:
    """Do what a backward pass would leave behind."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)


def devices(values: Any) -> set[str]:
    """Return the kinds of devices on which parameters or tensors lie."""
    return {value.device.type for value in values}


def _sample(
    seed: int, seed_key: int | str, places: Sequence[int], shape: Sequence[int], device: Any = "cpu"
) -> rng.RandomNumbers:
    number = len(places)
    noise = torch.empty(number, *shape, device=device)
    return rng.RandomNumbers(noise, torch.empty(number, device=device), torch.empty(number, 3, device=device))


def _sample_normal(
    seed: int, seed_key: int | str, places: Sequence[int], purpose: str, shape: Sequence[int], device: Any
) -> Tensor:
    return torch.empty(len(places), *shape, device=device)
