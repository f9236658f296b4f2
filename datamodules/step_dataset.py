"""The micro-batches of each training step and of the validation, for one rank."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from time import perf_counter
from typing import Any, Literal, NamedTuple

from torch.utils.data import DataLoader, Dataset

from nami_lightning.datamodules.aspect_buckets import Aspect
from nami_lightning.datamodules.preparation.image_io import MIDDLE
from nami_lightning.datamodules.sample_order import BucketOrder, StageBatches, apportion, reads
from nami_lightning.datamodules.stage_images import Choice, SampleRef, StageImages
from nami_lightning.datamodules.storage.chunk_file import DataError
from nami_lightning.models.text_encoder import PromptTokenizer
from nami_lightning.runs.preemption import leave_to_parent
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.curriculum import Curriculum
from nami_lightning.training.rng import derive_uniform

Damaged = Literal["error", "skip"]
log = logging.getLogger(__name__)


class StepDataset(Dataset[list[MicroBatch]]):
    """A dataset that maps the number of a step to the micro-batches of one rank.

    Args:
        curriculum: gives the number of samples of each stage in a step.
        images: the training split.
        max_micro_batch: the largest number of samples in a micro-batch of each stage.
        seed: the seed of the order, of the crops, and of the choice among captions.
        shuffle_window: the number of chunks that are shuffled together.
        rank: the number of this process.
        ranks: the number of all processes.
        damaged: ``error``: a damaged sample is an error; ``skip``: the next readable sample of its stream replaces it.
        tokenize: tokenizes the captions, so that a step need not do it; None: it is not needed.

    Raises:
        ValueError: in some phase the samples can't be split evenly, or a stage has no images.
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
        tokenize: PromptTokenizer | None = None,
    ) -> None:
        self.curriculum, self.images, self.tokenize = curriculum, images, tokenize
        self.max_micro_batch, self.seed = max_micro_batch, seed
        self.rank, self.ranks, self.damaged = rank, ranks, damaged
        self.orders = [BucketOrder(seed, bucket.name, bucket.chunk_sizes, shuffle_window) for bucket in images.buckets]
        for stage in range(curriculum.num_stages):
            if not images.aspects[stage] and any(phase.ratio[stage] for phase in curriculum.phases):
                counts = ", ".join(f"{bucket.name} {len(bucket)}" for bucket in images.buckets)
                raise ValueError(
                    f"stage {stage + 1} is to be trained, but no bucket of {images.sides[stage]} px or more holds an "
                    f"image (images by bucket: {counts or 'none'})"
                )
            for phase in curriculum.phases:
                curriculum.split(phase, stage, ranks, max_micro_batch[stage])

    def __len__(self) -> int:
        return self.curriculum.total_steps

    def __getitem__(self, step: int) -> list[MicroBatch]:
        phase, samples = self.curriculum.phase(step), self.curriculum.samples(step)
        batch = []
        for stage, count in enumerate(samples):
            if not count:
                continue
            parts, size = self.curriculum.split(phase, stage, self.ranks, self.max_micro_batch[stage])
            aspect, refs = self.sample_refs(stage, step)
            group, among = divmod(self.rank, self.curriculum.context_parallel[stage])
            for part in range(group * parts, (group + 1) * parts):
                rows = range(part * size, (part + 1) * size)
                global_indices = [sum(samples[:stage]) + row for row in rows]
                micro = self._micro_batch(step, stage, aspect, [refs[row] for row in rows], global_indices)
                batch.append(replace(micro, damaged=[]) if among else micro)  # the first of a group counts for all
        return batch

    def sample_refs(self, stage: int, step: int) -> tuple[Aspect, list[SampleRef]]:
        """Return the aspect ratio of all samples of ``stage`` in ``step``, over all ranks, and where each is stored."""
        count = self.curriculum.samples(step)[stage]
        return self._batch_refs(stage, self.curriculum.steps_with(stage, step), count, self.curriculum.runs(stage))

    def stage_batch(self, number: int, stage: int) -> MicroBatch:
        """Return this rank's slice of the ``number``-th batch of a stage's stream, whatever the curriculum plans.

        The ``global_indices`` are positions in the stream, so a sample's random numbers don't depend on the number of
        ranks.
        """
        size = self.max_micro_batch[stage]
        batch = number * self.ranks + self.rank
        aspect, refs = self._batch_refs(stage, batch, size, ((batch + 1, size),))
        return self._micro_batch(batch, stage, aspect, refs, list(range(batch * size, (batch + 1) * size)))

    def _batch_refs(
        self, stage: int, number: int, count: int, runs: Sequence[tuple[int, int]]
    ) -> tuple[Aspect, list[SampleRef]]:
        batches, sizes = self.stage_batches(stage, runs)
        aspect_index, before = batches(number)
        aspect, buckets = list(self.images.aspects[stage].items())[aspect_index]
        refs = [
            SampleRef(buckets[read.bucket], index, position)
            for read in reads(sizes[aspect_index], before, count)
            for position, index in enumerate(self.orders[buckets[read.bucket]](read.first, read.count), read.first)
        ]
        return aspect, refs

    def stage_batches(self, stage: int, runs: Sequence[tuple[int, int]]) -> tuple[StageBatches, list[list[int]]]:
        """Return the aspect ratio of each batch of ``stage``, and the sizes of the buckets of each aspect ratio."""
        sizes = [self.images.sizes(stage, aspect) for aspect in self.images.aspects[stage]]
        return StageBatches([sum(bucket_sizes) for bucket_sizes in sizes], runs), sizes

    def _micro_batch(
        self, step: int, stage: int, aspect: Aspect, refs: Sequence[SampleRef], global_indices: list[int]
    ) -> MicroBatch:
        def uniform(index: int, purpose: str) -> float:
            return derive_uniform(self.seed, step, index, purpose)

        def choice(index: int) -> Choice:
            window = uniform(index, "left"), uniform(index, "top")
            shorten = uniform(index, "shorten"), uniform(index, "sentences")
            return Choice(uniform(index, "caption"), window, uniform(index, "flip"), uniform(index, "crop"), shorten)

        choices = [choice(index) for index in global_indices]
        substitutes = self._substitutes if self.damaged == "skip" else None
        micro = self.images.micro_batch(step, stage, aspect, refs, global_indices, choices, substitutes)
        return micro if self.tokenize is None else replace(micro, tokens=self.tokenize(micro.captions))

    def _substitutes(self, ref: SampleRef) -> Iterator[SampleRef]:
        """Yield the samples that follow in the bucket's stream, to the end of the next epoch at most.

        They don't depend on the rank that asks.
        """
        order = self.orders[ref.bucket]
        for position in range(ref.position + 1, ref.position + 2 * order.size):
            yield SampleRef(ref.bucket, order(position, 1)[0], position)


