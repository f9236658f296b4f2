"""Where each rank prints, and how the ranks meet again after a restart."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy, Strategy

from nami_lightning.errors import explain


@contextmanager
def output_of_rank(rank: int, folder: Path) -> Iterator[None]:
    """Send all that a rank prints to ``folder/rank_N.log``; rank 0 prints to the terminal.

    An error that ends such a rank is told on the terminal as well, in one line.
    """
    if rank == 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.dup(2)
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    except Exception as error:
        message = " ".join(explain(error).split()) or type(error).__name__
        os.write(terminal, f"rank {rank}: {message} (all of it in {path})\n".encode())
        raise


def join_after_restart(strategy: Strategy) -> None:
    """Start the process group of a job that torchrun has started again, before Lightning would.

    torchrun (2.15) keeps one store through all its starts. There a rank may find the address at which a dead one
    listened, and fail, or wait for good: so each start uses a part of the store that is its own.
    """
    environment = os.environ
    start = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if start == "0" or not shared or not isinstance(strategy, ParallelStrategy) or dist.is_initialized():
        return
    if strategy.root_device.type == "cuda":
        torch.cuda.set_device(strategy.root_device)
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
    dist.init_process_group(
        strategy._get_process_group_backend(),  # type: ignore[attr-defined]
        store=dist.PrefixStore(f"start_{start}", store),
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        timeout=strategy._timeout,  # type: ignore[attr-defined]
    )
