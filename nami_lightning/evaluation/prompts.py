"""The prompts of a benchmark, and what their files have in common."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_BYTES = 200
"""Bytes of an item's id: file systems take 255 of a name."""

DEVICES = re.compile(r"con|prn|aux|nul|com\d|lpt\d", re.IGNORECASE)
"""Names that are devices in every folder of Windows."""


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
    plain = re.fullmatch(r"[\w.-]+", name) and re.search(r"\w", name) and not DEVICES.fullmatch(name.partition(".")[0])
    if not plain or len(name.encode()) > MOST_BYTES:
        shown = name if len(name) <= MOST_BYTES else f"{name[:MOST_BYTES]}..."
        raise ValueError(
            f"{where}: id {shown!r} can't name a folder: use only letters, digits, dots, _ and -, at most {MOST_BYTES} "
            "bytes, and no name of a device such as NUL"
        )
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
