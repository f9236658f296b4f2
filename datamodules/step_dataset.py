"""Steps of a training as micro-batches of images: which samples, at which resolution, for which rank."""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from time import perf_counter
from typing import Literal

from torch.utils.data import DataLoader, Dataset

from nami_lightning.datamodules.aspect_buckets import Aspect
from nami_lightning.datamodules.preparation.image_io import MIDDLE
from nami_lightning.datamodules.sample_order import BucketOrder, Lots, apportion, reads
from nami_lightning.datamodules.stage_images import Choice, Place, StageImages
from nami_lightning.datamodules.storage.chunk_file import DataError
from nami_lightning.runs.preemption import leave_to_parent
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.curriculum import Curriculum, split_evenly
from nami_lightning.training.rng import uniform_of

Damaged = Literal["error", "skip"]
log = logging.getLogger(__name__)


class StepDataset(Dataset[list[MicroBatch]]):
    """Step number to the micro-batches of one rank.

    Args:
        curriculum: step to samples of each stage.
        images: the training split.
        max_micro_batch: largest micro-batch of each stage.
        seed: of the order, of crops, and of the choice among captions.
        shuffle_window: chunks shuffled together.
        rank: this process.
        ranks: all processes.
        damaged: whether a damaged sample is an error, or the next readable one of its stream stands in for it.

    Raises:
        ValueError: an uneven split, or a stage without images, of any phase.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        images: StageImages,
        max_micro_batch: Sequence[int],
        seed: int,
        shuffle_window: int,
        rank: int = 0,
        ranks: int = 1,
        damaged: Damaged = "error",
    ) -> None:
        self.curriculum, self.images = curriculum, images
        self.max_micro_batch, self.seed = max_micro_batch, seed
        self.rank, self.ranks, self.damaged = rank, ranks, damaged
        self.orders = [BucketOrder(seed, bucket.name, bucket.chunk_sizes, shuffle_window) for bucket in images.buckets]
        for stage in range(curriculum.num_stages):
            if not images.aspects[stage] and any(phase.ratio[stage] for phase in curriculum.phases):
                held = ", ".join(f"{bucket.name} {len(bucket)}" for bucket in images.buckets)
                raise ValueError(
                    f"stage {stage + 1} is to be trained, but no bucket of {images.sides[stage]} px or more holds an "
                    f"image (images by bucket: {held or 'none'})"
                )
            for phase in curriculum.phases:
                split_evenly(phase.ratio[stage] * curriculum.unit, ranks, max_micro_batch[stage], stage)

    def __len__(self) -> int:
        return self.curriculum.total_steps

    def __getitem__(self, step: int) -> list[MicroBatch]:
        samples = self.curriculum.samples(step)
        batch = []
        for stage, count in enumerate(samples):
            parts, size = split_evenly(count, self.ranks, self.max_micro_batch[stage], stage)
            if not count:
                continue
            aspect, places = self.lot(stage, step)
            for part in range(self.rank * parts, (self.rank + 1) * parts):
                rows = range(part * size, (part + 1) * size)
                of_batch = [sum(samples[:stage]) + row for row in rows]
                batch.append(self._micro_batch(step, stage, aspect, [places[row] for row in rows], of_batch))
        return batch

    def lot(self, stage: int, step: int) -> tuple[Aspect, list[Place]]:
        """The aspect and the places of all samples of ``stage`` in ``step``, over all ranks."""
        count = self.curriculum.samples(step)[stage]
        return self._lot(stage, self.curriculum.steps_with(stage, step), count, self.curriculum.runs(stage))

    def stage_batch(self, number: int, stage: int) -> MicroBatch:
        """This rank's slice of the ``number``-th batch of a stage's stream, whatever the curriculum says of it.

        Places are positions in the stream, so a sample's chance does not depend on the number of ranks.
        """
        size = self.max_micro_batch[stage]
        lot = number * self.ranks + self.rank
        aspect, places = self._lot(stage, lot, size, ((lot + 1, size),))
        return self._micro_batch(lot, stage, aspect, places, list(range(lot * size, (lot + 1) * size)))

    def _lot(self, stage: int, number: int, count: int, runs: Sequence[tuple[int, int]]) -> tuple[Aspect, list[Place]]:
        lots, sizes = self.lots(stage, runs)
        kind, before = lots(number)
        aspect, numbers = list(self.images.aspects[stage].items())[kind]
        places = [
            Place(numbers[read.bucket], index, position)
            for read in reads(sizes[kind], before, count)
            for position, index in enumerate(self.orders[numbers[read.bucket]](read.first, read.count), read.first)
        ]
        return aspect, places

    def lots(self, stage: int, runs: Sequence[tuple[int, int]]) -> tuple[Lots, list[list[int]]]:
        """Which aspect each lot of ``stage`` is of, and the samples of each aspect's buckets."""
        sizes = [self.images.sizes(stage, aspect) for aspect in self.images.aspects[stage]]
        return Lots([sum(of_aspect) for of_aspect in sizes], runs), sizes

    def _micro_batch(
        self, step: int, stage: int, aspect: Aspect, places: Sequence[Place], rows: list[int]
    ) -> MicroBatch:
        def chance(row: int, purpose: str) -> float:
            return uniform_of(self.seed, step, row, purpose)

        choices = [Choice(chance(row, "caption"), (chance(row, "left"), chance(row, "top"))) for row in rows]
        others = self._others if self.damaged == "skip" else None
        return self.images.micro_batch(step, stage, aspect, places, rows, choices, others)

    def _others(self, place: Place) -> Iterator[Place]:
        """The samples that follow in the bucket's stream, to the end of the next epoch at most: no matter who asks."""
        order = self.orders[place.bucket]
        for position in range(place.position + 1, place.position + 2 * order.size):
            yield Place(place.bucket, order(position, 1)[0], position)


