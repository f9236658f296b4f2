"""What a benchmark asks a model to draw."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark.

    Args:
        id: its name, also its folder's.
        prompt: what is to be drawn.
        kind: the benchmark's part that it belongs to: a task, a category.
        metadata: what the judge needs to know of it, as JSON can hold it.
    """

    id: str
    prompt: str
    kind: str
    metadata: dict[str, Any] = field(default_factory=dict)


def checked_id(name: str, where: str) -> str:
    """An item's id, which names its folder.

    Raises:
        ValueError: it can't.
    """
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise ValueError(f"{where}: id {name!r} names a folder: letters, digits, dots, _ and - only")
    return name


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it can't be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def prompts_hash(items: Sequence[Item]) -> str:
    """SHA-256 of the prompts, one a line."""
    return hashlib.sha256("".join(f"{item.prompt}\n" for item in items).encode()).hexdigest()


def first_of_each_kind(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first ``limit`` items of every kind, in their order; None: all.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is None:
        return list(items)
    if limit < 1:
        raise ValueError(f"--limit {limit} must be 1 or more")
    seen: dict[str, int] = {}
    chosen = []
    for item in items:
        seen[item.kind] = seen.get(item.kind, 0) + 1
        if seen[item.kind] <= limit:
            chosen.append(item)
    return chosen
