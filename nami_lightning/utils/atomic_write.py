"""Files that are written completely or not at all."""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def this_process() -> str:
    """Return a name that no other running process has, for temporary files."""
    return f"{socket.gethostname()}-{os.getpid()}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces ``path`` if no error occurs.

    Missing folders are created. After an error the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{this_process()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partials(folder: Path) -> None:
    """Remove the temporary files of :func:`replacing` that killed processes of this machine left in a folder."""
    name = re.compile(rf"\..+\.{re.escape(socket.gethostname())}-(\d+)\.partial")
    for path in folder.glob(".*.partial"):
        if (match := name.fullmatch(path.name)) and not is_running(int(match[1])):
            path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Return whether a process of this machine with this id is running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, completely or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file, completely or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def publish(partial: Path, target: Path, last: str | None = None) -> None:
    """Flush a complete file or folder to the disk, then give it its final name.

    Args:
        partial: the file or folder, complete under a temporary name.
        target: its final name.
        last: of a folder that several processes may make: the file that is written last. If another process was
            faster, its folder stays and this one's is removed.
    """
    for path in [path for path in partial.rglob("*") if path.is_file()] if partial.is_dir() else [partial]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    try:
        partial.rename(target)
    except OSError:
        if last is None or not (target / last).exists():
            raise
        shutil.rmtree(partial)