class StepLoader:
    """Steps ``first``, ``first + 1``, ... in order, fetched ahead by worker processes that live through all phases.

    Not a DataLoader itself, so that Lightning leaves its order alone; ``len`` is the number of all steps of the
    training, the ones before ``first`` included, which is what Lightning's progress counts against.
    ``seconds_waited`` adds up the time for which a batch was asked for and not yet there, ``damaged`` the samples that
    others stood in for; each of those is named in the log once.
    """

    def __init__(self, dataset: StepDataset, first: int, workers: int, prefetch: int, pin_memory: bool) -> None:
        self.dataset = dataset
        self.seconds_waited = 0.0
        self.damaged = 0
        self._named: set[str] = set()
        self.loader = DataLoader(
            _WithErrors(dataset),
            batch_size=None,
            sampler=range(first, len(dataset)),
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=leave_to_parent,
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        begin = perf_counter()
        for batch in self.loader:
            self.seconds_waited += perf_counter() - begin
            if isinstance(batch, DataError):
                raise batch
            self._count(batch)
            yield batch
            begin = perf_counter()

    def _count(self, batch: list[MicroBatch]) -> None:
        for what in chain.from_iterable(micro.damaged for micro in batch):
            self.damaged += 1
            if what not in self._named:
                self._named.add(what)
                log.warning("%s. Another sample stands in", what)


class _WithErrors(Dataset[list[MicroBatch] | DataError]):
    """Data that can't be read as a result: raised in a worker, an error would lose its class and gain a traceback."""

    def __init__(self, dataset: StepDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> list[MicroBatch] | DataError:
        try:
            return self.dataset[step]
        except DataError as error:
            return error


class HeldoutDataset(Dataset[MicroBatch]):
    """The held-out split as validation micro-batches of one stage each, the same at every validation.

    Args:
        images: the held-out split.
        samples: of each stage, in proportion from all that it may draw, or as many as there are; of each aspect ratio
            rounded down to a multiple of ``ranks``, so that all ranks run the same stages in the same order.
        max_micro_batch: largest micro-batch of each stage.
        rank: this process takes every ``ranks``-th sample.
        ranks: all processes.
        damaged: as of :class:`StepDataset`.
    """

    def __init__(
        self,
        images: StageImages,
        samples: int,
        max_micro_batch: Sequence[int],
        rank: int,
        ranks: int,
        damaged: Damaged = "error",
    ) -> None:
        self.images, self.damaged = images, damaged
        self.parts: list[tuple[int, Aspect, list[Place], list[int]]] = []
        for stage, limit in enumerate(max_micro_batch):
            first = 0
            for aspect, places in self._first(stage, samples):
                mine = list(range(len(places) // ranks * ranks))[rank::ranks]
                for begin in range(0, len(mine), limit):
                    rows = mine[begin : begin + limit]
                    part = (stage, aspect, [places[row] for row in rows], [first + row for row in rows])
                    self.parts.append(part)
                first += len(places)

    def _first(self, stage: int, samples: int) -> Iterator[tuple[Aspect, list[Place]]]:
        """The first places of each aspect that add up to ``samples``."""
        sizes = {aspect: self.images.sizes(stage, aspect) for aspect in self.images.aspects[stage]}
        totals = [sum(of_aspect) for of_aspect in sizes.values()]
        if not totals:
            return
        counts = apportion(min(samples, sum(totals)), totals)
        for (aspect, of_aspect), count in zip(sizes.items(), counts, strict=True):
            if count:
                numbers = self.images.aspects[stage][aspect]
                taken = zip(numbers, apportion(count, of_aspect), strict=True)
                yield aspect, [Place(number, index, index) for number, some in taken for index in range(some)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> MicroBatch:
        if not 0 <= index < len(self.parts):
            raise IndexError(index)
        stage, aspect, places, rows = self.parts[index]
        others = self._others if self.damaged == "skip" else None
        return self.images.micro_batch(0, stage, aspect, places, rows, [Choice(0.0, MIDDLE)] * len(rows), others)

    def _others(self, place: Place) -> Iterator[Place]:
        """The samples that follow in the bucket, and from its beginning."""
        size = len(self.images.buckets[place.bucket])
        for position in range(place.position + 1, place.position + size):
            yield Place(place.bucket, position % size, position)

    def chunks(self) -> list[str]:
        """The names of all remote chunks that are read."""
        places = {place for _, _, of_part, _ in self.parts for place in of_part}
        shards = [(self.images.buckets[place.bucket].shards, place.record) for place in sorted(places)]
        return list(dict.fromkeys(of_place.chunk_name(of_place.chunk_of(index)) for of_place, index in shards))
