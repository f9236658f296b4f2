"""The first weights of a network: rank 0 makes them in its host's memory, and sends every rank its part of them.

So they are those that one process makes from the same seed, and of all ranks one has a whole network in its host's
memory. The others make it without values, fit it to the devices, and receive the values tensor by tensor.
"""

from collections.abc import Callable

import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.training.strategies import parallelize
from nami_lightning.utils.collectives import gather_objects, is_distributed


def make_with_first_weights(
    make: Callable[[bool], NamiTransformer2DModel],
    strategy: Strategy | None,
    activation_checkpointing: int = 0,
    compile: bool = False,
    float8: bool = False,
) -> NamiTransformer2DModel:
    """Make a network that is parallelized, with the weights that rank 0 makes; all ranks take part.

    Args:
        make: makes it: told True, with weights in the host's memory; told False, without values on the meta device.
        strategy: Lightning's, if there is one.
        activation_checkpointing: see :func:`parallelize`, as for the next two.
        compile: see there.
        float8: see there.

    Raises:
        RuntimeError: on all other ranks, if rank 0 can't make it; there the error is its own.
    """
    if strategy is None or not is_distributed() or dist.get_world_size() == 1:
        network = make(True)
        parallelize(network, strategy, activation_checkpointing, compile, float8)
        return network
    network = _make_together(make)
    weights = network.state_dict() if dist.get_rank() == 0 else {}
    network.to("meta")
    parallelize(network, strategy, activation_checkpointing, compile, float8)
    network.to_empty(device=strategy.root_device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, weights, options=options)
    return network


def _make_together(make: Callable[[bool], NamiTransformer2DModel]) -> NamiTransformer2DModel:
    """Make a network, with its weights on rank 0 alone; if that fails there, all ranks end."""
    network, error = None, None
    try:
        network = make(dist.get_rank() == 0)
    except Exception as problem:
        error = problem
    problems = gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    if first := next(filter(None, problems), None):
        raise RuntimeError(f"another rank can't make the network: {first}")
    assert network is not None
    return network
