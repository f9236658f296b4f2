"""What a source of image-caption pairs is: a class with three methods, ours or yours."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class SourceSample:
    """One image of a source, as it was found.

    Attributes:
        id: unique name in the source; only ever a name, never a path that is written to.
        image: the encoded file, of any format that Pillow reads; converted and checked later.
        captions: at least one.
        weights: of the captions: how often training draws each of them; empty: all alike.
        group: samples of one group stay in one split (the skin tones of an emoji, say); empty: the id.
        scores: what filters look at besides the image: ``aesthetic``, ``similarity``.
    """

    id: str
    image: bytes
    captions: Sequence[str]
    weights: Sequence[float] = ()
    group: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)


class Skipped(NamedTuple):
    """A sample that a source could not give, with the reason; counted and listed, never fatal."""

    id: str
    reason: str


class Source(ABC):
    """Where images come from. Sent to worker processes, so it must be picklable."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that decides what the samples are, JSON-able; a change is noticed when a preparation goes on."""

    @abstractmethod
    def parts(self) -> list[str]:
        """The units of work (a tar file, a thousand files), in a stable order; a kill loses one at most a worker.

        A name must say all that :meth:`read` needs, and should change if the part's content changes.
        """

    @abstractmethod
    def read(self, part: str) -> Iterator[SourceSample | Skipped]:
        """The samples of one part, in a stable order; called in worker processes."""
