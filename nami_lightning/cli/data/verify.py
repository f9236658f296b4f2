"""``lightning data verify``: read everything, and report what is damaged."""

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any


def add_command(commands: Any) -> None:
    """Add ``data verify`` to the command line."""
    parser = commands.add_parser(
        "verify",
        help="read everything, and report what is damaged",
        description="Read a whole data set, and report what is damaged.",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a prepared data set")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="number of processes (default: all cores)"
    )
    parser.set_defaults(execute=verify)


def verify(options: Namespace) -> None:
    """Read a whole data set; the exit status is 1 if anything is damaged.

    Raises:
        ValueError: the data set is remote.
    """
    from nami_lightning.datamodules.storage.remote import is_remote
    from nami_lightning.datamodules.storage.verify import report

    if is_remote(options.folder):
        raise ValueError(
            f"{options.folder} is remote: copy it to a disk, and verify the copy. Training compares each chunk that it "
            "downloads with its checksum"
        )
    sys.exit(report(Path(options.folder), options.workers))
