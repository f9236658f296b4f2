"""Collectives of torch.distributed that also work in a single process."""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_distributed() -> bool:
    """Tell whether this process is one of several ranks that can talk to each other."""
    return dist.is_available() and dist.is_initialized()


def gather_objects(value: T) -> list[T]:
    """Return every rank's value, rank 0's first. All ranks must call this."""
    if not is_distributed():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all ranks, in place. All ranks must call this."""
    if is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)