class StepLoader:
    """A loader of the steps ``first``, ``first + 1``, ... in order, which worker processes fetch ahead.

    The workers live through all phases. This is not a DataLoader itself, so that Lightning doesn't change its order.
    ``len`` is the number of all steps of the training, the steps before ``first`` included, because Lightning measures
    its progress against it.

    Attributes:
        seconds_waited: the time in seconds for which batches were asked for and not ready yet.
        damaged: the number of damaged samples that were replaced. Each of them is named in the log once.
    """

    def __init__(self, dataset: StepDataset, first: int, workers: int, prefetch: int, pin_memory: bool) -> None:
        self.dataset = dataset
        self.seconds_waited = 0.0
        self.damaged = 0
        self._logged: set[str] = set()
        self.loader = _make_loader(dataset, range(first, len(dataset)), workers, prefetch, pin_memory)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        begin = perf_counter()
        for batch in _without_errors(self.loader):
            self.seconds_waited += perf_counter() - begin
            self._count_damaged(batch)
            yield batch
            begin = perf_counter()

    def _count_damaged(self, batch: list[MicroBatch]) -> None:
        for problem in chain.from_iterable(micro.damaged for micro in batch):
            self.damaged += 1
            if problem not in self._logged:
                self._logged.add(problem)
                log.warning("%s. Another sample replaces it", problem)


def _make_loader(
    dataset: Dataset[Any], order: Sequence[int], workers: int, prefetch: int, pin_memory: bool
) -> DataLoader[Any]:
    """Return a loader of the items of a dataset in an order, with each :class:`DataError` as a result."""
    return DataLoader(
        _ErrorsAsResults(dataset),
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=leave_to_parent,
    )


