"""The start of several ranks: rank 0 decides what all of them start from, before Lightning starts the process group."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.pytorch.strategies import ParallelStrategy

from nami_lightning.errors import explain

DECISION = "NAMI_START"
"""The environment variable by which rank 0 hands its process id and its decision to the processes that it starts."""

Decision = dict[str, Any]


def decided_by_rank_zero(trainer: L.Trainer, decide: Callable[[], Decision]) -> Decision:
    """Let rank 0 decide, and return its decision on every rank.

    On one machine the processes that Lightning itself starts come after rank 0, and read the decision from their
    environment. Those that torchrun or SLURM started run side by side: they start the process group now, and wait for
    rank 0's message. So do those of several machines on which the command was started by hand; there each machine's
    first process starts the others of its machine before that.

    Args:
        trainer: whose process group it is.
        decide: called on rank 0 alone; returns plain values.

    Raises:
        RuntimeError: on the other ranks, if deciding failed on rank 0.
        ValueError: several machines, and an environment that doesn't tell where they meet.
    """
    strategy = trainer.strategy
    if trainer.world_size == 1 or not isinstance(strategy, ParallelStrategy):
        return decide()
    environment = strategy.cluster_environment
    if isinstance(environment, LightningEnvironment):
        check_meeting_place(trainer.num_nodes)
        handed_down = json.loads(os.environ.get(DECISION, "{}"))
        if trainer.global_rank and handed_down.get("process") == os.getppid():
            return dict(handed_down["decision"])
        if trainer.num_nodes == 1 and not environment.creates_processes_externally:
            decision = decide()
            os.environ[DECISION] = json.dumps({"process": os.getpid(), "decision": decision})
            return decision
    if strategy.launcher is None:
        start_process_group(trainer)
    else:
        strategy.launcher.launch(start_process_group, trainer)  # it starts this machine's other processes, if need be
    message: list[Any] = [None]
    if trainer.global_rank == 0:
        try:
            message = [{"decision": decide()}]
        except BaseException as error:
            dist.broadcast_object_list([{"error": " ".join(explain(error).split()) or type(error).__name__}], src=0)
            raise
    dist.broadcast_object_list(message, src=0)
    if "error" in message[0]:
        raise RuntimeError(f"rank 0 can't start: {message[0]['error']}")
    decision = message[0]["decision"]
    return dict(decision)


def check_meeting_place(nodes: int) -> None:
    """Refuse machines on which the command was started by hand, and that can't find each other.

    Without these variables each machine would wait for the others at an address of its own, for half an hour.

    Raises:
        ValueError: naming the variables that are missing.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if nodes > 1 and missing:
        raise ValueError(
            f"trainer.num_nodes is {nodes}, but the environment lacks {', '.join(missing)}: start the command "
            "by torchrun or SLURM, or on each machine with MASTER_ADDR and MASTER_PORT of the first one, and NODE_RANK "
            "from 0"
        )


def start_process_group(trainer: L.Trainer) -> None:
    """Start the process group of ranks that a cluster started, as Lightning would do later.

    torchrun (2.15) keeps one store through all its restarts. There a rank may find the address at which a dead one
    listened, and fail, or wait for good: so each restart uses a part of the store that is its own.
    """
    strategy = trainer.strategy
    assert isinstance(strategy, ParallelStrategy)
    environment = strategy.cluster_environment
    assert environment is not None
    if dist.is_initialized():
        return
    if strategy.root_device.type == "cuda":
        torch.cuda.set_device(strategy.root_device)
    backend: str = strategy._get_process_group_backend()  # type: ignore[attr-defined]
    timeout: timedelta = strategy._timeout  # type: ignore[attr-defined]
    device = None if strategy.root_device.type == "cpu" else strategy.root_device
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(environment.main_address, environment.main_port, is_master=False)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"start_{restarts}", store),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            timeout=timeout,
            device_id=device,
        )
    else:
        rank, ranks = trainer.global_rank, trainer.world_size
        _init_dist_connection(environment, backend, rank, ranks, timeout=timeout, device_id=device)
