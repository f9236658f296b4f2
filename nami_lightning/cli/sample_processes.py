"""Several processes of ``lightning sample`` on this machine: each has its own model and its own part of the images."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

Start = Callable[[Any, int], Iterator[str | None]]
"""Loads what a part needs, and returns what draws it: an item for each image, when it is done.

It is called with the part and the number of the process, and must be a function that pickle knows.
"""


@contextmanager
def start_processes(start: Start, parts: Sequence[Any]) -> Iterator[Iterator[str | None]]:
    """Run ``start`` on each part in a process of its own; yield what all of them draw, as it comes.

    The processes draw nothing before the first item is asked for. They end with the block, and if this process is
    killed.

    Args:
        start: what each process runs.
        parts: one a process.

    Raises:
        RuntimeError: a process failed, or was killed; the message says why. The others are ended then.
    """
    context = get_context("spawn")
    processes: list[Any] = []
    connections: list[Connection] = []
    try:
        for number, part in enumerate(parts):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, start, part, number, len(parts)), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        for process, connection in zip(processes, connections, strict=True):
            _receive(process, connection)  # it has loaded
        yield _results(dict(zip(connections, processes, strict=True)))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _results(processes: dict[Connection, Any]) -> Iterator[str | None]:
    for connection in processes:
        connection.send("draw")
    while processes:
        for ready in wait(list(processes)):
            assert isinstance(ready, Connection)
            kind, value = _receive(processes[ready], ready)
            if kind == "end":
                processes.pop(ready).join()
            else:
                yield value


def _receive(process: Any, connection: Connection) -> tuple[str, Any]:
    """Return a process's next message.

    Raises:
        RuntimeError: it reports an error, or has ended without one.
    """
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join()
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        raise RuntimeError(
            f"one of the processes {how}; each needs memory for the model: try fewer --processes, or a smaller "
            "--batch_size. The same command goes on with the images that are missing"
        ) from error
    if kind == "error":
        raise RuntimeError(value)
    return kind, value


def _work(connection: Connection, start: Start, part: Any, number: int, count: int) -> None:
    """Draw one part, and report to the parent: the main function of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends all
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    from diffusers.utils import logging as diffusers_logging
    from lightning.pytorch.utilities import rank_zero_only
    from tqdm import tqdm
    from transformers.utils import logging as transformers_logging

    from nami_lightning.errors import explain, is_user_error

    rank_zero_only.rank = number  # type: ignore[attr-defined]  # one process says what it loads, not all
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is ended leaves behind
    if number:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        results = start(part, number)
        connection.send(("loaded", None))
        connection.recv()
        for result in results:
            connection.send(("image", result))
        connection.send(("end", None))
    except Exception as error:
        if os.environ.get("NAMI_TRACEBACK") or not is_user_error(error):
            traceback.print_exc(file=sys.stderr)
        text = explain(error)
        connection.send(("error", text if is_user_error(error) else f"{type(error).__name__}: {text}"))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
