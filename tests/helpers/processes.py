"""Start the program in processes of its own: one, or several ranks.

A new Python needs six seconds to import torch, Lightning, transformers and diffusers, on every rank. So the processes
are forked from a server that has imported them once. Each has its own session, environment and output, as a command
line has: it can be killed, and gets signals.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from time import monotonic
from typing import Any

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH")])),
}
"""What every process of the tests needs: no network, no GPU, one thread, and these helpers."""

SETTINGS = ["--data.init_args.num_workers", "0", "--trainer.log_every_n_steps", "1"]
LIMIT = 300.0
"""Seconds after which a run counts as hung."""

PRELOADED = [
    "lightning",
    "nami_lightning.callbacks",
    "nami_lightning.comparison.sweep",
    "nami_lightning.datamodules.multi_resolution",
    "nami_lightning.datamodules.sources",
    "nami_lightning.pipelines.nami_pipeline",
    "nami_lightning.runs.recipe",
    "nami_lightning.training.module",
    "nami_lightning.training.strategies",
    "torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks",
    "torch.distributed.checkpoint._fsspec_filesystem",
    "torch.distributed.checkpoint.state_dict",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "transformers.models.clip.modeling_clip",
]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOADED)


def lightning(arguments: Sequence[str], status: int | None = 0) -> str:
    """Run ``lightning ARGUMENTS`` to its end and return what it printed, on all ranks.

    Args:
        arguments: of the command. The number after ``--trainer.devices`` or ``--devices`` is that of the ranks.
        status: the exit status that rank 0 must have; None stands for any but 0.
    """
    with tempfile.NamedTemporaryFile("r") as output:
        processes = start(execute, (list(arguments),), ranks_of(arguments), Path(output.name))
        found = end(processes)
        printed = output.read()
    assert found if status is None else found == status, printed
    return printed


def run(arguments: Sequence[str], status: int | None = 0) -> str:
    """Run ``lightning run`` on a recipe, with no processes that read data and every step in the logs."""
    return lightning(["run", arguments[0], *SETTINGS, *arguments[1:]], status)


def run_as_command(arguments: Sequence[str], status: int = 0, launcher: Sequence[str] = ()) -> str:
    """As ``run``, with a new Python as a user starts it: Lightning or ``launcher`` starts the ranks."""
    command = [sys.executable, *launcher, "-m", "nami_lightning.cli", "run", arguments[0], *SETTINGS, *arguments[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == status, done.stdout
    return done.stdout


def ranks_of(arguments: Sequence[str]) -> int:
    """Return how many ranks the arguments ask for; the last one given counts."""
    given = [int(value) for key, value in pairwise(arguments) if key.endswith("devices")]
    return given[-1] if given else 1


def start(
    function: Callable[..., None], arguments: tuple[Any, ...], ranks: int, output: Path
) -> list[ForkServerProcess]:
    """Start a function in one process a rank, with the environment that Lightning gives the ranks that it starts."""
    environments: list[dict[str, str]] = [{}]
    if ranks > 1:
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(ranks),
        }
        environments = [{**common, "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    processes = [
        SERVER.Process(target=enter, args=({**os.environ, **environment}, output, function, arguments))
        for environment in environments
    ]
    for process in processes:
        process.start()
    return processes


def end(processes: list[ForkServerProcess]) -> int | None:
    """Wait for all ranks and return rank 0's exit status.

    When one fails, the others get five seconds to notice it, as from Lightning. Then they are killed.
    """
    deadline = monotonic() + LIMIT
    while alive := [process for process in processes if process.is_alive()]:
        ended = wait([process.sentinel for process in alive], timeout=5)
        if not ended and (any(process.exitcode for process in processes) or monotonic() > deadline):
            for process in alive:
                process.kill()
    return processes[0].exitcode


def enter(
    environment: Mapping[str, str], output: Path, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """Begin the life of a forked process: a session, an environment, an output, and one thread."""
    import torch

    assert not (missing := [name for name in PRELOADED if name not in sys.modules]), missing
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a command line: what this process starts
    function(*arguments)


def execute(arguments: list[str]) -> None:
    """Be the command ``lightning``."""
    from nami_lightning.cli.main import main

    sys.argv = ["lightning", *arguments]
    raise SystemExit(main(arguments))


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
