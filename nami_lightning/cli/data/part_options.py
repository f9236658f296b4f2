"""Options of the commands whose work is a list of parts: how many processes, which parts, and merging them."""

import os
from typing import Any

from nami_lightning.cli.ray_engine import add_engine_options

WORKERS = "Number of processes."
SHARD = "I/N: do only part I of N of the work, I from 0 to N-1."
MERGE = "Only merge what the parts have written."


def add_part_options(parser: Any, workers: int = os.cpu_count() or 1, workers_help: str = WORKERS) -> None:
    """Add ``--workers``, ``--shard``, ``--merge`` and those of the engine to a parser of argparse or jsonargparse.

    Args:
        parser: the parser.
        workers: the default number of processes.
        workers_help: what the processes do.
    """
    parser.add_argument("--workers", type=int, default=workers, help=workers_help)
    parser.add_argument("--shard", type=str, metavar="I/N", help=SHARD)
    parser.add_argument("--merge", action="store_true", help=MERGE)
    add_engine_options(parser)


def default_device(name: str | None) -> str:
    """Return the device that an option names; without one, a GPU if there is one, else the CPU."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")
