"""Steps of a training whose chunks lie remotely: what is kept and fetched ahead, from the closed form of the order.

Each stage has a stream of its own through each bucket that it draws: a cursor. At a step, the chunks that a cursor will
read until the slowest of the machine's processes has done that step are kept, and those of the window of chunks that
follows are fetched. So a cursor fetches each chunk of its epoch once, whatever the size of the cache; chunks that
another cursor left behind are fetched again only if they had to go.
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
    """A stage's position in the stream of a bucket: of the next sample, and the one that it may reach meanwhile."""

    stage: int
    bucket: int
    first: int
    last: int


class RemoteStepDataset(StepDataset):
    """Step number to the micro-batches of one rank, from a cache.

    Args:
        cache: through which the images' chunks come.
        spread: steps by which processes that share it may be apart; see :func:`spread_of`.
        settings: as of :class:`StepDataset`.

    Raises:
        ValueError: see :class:`StepDataset`.
    """

    def __init__(self, cache: ChunkCache, spread: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.cache, self.spread = cache, spread

    def __getitem__(self, step: int) -> list[MicroBatch]:
        self.cache.hold(TRAINING, self.ahead(step))
        return super().__getitem__(step)

    def ahead(self, step: int) -> list[str]:
        """The chunks that are needed from ``step`` on, and those of each cursor's next window, the soonest first."""
        needed, following = [], []
        for cursor in self.cursors(step):
            order, bucket = self.orders[cursor.bucket], self.images.buckets[cursor.bucket]
            end = order.window_end(cursor.last)
            needed += chunk_names(bucket, order.windows(cursor.first, cursor.last))
            following += chunk_names(bucket, order.windows(end, end))
        return needed + following

    def cursors(self, step: int) -> Iterator[Cursor]:
        """Of all stages that are still to be trained at ``step``."""
        for stage in range(self.curriculum.num_stages):
            number = self.curriculum.steps_with(stage, step)
            if number < self.curriculum.steps_with(stage, self.curriculum.total_steps):
                now, then = self.positions(stage, number), self.positions(stage, number + self.spread)
                for (bucket, first), (_, last) in zip(now, then, strict=True):
                    yield Cursor(stage, bucket, first, max(first, last - 1))

    def positions(self, stage: int, number: int) -> Iterator[tuple[int, int]]:
        """Each bucket that ``stage`` draws, and how many samples of it come before its lot ``number``."""
        lots, sizes = self.lots(stage, self.curriculum.runs(stage))
        for buckets, of_kind, before in zip(
            self.images.aspects[stage].values(), sizes, lots.before(number), strict=True
        ):
            yield from zip(buckets, apportion(before, of_kind), strict=True)


def chunk_names(bucket: Bucket, windows: Iterable[list[int]]) -> list[str]:
    """The files of windows of chunks."""
    return [bucket.shards.chunk_name(file) for window in windows for chunk in window for file in bucket.files[chunk]]


def spread_of(workers: int, prefetch: int) -> int:
    """Steps by which the processes of one machine may be apart: what workers are ahead of the training, theirs not yet
    done, and the step by which ranks may be."""
    return workers * (prefetch + 1) + 2


def bytes_needed(steps: RemoteStepDataset, heldout: Sequence[str]) -> int:
    """The most that all processes of a training keep at a time, with the chunks ``heldout`` of the validation."""
    curriculum, buckets = steps.curriculum, steps.images.buckets
    reach: dict[tuple[int, int], int] = {}
    for step in (0, *curriculum.ends[:-1]):
        for cursor in steps.cursors(step):
            key = cursor.stage, cursor.bucket
            reach[key] = max(reach.get(key, 0), cursor.last - cursor.first + 1)
    needed = dict.fromkeys((bucket for _, bucket in reach), 0)
    for stage in {stage for stage, _ in reach}:
        lot = max(phase.ratio[stage] for phase in curriculum.phases) * curriculum.unit
        for bucket, end in steps.positions(stage, curriculum.total_steps):
            # From the slowest process's position to the farthest that the fastest keeps is twice the spread.
            held = 2 * reach[stage, bucket] + lot
            needed[bucket] += _most_kept(steps.orders[bucket], _bytes_of(buckets[bucket]), held, end)
    of_training = sum(min(size, sum(buckets[bucket].shards.chunk_bytes)) for bucket, size in needed.items())
    return of_training + sum(steps.cache.sizes[file] for file in heldout)


def _bytes_of(bucket: Bucket) -> list[int]:
    """Of each of the chunks that are shuffled."""
    return [sum(bucket.shards.chunk_bytes[file] for file in files) for files in bucket.files]


def _most_kept(order: BucketOrder, chunk_bytes: Sequence[int], reach: int, end: int) -> int:
    """The most bytes in the windows that ``reach`` consecutive positions before ``end`` touch, and in the next one."""
    if len(chunk_bytes) <= 3 * order.window:
        return sum(chunk_bytes)
    starts, kept = [0], []
    while starts[-1] <= end + reach + order.size:
        kept.append(sum(chunk_bytes[n] for n in next(order.windows(starts[-1], starts[-1]))))
        starts.append(order.window_end(starts[-1]))
    sums = np.cumsum([0, *kept])
    following = np.searchsorted(starts, np.array(starts[1:]) + reach, side="right") + 1
    return int(max(sums[min(after, len(kept))] - sums[i] for i, after in enumerate(following)))


def check_room(steps: RemoteStepDataset, heldout: Sequence[str]) -> None:
    """Refuse a cache that can't hold what a training reads at a time.

    Raises:
        ValueError: naming the bytes that it needs.
    """
    needed, limit = bytes_needed(steps, heldout), steps.cache.settings.limit
    if needed > limit:
        raise ValueError(
            f"data.cache.max_size is {steps.cache.settings.max_size}, but the windows of chunks that are read at a "
            f"time need {needed:,} bytes ({needed / 1e9:.3g} GB): make it at least that, or make data.shuffle_window, "
            "data.num_workers or data.prefetch_factor smaller"
        )
