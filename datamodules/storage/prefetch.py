"""Training on a remote data set: which chunks each step needs, and which are fetched ahead.

Each stage has its own stream through each bucket that it uses. Its position in that stream is a cursor. The order of
samples is a closed form, so the chunks of the coming steps are known. At a step, the cache keeps the chunks that each
cursor reads until the slowest process of this machine has finished that step, and it fetches the next window of
chunks. So a cursor fetches each chunk of its epoch once, whatever the size of the cache. A chunk that another cursor
has already passed is fetched again only if it was removed from the cache.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nami_lightning.datamodules.sample_order import BucketOrder, apportion
from nami_lightning.datamodules.step_dataset import StepDataset
from nami_lightning.datamodules.storage.chunk_cache import ChunkCache
from nami_lightning.datamodules.storage.dataset import Bucket
from nami_lightning.training.batch import MicroBatch

TRAINING, HELDOUT = "training", "heldout"


class Cursor(NamedTuple):
    """The position of a stage in the stream of a bucket.

    Attributes:
        stage: the stage.
        bucket: the index of the bucket.
        first: the position of the next sample.
        last: the last position that a process of this machine may reach meanwhile.
    """

    stage: int
    bucket: int
    first: int
    last: int


class RemoteStepDataset(StepDataset):
    """A dataset that maps the number of a step to the micro-batches of one rank, and reads them through a cache.

    Args:
        cache: gives the chunks of the images.
        steps_apart: the number of steps by which processes that share the cache may be apart; see
            :func:`max_steps_apart`.
        settings: the arguments of :class:`StepDataset`.

    Raises:
        ValueError: see :class:`StepDataset`.
    """

    def __init__(self, cache: ChunkCache, steps_apart: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.cache, self.steps_apart = cache, steps_apart

    def __getitem__(self, step: int) -> list[MicroBatch]:
        self.cache.hold(TRAINING, self.chunks_ahead(step))
        return super().__getitem__(step)

    def chunks_ahead(self, step: int) -> list[str]:
        """Return the chunks that are needed from ``step`` on, then each cursor's next window, the soonest first."""
        needed, following = [], []
        for cursor in self.cursors(step):
            order, bucket = self.orders[cursor.bucket], self.images.buckets[cursor.bucket]
            end = order.window_end(cursor.last)
            needed += chunk_names(bucket, order.windows(cursor.first, cursor.last))
            following += chunk_names(bucket, order.windows(end, end))
        return needed + following

    def cursors(self, step: int) -> Iterator[Cursor]:
        """Yield the cursors of all stages that are still trained at ``step`` or later."""
        for stage in range(self.curriculum.num_stages):
            number = self.curriculum.steps_with(stage, step)
            if number < self.curriculum.steps_with(stage, self.curriculum.total_steps):
                now, then = self.positions(stage, number), self.positions(stage, number + self.steps_apart)
                for (bucket, first), (_, last) in zip(now, then, strict=True):
                    yield Cursor(stage, bucket, first, max(first, last - 1))

    def positions(self, stage: int, number: int) -> Iterator[tuple[int, int]]:
        """Yield each bucket that ``stage`` uses, and the number of its samples before the stage's batch ``number``."""
        batches, sizes = self.stage_batches(stage, self.curriculum.runs(stage))
        for buckets, bucket_sizes, before in zip(
            self.images.aspects[stage].values(), sizes, batches.samples_before(number), strict=True
        ):
            yield from zip(buckets, apportion(before, bucket_sizes), strict=True)


def chunk_names(bucket: Bucket, windows: Iterable[list[int]]) -> list[str]:
    """Return the names of the files that hold the chunks of ``windows``."""
    return [bucket.shards.chunk_name(file) for window in windows for chunk in window for file in bucket.files[chunk]]


def max_steps_apart(workers: int, prefetch: int) -> int:
    """Return the number of steps by which the processes of one machine may be apart.

    It is the sum of the steps that workers are ahead of the training, the steps that they are working on, and the step
    by which ranks may be apart.
    """
    return workers * (prefetch + 1) + 2


def bytes_needed(steps: RemoteStepDataset, heldout: Sequence[str]) -> int:
    """Return the most bytes that all processes of a training keep at a time.

    Args:
        steps: what training reads.
        heldout: the chunks that the validation reads.
    """
    curriculum, buckets = steps.curriculum, steps.images.buckets
    reach: dict[tuple[int, int], int] = {}  # the most samples between a cursor's first and last position
    for step in (0, *curriculum.ends[:-1]):
        for cursor in steps.cursors(step):
            key = cursor.stage, cursor.bucket
            reach[key] = max(reach.get(key, 0), cursor.last - cursor.first + 1)
    needed = dict.fromkeys((bucket for _, bucket in reach), 0)
    for stage in {stage for stage, _ in reach}:
        largest_batch = max(phase.ratio[stage] for phase in curriculum.phases) * curriculum.unit
        for bucket, end in steps.positions(stage, curriculum.total_steps):
            # The fastest process may be ``steps_apart`` ahead of the slowest one, and it keeps as many steps again.
            held = 2 * reach[stage, bucket] + largest_batch
            needed[bucket] += _most_kept(steps.orders[bucket], _shuffled_chunk_bytes(buckets[bucket]), held, end)
    training_bytes = sum(min(size, sum(buckets[bucket].shards.chunk_bytes)) for bucket, size in needed.items())
    return training_bytes + sum(steps.cache.sizes[file] for file in heldout)


def _shuffled_chunk_bytes(bucket: Bucket) -> list[int]:
    """Return the bytes of each chunk that is shuffled as a unit."""
    return [sum(bucket.shards.chunk_bytes[file] for file in files) for files in bucket.files]


def _most_kept(order: BucketOrder, chunk_bytes: Sequence[int], reach: int, end: int) -> int:
    """Return the most bytes that are kept for ``reach`` consecutive positions before ``end``.

    These are the windows that the positions touch, and the window after them.
    """
    if len(chunk_bytes) <= 3 * order.window:
        return sum(chunk_bytes)
    starts, kept = [0], []
    while starts[-1] <= end + reach + order.size:
        kept.append(sum(chunk_bytes[n] for n in next(order.windows(starts[-1], starts[-1]))))
        starts.append(order.window_end(starts[-1]))
    sums = np.cumsum([0, *kept])
    following = np.searchsorted(starts, np.array(starts[1:]) + reach, side="right") + 1
    return int(max(sums[min(after, len(kept))] - sums[i] for i, after in enumerate(following)))


def check_cache_size(steps: RemoteStepDataset, heldout: Sequence[str]) -> None:
    """Refuse a cache that can't hold all that a training reads at a time.

    Raises:
        ValueError: the cache is too small; the message says how many bytes are needed.
    """
    needed, limit = bytes_needed(steps, heldout), steps.cache.settings.limit
    if needed > limit:
        raise ValueError(
            f"data.cache.max_size is {steps.cache.settings.max_size}, but the windows of chunks that are read at a "
            f"time need {needed:,} bytes ({needed / 1e9:.3g} GB): make it at least that, or make data.shuffle_window, "
            "data.num_workers or data.prefetch_factor smaller"
        )
