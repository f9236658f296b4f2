"""The lock of a run's folder: one process at a time trains a run. The lock is free when the process ends."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

PATIENCE = 30.0
"""Seconds to wait for another process that trains the run, which may be about to end."""


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Hold the lock of a run in a ``with`` block; the run's folder is made if it isn't there.

    Raises:
        RuntimeError: one on this machine goes on. Of another machine only a warning says so: one that died may have
            left its lock behind, and a run must be able to go on elsewhere.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / "lock").open("a+", encoding="utf-8") as file:
        if not _lock(file, patience=0.0):
            file.seek(0)
            holder = file.read()
            rank_zero_info(f"{run} is being trained by {holder}; waiting {PATIENCE:g} s for its end")
            if not _lock(file, PATIENCE):
                _refuse(run, holder)
        file.truncate(0)
        file.write(_this_process())
        file.flush()
        yield


def is_held(run: Path) -> bool | None:
    """Tell whether a process on this machine trains the run; None: the last one was on another machine, or unknown."""
    try:
        with (run / "lock").open("r+", encoding="utf-8") as file:
            holder = file.read()
            if holder.partition(" on ")[2] != socket.gethostname():
                return None
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return False


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _lock(file: TextIO, patience: float) -> bool:
    """Try to take the lock for some seconds, and tell whether it was taken; always on a file system without locks."""
    end = time.monotonic() + patience
    while True:
        try:
            # Not flock: data workers would inherit its lock, and hold it for seconds after their run was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return True
        else:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.2)


def _refuse(run: Path, holder: str) -> None:
    """Raise for a holder on this machine, warn of one elsewhere."""
    if holder.partition(" on ")[2] != socket.gethostname():
        rank_zero_warn(f"{run} is being trained by {holder}, unless that machine died: going on")
        return
    raise RuntimeError(f"{run} is being trained by {holder}: wait for it or stop it, or give this run another --name")
