"""The order of samples, as a pure function: which samples make up a stage's next batch.

Nothing here knows of ranks, workers or interruptions. :class:`Lots` says of which aspect ratio a step's samples of a
stage are, :func:`reads` how many come from which bucket and where in the bucket's stream, :class:`BucketOrder` which
samples stand there. All are closed forms of the number of the step, so a resume needs no other state.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nami_lightning.training.rng import seed_of


@dataclass(frozen=True)
class Read:
    """``count`` samples of bucket ``bucket``, from position ``first`` of the stage's own stream through it."""

    bucket: int
    first: int
    count: int


def apportion(draws: int, sizes: Sequence[int]) -> list[int]:
    """How many of the first ``draws`` draws fall to each of the buckets, in proportion to ``sizes``.

    Webster's method: the i-th draw of a bucket of size s stands at the time (i + 1/2) / s, and draws are taken in
    order of time. So the counts only ever grow with ``draws``, add up to it, and after sum(sizes) draws
    each bucket was drawn exactly its size.
    """
    cycles, rest = divmod(draws, sum(sizes))
    # Webster's counts differ from the exact quotas by less than the number of buckets: start safely below.
    counts = [max(0, rest * size // sum(sizes) - len(sizes)) for size in sizes]
    for _ in range(rest - sum(counts)):
        _, bucket = min(
            ((2 * count + 1) / size, i) for i, (count, size) in enumerate(zip(counts, sizes, strict=True)) if size
        )
        counts[bucket] += 1
    return [count + cycles * size for count, size in zip(counts, sizes, strict=True)]


def reads(sizes: Sequence[int], before: int, count: int) -> list[Read]:
    """The next ``count`` samples after the first ``before``, from buckets in proportion to their ``sizes``.

    A stage has a stream of its own through each bucket, and sees every image it can use once before any twice.
    """
    if count == 0:
        return []
    first, after = apportion(before, sizes), apportion(before + count, sizes)
    return [Read(bucket, i, j - i) for bucket, (i, j) in enumerate(zip(first, after, strict=True)) if j > i]


class Lots:
    """To which kind each lot of a stage belongs: its samples in one step are one lot, all of one aspect ratio.

    That holds on any number of ranks, so micro-batches have one shape and ranks the same one. Lots fall to kinds in
    proportion to the kinds' sizes.

    Args:
        sizes: samples of each kind.
        runs: (lots, samples in each of them), phase after phase.
    """

    def __init__(self, sizes: Sequence[int], runs: Sequence[tuple[int, int]]) -> None:
        self.sizes, self.runs = sizes, runs

    def __call__(self, number: int) -> tuple[int, int]:
        """The kind of lot ``number``, and how many samples of that kind the lots before it took."""
        counts, after = apportion(number, self.sizes), apportion(number + 1, self.sizes)
        kind = next(k for k, (i, j) in enumerate(zip(counts, after, strict=True)) if j > i)
        return kind, self.before(number)[kind]

    def before(self, number: int) -> list[int]:
        """How many samples of each kind the lots before lot ``number`` took."""
        taken = [0] * len(self.sizes)
        start, counts = 0, taken
        for lots, samples in self.runs:
            start = min(number, start + lots)
            after = apportion(start, self.sizes)
            taken = [n + samples * (j - i) for n, i, j in zip(taken, counts, after, strict=True)]
            counts = after
        return taken


class BucketOrder:
    """Epoch after epoch, each sample of a bucket exactly once: a permutation of its chunks, then a shuffle within
    windows of that many consecutive chunks.

    Args:
        seed: of the run.
        name: of the bucket; another bucket has another order.
        chunk_sizes: samples in each chunk of the bucket.
        window: chunks that are shuffled together: how far samples mix, and how many chunks are open at once.
    """

    def __init__(self, seed: int, name: str, chunk_sizes: Sequence[int], window: int) -> None:
        self.seed, self.name, self.window = seed, name, window
        self.chunk_sizes = np.asarray(chunk_sizes, dtype=np.int64)
        self.chunk_starts = np.cumsum(self.chunk_sizes) - self.chunk_sizes
        self.size = int(self.chunk_sizes.sum())

    def __call__(self, first: int, count: int) -> list[int]:
        """Indices in the bucket of the ``count`` samples from position ``first`` of its endless stream."""
        indices: list[int] = []
        while len(indices) < count:
            position = first + len(indices)
            epoch, number = self._window_of(position)
            members = self._window_members(epoch, number)
            begin = position % self.size - int(self._window_starts(epoch)[1][number])
            indices += members[begin : begin + count - len(indices)].tolist()
        return indices

    def windows(self, first: int, last: int) -> Iterator[list[int]]:
        """The chunks of each window in which positions ``first`` to ``last`` of the stream lie, one after the other.

        The windows may be of several epochs; if all of one is among them, the whole bucket comes as one.
        """
        if last - first >= self.size:
            yield list(range(len(self.chunk_sizes)))
            return
        epoch, number = self._window_of(first)
        while True:
            chunks, starts = self._window_starts(epoch)
            yield chunks[number * self.window : (number + 1) * self.window].tolist()
            if (epoch, number) == self._window_of(last):
                return
            epoch, number = (epoch, number + 1) if number + 1 < len(starts) else (epoch + 1, 0)

    def window_end(self, position: int) -> int:
        """The first position after the window in which ``position`` lies."""
        epoch, number = self._window_of(position)
        _, starts = self._window_starts(epoch)
        end = int(starts[number + 1]) if number + 1 < len(starts) else self.size
        return epoch * self.size + end

    def _window_of(self, position: int) -> tuple[int, int]:
        """The epoch of a position of the stream, and the number of its window there."""
        epoch, offset = divmod(position, self.size)
        return epoch, int(np.searchsorted(self._window_starts(epoch)[1], offset, side="right")) - 1

    @lru_cache(maxsize=256)  # noqa: B019  (few orders exist, and they live as long as the process)
    def _window_starts(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The chunks of ``epoch`` in order, and the position at which each window of them begins."""
        chunks = self._rng(epoch, "chunks").permutation(len(self.chunk_sizes))
        ends = np.cumsum(self.chunk_sizes[chunks])
        return chunks, np.concatenate([[0], ends[self.window - 1 : -1 : self.window]])

    @lru_cache(maxsize=64)  # noqa: B019
    def _window_members(self, epoch: int, number: int) -> np.ndarray:
        """Indices of the samples of one window, shuffled."""
        chunks = self._window_starts(epoch)[0][number * self.window : (number + 1) * self.window]
        spans = [np.arange(self.chunk_sizes[c]) + self.chunk_starts[c] for c in chunks]
        return self._rng(epoch, number).permutation(np.concatenate(spans))

    def _rng(self, epoch: int, part: int | str) -> np.random.Generator:
        return np.random.default_rng(seed_of(self.seed, "order", self.name, epoch, part))
