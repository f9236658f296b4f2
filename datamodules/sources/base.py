"""What a source of image-caption pairs is: a class with three methods, ours or yours."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

MOST_IMAGE_BYTES = 2**30
"""Bytes of an image file; a larger one is skipped before it is read."""

MOST_TEXT_BYTES = 2**24
"""Bytes of a file with a caption; a larger one is not used."""

MOST_EXPANSION = 100
"""How many times its own size an archive may unpack to, beyond :data:`FREE_BYTES`; images hardly compress."""

FREE_BYTES = 2**30


def most_unpacked(size: int) -> int:
    """Return how many bytes an archive of ``size`` bytes may unpack to."""
    return FREE_BYTES + MOST_EXPANSION * size


@dataclass(frozen=True)
class SourceSample:
    """One image of a source, as the source holds it.

    Attributes:
        id: its name, unique in the source; it is never used as a path to write to.
        image: the image file, of any format that Pillow reads; it is checked and converted later.
        captions: one caption or more.
        weights: how often training uses each caption, relative to the others; empty: all equally often.
        group: samples of one group stay in one split, for example the skin tones of an emoji; empty: the id.
        scores: what filters look at besides the image: ``aesthetic``, ``similarity``.
        notes: what is odd about the sample, though it can be used; each is counted and shown.
    """

    id: str
    image: bytes
    captions: Sequence[str]
    weights: Sequence[float] = ()
    group: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Skipped(NamedTuple):
    """A sample that a source could not read, with the reason. It is counted and listed; the work continues."""

    id: str
    reason: str


class Surveyed(NamedTuple):
    """How many files of one extension a source takes, or ignores.

    Attributes:
        extension: the extension, for example ``.jpg``.
        files: the number of files.
        use: what they are taken for (``image``, ``caption``); empty if they are ignored.
        reason: why they are ignored.
    """

    extension: str
    files: int
    use: str = ""
    reason: str = ""


class Source(ABC):
    """A collection of images with captions. It is sent to worker processes, so it must be picklable."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return all settings that decide what the samples are, as JSON values; a resumed preparation checks them."""

    @abstractmethod
    def parts(self) -> list[str]:
        """Return the names of the parts of the work (a tar file, a thousand files), in an order that never changes.

        If a worker is killed, its unfinished part is read again. A name must contain all that :meth:`read` needs.
        """

    @abstractmethod
    def read(self, part: str) -> Iterator[SourceSample | Skipped]:
        """Yield the samples of one part, in an order that never changes; called in worker processes."""

    def signature(self, part: str) -> dict[str, str]:
        """Return the files of a part, each with a text that changes when the file changes; nothing is read for it.

        A prepared data set stores the signatures of its parts. If one differs later, this part is prepared again. By
        default a part's own name stands for its content, so the name must change with it.
        """
        return {part: ""}

    def uses_network(self) -> bool:
        """Return whether the source reads from a network; if so, its worker processes inherit no open connections."""
        return False

    def part_bytes(self, part: str) -> int | None:
        """Return the bytes of a part's files, if they are known without asking for them; a plan estimates with them."""
        return None

    def part_samples(self, part: str) -> int | None:
        """Return the number of samples of a part, if it is known without reading them; a plan estimates with it."""
        return None

    def survey(self) -> list[Surveyed]:
        """Return which files were taken and which ignored; this is printed before the work begins."""
        return []


def stamp(file: str | Path) -> str:
    """Return the size and the time of modification of a local file, which tell cheaply whether it changed.

    Raises:
        OSError: the system can't tell.
    """
    status = os.stat(file)
    return f"{status.st_size}:{status.st_mtime_ns}"


def part_ranges(count: int, size: int) -> list[tuple[int, int]]:
    """Return ``(first, end)`` of each part, if ``count`` samples are divided into parts of ``size``."""
    return [(first, min(first + size, count)) for first in range(0, count, size)]
