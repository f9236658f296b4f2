"""Steps of a training as micro-batches of images: which samples, at which resolution, for which rank."""

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from nami_lightning.batch import MicroBatch
from nami_lightning.chance import uniform_of
from nami_lightning.curriculum import Curriculum
from nami_lightning.datamodules.dataset import Bucket
from nami_lightning.datamodules.images import read_image
from nami_lightning.datamodules.order import BucketOrder, Lots, apportion, reads
from nami_lightning.datamodules.shapes import Aspect
from nami_lightning.datamodules.shards import Record
from nami_lightning.preemption import leave_to_parent

MIDDLE = (0.5, 0.5)


class Place(NamedTuple):
    """Where a sample lies: the number of its bucket, and its index there."""

    bucket: int
    record: int


class StageImages:
    """The buckets of one split as the stages see them.

    Args:
        buckets: all of the split.
        resolutions: of the stages.
        top_only: every stage gets images of the finest stage's resolution (the pooled latent pyramid needs it).

    Attributes:
        aspects: of each stage, to the numbers of the buckets that it may draw: its resolution or higher.

    Raises:
        ValueError: a bucket's resolution is not a multiple of a coarser stage's.
    """

    def __init__(self, buckets: Sequence[Bucket], resolutions: Sequence[int], top_only: bool) -> None:
        self.buckets = buckets
        self.sides = [resolutions[-1]] * len(resolutions) if top_only else list(resolutions)
        self.aspects: list[dict[Aspect, list[int]]] = []
        for side in self.sides:
            usable: dict[Aspect, list[int]] = {}
            for number, bucket in enumerate(buckets):
                if bucket.resolution >= side:
                    if bucket.resolution % side:
                        raise ValueError(
                            f"the data set's {bucket.resolution} px are no multiple of a stage's {side} px: prepare it "
                            f"for the resolutions {list(resolutions)}"
                        )
                    usable.setdefault(bucket.aspect, []).append(number)
            self.aspects.append(usable)

    def sizes(self, stage: int, aspect: Aspect) -> list[int]:
        """Samples of each bucket that ``stage`` may draw of ``aspect``."""
        return [len(self.buckets[number]) for number in self.aspects[stage][aspect]]

    def read(self, places: Sequence[Place]) -> list[Record]:
        """Records in the order asked for; one read a bucket."""
        records: dict[Place, Record] = {}
        for number in {place.bucket for place in places}:
            of_bucket = [place for place in places if place.bucket == number]
            items = self.buckets[number].shards.read([place.record for place in of_bucket])
            records |= {place: Record.from_item(item) for place, item in zip(of_bucket, items, strict=True)}
        return [records[place] for place in places]

    def micro_batch(
        self,
        step: int,
        stage: int,
        aspect: Aspect,
        places: Sequence[Place],
        rows: list[int],
        captions: Sequence[float],
        windows: Sequence[tuple[float, float]],
    ) -> MicroBatch:
        """Read and decode samples of one stage and aspect.

        Args:
            step: number of the global batch.
            stage: of all of them.
            aspect: of all of them.
            places: where they lie.
            rows: their places in the global batch.
            captions: for each, a number in [0, 1) that chooses among its captions.
            windows: for each, where to crop it if there is a choice.
        """
        records = self.read(places)
        shape = aspect.shape(self.sides[stage])
        images = [
            read_image(record.image, shape, self.buckets[place.bucket].resolution // self.sides[stage], window)
            for record, place, window in zip(records, places, windows, strict=True)
        ]
        return MicroBatch(
            step=step,
            stage=stage,
            images=torch.stack(images),
            captions=[record.caption(chance) for record, chance in zip(records, captions, strict=True)],
            ids=[record.id for record in records],
            places=rows,
        )


def split_evenly(samples: int, ranks: int, limit: int, stage: int) -> tuple[int, int]:
    """Micro-batches a rank, and samples in each, for ``samples`` of one stage over ``ranks``.

    Raises:
        ValueError: they don't come out even, with a unit that would.
    """
    each, rest = divmod(samples, ranks)
    count = -(-each // limit)
    if rest or (each and each % count):
        raise ValueError(
            f"stage {stage + 1}: {samples} samples a step can't be split evenly over {ranks} rank(s) in micro-batches "
            f"of at most {limit}: change curriculum.unit, the phase's ratio, or data.max_micro_batch[{stage}]"
        )
    return count, each // count if count else 0


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
    ) -> None:
        self.curriculum, self.images = curriculum, images
        self.max_micro_batch, self.seed = max_micro_batch, seed
        self.rank, self.ranks = rank, ranks
        self.orders = [
            BucketOrder(seed, bucket.name, bucket.shards.chunk_sizes, shuffle_window) for bucket in images.buckets
        ]
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
        return self._micro_batch(number, stage, aspect, places, list(range(lot * size, (lot + 1) * size)))

    def _lot(self, stage: int, number: int, count: int, runs: Sequence[tuple[int, int]]) -> tuple[Aspect, list[Place]]:
        aspects = list(self.images.aspects[stage])
        sizes = [self.images.sizes(stage, aspect) for aspect in aspects]
        kind, before = Lots([sum(of_aspect) for of_aspect in sizes], runs)(number)
        numbers = self.images.aspects[stage][aspects[kind]]
        places = [
            Place(numbers[read.bucket], index)
            for read in reads(sizes[kind], before, count)
            for index in self.orders[numbers[read.bucket]](read.first, read.count)
        ]
        return aspects[kind], places

    def _micro_batch(
        self, step: int, stage: int, aspect: Aspect, places: Sequence[Place], rows: list[int]
    ) -> MicroBatch:
        def chance(purpose: str) -> list[float]:
            return [uniform_of(self.seed, step, row, purpose) for row in rows]

        windows = list(zip(chance("left"), chance("top"), strict=True))
        return self.images.micro_batch(step, stage, aspect, places, rows, chance("caption"), windows)


class StepLoader:
    """Steps ``first``, ``first + 1``, ... in order, fetched ahead by worker processes that live through all phases.

    Not a DataLoader itself, so that Lightning leaves its order alone; ``len`` is the number of all steps of the
    training, the ones before ``first`` included, which is what Lightning's progress counts against.
    ``seconds_waited`` adds up the time for which a batch was asked for and not yet there.
    """

    def __init__(self, dataset: StepDataset, first: int, workers: int, prefetch: int, pin_memory: bool) -> None:
        self.dataset = dataset
        self.seconds_waited = 0.0
        self.loader = DataLoader(
            dataset,
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
            yield batch
            begin = perf_counter()


class HeldoutDataset(Dataset[MicroBatch]):
    """The held-out split as validation micro-batches of one stage each, the same at every validation.

    Args:
        images: the held-out split.
        samples: of each stage, in proportion from all that it may draw, or as many as there are; of each aspect ratio
            rounded down to a multiple of ``ranks``, so that all ranks run the same stages in the same order.
        max_micro_batch: largest micro-batch of each stage.
        rank: this process takes every ``ranks``-th sample.
        ranks: all processes.
    """

    def __init__(
        self, images: StageImages, samples: int, max_micro_batch: Sequence[int], rank: int, ranks: int
    ) -> None:
        self.images = images
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
                yield aspect, [Place(number, index) for number, some in taken for index in range(some)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> MicroBatch:
        if not 0 <= index < len(self.parts):
            raise IndexError(index)
        stage, aspect, places, rows = self.parts[index]
        return self.images.micro_batch(0, stage, aspect, places, rows, [0.0] * len(rows), [MIDDLE] * len(rows))
