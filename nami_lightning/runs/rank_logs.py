"""Where each rank prints: rank 0 to the terminal, the others to files of their own."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
