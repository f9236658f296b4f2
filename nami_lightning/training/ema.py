"""The EMA's network beside the trained one: spread over the ranks in the same way, on the device or on the host.

On the device it is drawn with as it is: under FSDP2 it gathers its own blocks as they run, never all of it. On the host
it costs the device nothing; to draw and to validate, its numbers and the trained ones trade places, tensor by tensor.
"""

from collections.abc import Callable

import torch
from lightning.pytorch.strategies import Strategy

from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.training.strategies import local_shards, parallelize


def twin(
    transformer: NamiTransformer2DModel,
    make: Callable[[], NamiTransformer2DModel],
    strategy: Strategy | None,
    on_host: bool,
) -> NamiTransformer2DModel:
    """The same network with the same weights, spread in the same way, and never trained.

    Args:
        transformer: parallelized.
        make: makes another one.
        strategy: Lightning's, if there is one.
        on_host: keep it in the host's memory, whatever its parents are moved to.
    """
    with torch.device("meta"):
        other = make().requires_grad_(False)
    parallelize(other, strategy)
    other.to_empty(device="cpu" if on_host else transformer.device)
    for mine, theirs in zip(local_shards(other), local_shards(transformer), strict=True):
        mine.copy_(theirs)
    if on_host:
        other._apply = lambda function, recurse=True: other
    return other


@torch.no_grad()
def exchange(one: NamiTransformer2DModel, other: NamiTransformer2DModel) -> None:
    """Swap the numbers of two networks, each staying where it is; memory for one tensor besides."""
    for mine, theirs in zip(local_shards(one), local_shards(other), strict=True):
        kept = mine.to(theirs.device, copy=True)
        mine.copy_(theirs)
        theirs.copy_(kept)


class Exchange:
    """While its outermost ``with`` block lasts, two networks have swapped their numbers.

    Args:
        one: the network that is used.
        other: whose numbers it holds then; None: nothing is swapped.
    """

    def __init__(self, one: NamiTransformer2DModel, other: NamiTransformer2DModel | None) -> None:
        self.one, self.other = one, other
        self.depth = 0

    def __enter__(self) -> None:
        self.depth += 1
        if self.depth == 1 and self.other is not None:
            exchange(self.one, self.other)

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0 and self.other is not None:
            exchange(self.one, self.other)