class _ErrorsAsResults(Dataset[Any]):
    """The items of a dataset, with a :class:`DataError` as the result of an item that can't be read.

    If a worker raised it, PyTorch would change its class and add a traceback to its message.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except DataError as error:
            return error


def _without_errors(results: Iterable[Any]) -> Iterator[Any]:
    """Yield the results of a loader; raise the first that is an error."""
    for result in results:
        if isinstance(result, DataError):
            raise result
        yield result


class HeldoutPart(NamedTuple):
    """One micro-batch of a validation, before it is read.

    Attributes:
        stage: the stage of its samples.
        aspect: their aspect ratio.
        refs: where they are stored.
        global_indices: their positions among all samples of the stage.
        padding: the number of samples at its end that repeat others.
    """

    stage: int
    aspect: Aspect
    refs: list[SampleRef]
    global_indices: list[int]
    padding: int


class HeldoutDataset(Dataset[MicroBatch]):
    """The counts-out split as validation micro-batches of one stage each; they are the same in every validation.

    Args:
        images: the counts-out split.
        samples: the number of samples of each stage, or all if there are fewer. They are taken from all buckets that
            the stage can use, in proportion to the buckets' sizes. A rank that has one sample of an aspect ratio less
            than others repeats one, so that all ranks run the same stages in the same order: it is the last of its
            micro-batch, and :attr:`MicroBatch.padding` counts it.
        max_micro_batch: the largest number of samples in a micro-batch of each stage.
        rank: the number of this process, which takes every ``ranks``-th sample.
        ranks: the number of all processes.
        damaged: see :class:`StepDataset`.
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
        self.parts: list[HeldoutPart] = []
        for stage, limit in enumerate(max_micro_batch):
            first = 0
            for aspect, refs in self._first_refs(stage, samples):
                rank_rows = range(rank, -(-len(refs) // ranks) * ranks, ranks)
                for begin in range(0, len(rank_rows), limit):
                    rows = rank_rows[begin : begin + limit]
                    padding = sum(row >= len(refs) for row in rows)
                    indices = [row % len(refs) for row in rows]
                    taken, places = [refs[index] for index in indices], [first + index for index in indices]
                    self.parts.append(HeldoutPart(stage, aspect, taken, places, padding))
                first += len(refs)

    def _first_refs(self, stage: int, samples: int) -> Iterator[tuple[Aspect, list[SampleRef]]]:
        """Yield the first samples of each aspect ratio, ``samples`` of them in all."""
        sizes = {aspect: self.images.sizes(stage, aspect) for aspect in self.images.aspects[stage]}
        totals = [sum(bucket_sizes) for bucket_sizes in sizes.values()]
        if not totals:
            return
        counts = apportion(min(samples, sum(totals)), totals)
        for (aspect, bucket_sizes), count in zip(sizes.items(), counts, strict=True):
            if count:
                buckets = self.images.aspects[stage][aspect]
                taken = zip(buckets, apportion(count, bucket_sizes), strict=True)
                yield aspect, [SampleRef(bucket, index, index) for bucket, number in taken for index in range(number)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> MicroBatch:
        if not 0 <= index < len(self.parts):
            raise IndexError(index)
        stage, aspect, refs, global_indices, padding = self.parts[index]
        substitutes = self._substitutes if self.damaged == "skip" else None
        choices = [Choice(0.0, MIDDLE)] * len(refs)
        micro = self.images.micro_batch(0, stage, aspect, refs, global_indices, choices, substitutes)
        return replace(micro, padding=padding)

    def _substitutes(self, ref: SampleRef) -> Iterator[SampleRef]:
        """Yield the samples that follow in the bucket, and then those from its beginning."""
        size = len(self.images.buckets[ref.bucket])
        for position in range(ref.position + 1, ref.position + size):
            yield SampleRef(ref.bucket, position % size, position)

    def chunks(self) -> list[str]:
        """Return the names of all remote chunks that a validation reads."""
        refs = {ref for part in self.parts for ref in part.refs}
        records = [(self.images.buckets[ref.bucket].shards, ref.record) for ref in sorted(refs)]
        return list(dict.fromkeys(shards.chunk_name(shards.chunk_of(record)) for shards, record in records))


class HeldoutLoader:
    """A loader of all micro-batches of a validation in order, which worker processes read ahead.

    The workers live as long as one validation.
    """

    def __init__(self, dataset: HeldoutDataset, workers: int, prefetch: int, pin_memory: bool) -> None:
        self.dataset = dataset
        self.loader = _make_loader(dataset, range(len(dataset)), workers, prefetch, pin_memory)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[MicroBatch]:
        return _without_errors(self.loader)
