"""The order of samples as a pure function: which samples make up a stage's next batch.

Nothing here depends on ranks, workers or interruptions. :class:`StageBatches` gives the aspect ratio of each batch of a
stage. :func:`reads` gives the number of samples to read from each bucket, and their positions in the bucket's stream.
:class:`BucketOrder` gives the samples at these positions. All three compute their answer from the number of the step,
so a resumed run needs no other state.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nami_lightning.training.rng import derive_seed


@dataclass(frozen=True)
class Read:
    """A read of ``count`` samples of one bucket, from position ``first`` of the stage's own stream through it."""

    bucket: int
    first: int
    count: int


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """Return how many of the first ``total`` samples come from each bucket, in proportion to ``sizes``.

    This is Webster's method. The i-th sample of a bucket of size s has the time (i + 1/2) / s, and samples are taken in
    the order of their times. So no count falls when ``total`` grows, the counts add up to ``total``, and after
    sum(sizes) samples each bucket has given exactly its size.
    """
    cycles, rest = divmod(total, sum(sizes))
    # Webster's counts differ from the exact quotas by less than the number of buckets, so start below them by that.
    counts = [max(0, rest * size // sum(sizes) - len(sizes)) for size in sizes]
    for _ in range(rest - sum(counts)):
        _, bucket = min(
            ((2 * count + 1) / size, i) for i, (count, size) in enumerate(zip(counts, sizes, strict=True)) if size
        )
        counts[bucket] += 1
    return [count + cycles * size for count, size in zip(counts, sizes, strict=True)]


def reads(sizes: Sequence[int], before: int, count: int) -> list[Read]:
    """Return the reads that give the next ``count`` samples after the first ``before``, in proportion to ``sizes``.

    A stage has its own stream through each bucket. It sees every image that it can use once before it sees any image
    twice.
    """
    if count == 0:
        return []
    first, after = apportion(before, sizes), apportion(before + count, sizes)
    return [Read(bucket, i, j - i) for bucket, (i, j) in enumerate(zip(first, after, strict=True)) if j > i]


class StageBatches:
    """The aspect ratio of each batch of a stage, and the samples that the earlier batches took.

    All samples of a stage in one step are one batch of the stage, and they have the same aspect ratio, on any number of
    ranks. So all micro-batches of a stage in a step have the same shape. Batches are given to the aspect ratios in
    proportion to the numbers of samples that these have.

    Args:
        sizes: the number of samples of each aspect ratio.
        runs: pairs (number of batches, samples in each of them), one pair for each phase.
    """

    def __init__(self, sizes: Sequence[int], runs: Sequence[tuple[int, int]]) -> None:
        self.sizes, self.runs = sizes, runs

    def __call__(self, number: int) -> tuple[int, int]:
        """Return the index of the aspect ratio of batch ``number``, and how many of its samples were taken before."""
        counts, after = apportion(number, self.sizes), apportion(number + 1, self.sizes)
        aspect = next(k for k, (i, j) in enumerate(zip(counts, after, strict=True)) if j > i)
        return aspect, self.samples_before(number)[aspect]

    def samples_before(self, number: int) -> list[int]:
        """Return how many samples of each aspect ratio the batches before batch ``number`` took."""
        taken = [0] * len(self.sizes)
        start, counts = 0, taken
        for batches, samples in self.runs:
            start = min(number, start + batches)
            after = apportion(start, self.sizes)
            taken = [n + samples * (j - i) for n, i, j in zip(taken, counts, after, strict=True)]
            counts = after
        return taken


class BucketOrder:
    """The endless order in which the samples of one bucket are read: each sample exactly once in every epoch.

    In each epoch the chunks of the bucket are permuted. Then the samples are shuffled within windows of ``window``
    consecutive chunks.

    Args:
        seed: the seed of the run.
        name: the bucket's name; buckets of different names have different orders.
        chunk_sizes: the number of samples in each chunk of the bucket.
        window: the number of chunks that are shuffled together. It decides how far samples mix, and how many chunks
            are open at once.
    """

    def __init__(self, seed: int, name: str, chunk_sizes: Sequence[int], window: int) -> None:
        self.seed, self.name, self.window = seed, name, window
        self.chunk_sizes = np.asarray(chunk_sizes, dtype=np.int64)
        self.chunk_starts = np.cumsum(self.chunk_sizes) - self.chunk_sizes
        self.size = int(self.chunk_sizes.sum())

    def __call__(self, first: int, count: int) -> list[int]:
        """Return the indices in the bucket of the ``count`` samples from position ``first`` of the endless stream."""
        indices: list[int] = []
        while len(indices) < count:
            position = first + len(indices)
            epoch, number = self._window_of(position)
            members = self._window_members(epoch, number)
            begin = position % self.size - int(self._window_starts(epoch)[1][number])
            indices += members[begin : begin + count - len(indices)].tolist()
        return indices

    def windows(self, first: int, last: int) -> Iterator[list[int]]:
        """Yield, window after window, the chunks that hold the positions ``first`` to ``last`` of the stream.

        The windows may belong to several epochs. If the range covers a whole epoch, all chunks come as one window.
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
        """Return the first position after the window that holds ``position``."""
        epoch, number = self._window_of(position)
        _, starts = self._window_starts(epoch)
        end = int(starts[number + 1]) if number + 1 < len(starts) else self.size
        return epoch * self.size + end

    def _window_of(self, position: int) -> tuple[int, int]:
        """Return the epoch of a stream position, and the number of its window in that epoch."""
        epoch, offset = divmod(position, self.size)
        return epoch, int(np.searchsorted(self._window_starts(epoch)[1], offset, side="right")) - 1

    @lru_cache(maxsize=256)  # noqa: B019  (few orders exist, and they live as long as the process)
    def _window_starts(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the chunks of ``epoch`` in their order, and the offset in the epoch at which each window begins."""
        chunks = self._rng(epoch, "chunks").permutation(len(self.chunk_sizes))
        ends = np.cumsum(self.chunk_sizes[chunks])
        return chunks, np.concatenate([[0], ends[self.window - 1 : -1 : self.window]])

    @lru_cache(maxsize=64)  # noqa: B019
    def _window_members(self, epoch: int, number: int) -> np.ndarray:
        """Return the indices of the samples of one window, shuffled."""
        chunks = self._window_starts(epoch)[0][number * self.window : (number + 1) * self.window]
        spans = [np.arange(self.chunk_sizes[c]) + self.chunk_starts[c] for c in chunks]
        return self._rng(epoch, number).permutation(np.concatenate(spans))

    def _rng(self, epoch: int, part: int | str) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self.seed, "order", self.name, epoch, part))
