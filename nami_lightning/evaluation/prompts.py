"""The prompts of a benchmark, and what their files have in common."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark.

    Args:
        id: name of the item, and of its folder of images.
        prompt: text that the image is generated from.
        kind: part of the benchmark that the item belongs to: a task or a category.
        metadata: what the judge needs to know about the item, as JSON values.
    """

    id: str
    prompt: str
    kind: str
    metadata: dict[str, Any] = field(default_factory=dict)


def check_id(name: str, where: str) -> str:
    """Return an item's id if it can name a folder.

    Raises:
        ValueError: it can't.
    """
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
        raise ValueError(f"{where}: id {name!r} can't name a folder: use only letters, digits, dots, _ and -")
    return name


def prompts_hash(items: Sequence[Item]) -> str:
    """Return the SHA-256 of the prompts, joined with one prompt per line."""
    return hashlib.sha256("".join(f"{item.prompt}\n" for item in items).encode()).hexdigest()


def first_of_each_kind(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return the first ``limit`` items of every kind in their order; all items if ``limit`` is None.

    Raises:
        ValueError: the limit is below 1.
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
