"""The multi-resolution DataModule: a step's global batch as a pure function of the recipe.

One batch is one optimizer step: the list of its micro-batches, stage 1 first, each of one stage. Ranks take
slices of the same global batches, in order, so a run goes on with the very same batches after any
interruption and on any number of ranks; the only position is the number of the step.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from time import perf_counter

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from nami_lightning.batch import MicroBatch
from nami_lightning.chance import seed_of
from nami_lightning.curriculum import Curriculum
from nami_lightning.datamodules.order import BucketOrder, Schedule
from nami_lightning.datamodules.prepare import Source, open_buckets, prepare
from nami_lightning.datamodules.shards import Bucket, Record, decode_image
from nami_lightning.module import NamiModule


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
        buckets: coarsest first.
        resolutions: of the buckets and of the stages.
        max_micro_batch: largest micro-batch of each stage.
        seed: of the order, and of the choice among captions.
        shuffle_window: chunks shuffled together.
        top_only: every stage gets images of the finest bucket at their full resolution.
        rank: this process.
        ranks: all processes.

    Raises:
        ValueError: an uneven split, or a stage without images, of any phase.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        buckets: Sequence[Bucket],
        resolutions: Sequence[int],
        max_micro_batch: Sequence[int],
        seed: int,
        shuffle_window: int,
        top_only: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.curriculum, self.buckets = curriculum, buckets
        self.sides = [resolutions[-1]] * len(resolutions) if top_only else list(resolutions)
        self.max_micro_batch, self.seed = max_micro_batch, seed
        self.rank, self.ranks = rank, ranks
        self.schedule = Schedule([len(bucket) for bucket in buckets], top_only)
        self.orders = [
            BucketOrder(seed, str(resolution), bucket.chunk_sizes, shuffle_window)
            for bucket, resolution in zip(buckets, resolutions, strict=True)
        ]
        for stage in range(curriculum.num_stages):
            if not any(self.schedule.sizes[stage]) and any(phase.ratio[stage] for phase in curriculum.phases):
                held = ", ".join(f"{side} px {len(b)}" for side, b in zip(resolutions, buckets, strict=True))
                raise ValueError(
                    f"stage {stage + 1} is to be trained, but no bucket of {resolutions[stage]} px or more holds an "
                    f"image (images by bucket: {held})"
                )
            for phase in curriculum.phases:
                split_evenly(phase.ratio[stage] * curriculum.unit, ranks, max_micro_batch[stage], stage)

    def __len__(self) -> int:
        return self.curriculum.total_steps

    def __getitem__(self, step: int) -> list[MicroBatch]:
        samples, before = self.curriculum.samples(step), self.curriculum.samples_before(step)
        batch = []
        for stage, count in enumerate(samples):
            parts, size = split_evenly(count, self.ranks, self.max_micro_batch[stage], stage)
            indices = self.indices(stage, before[stage], count)
            for part in range(self.rank * parts, (self.rank + 1) * parts):
                rows = range(part * size, (part + 1) * size)
                places = [sum(samples[:stage]) + row for row in rows]
                batch.append(self._micro_batch(step, stage, places, [indices[row] for row in rows]))
        return batch

    def stage_batch(self, number: int, stage: int) -> MicroBatch:
        """This rank's slice of the ``number``-th batch of a stage's stream, whatever the curriculum says of it.

        Places are positions in the stream, so a sample's chance does not depend on the number of ranks.
        """
        size = self.max_micro_batch[stage]
        first = (number * self.ranks + self.rank) * size
        return self._micro_batch(number, stage, list(range(first, first + size)), self.indices(stage, first, size))

    def indices(self, stage: int, before: int, count: int) -> list[tuple[int, int]]:
        """(bucket, index) of ``stage``'s next ``count`` samples after its first ``before``, over all ranks."""
        reads = self.schedule.reads(stage, before, count)
        return [(read.bucket, i) for read in reads for i in self.orders[read.bucket](read.first, read.count)]

    def _micro_batch(self, step: int, stage: int, places: list[int], wanted: list[tuple[int, int]]) -> MicroBatch:
        records = self._read(wanted)
        choices = [seed_of(self.seed, step, place, "caption") for place in places]
        return MicroBatch(
            step=step,
            stage=stage,
            images=torch.stack([decode_image(record.image, self.sides[stage]) for record in records]),
            captions=[r.captions[choice % len(r.captions)] for r, choice in zip(records, choices, strict=True)],
            ids=[record.id for record in records],
            places=places,
        )

    def _read(self, wanted: Sequence[tuple[int, int]]) -> list[Record]:
        """Records by (bucket, index), in the order asked for; one read a bucket."""
        records: dict[tuple[int, int], Record] = {}
        for b, bucket in enumerate(self.buckets):
            indices = [index for which, index in wanted if which == b]
            if indices:
                records |= {(b, i): r for i, r in zip(indices, bucket.read(indices), strict=True)}
        return [records[key] for key in wanted]


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
        buckets: of the held-out split, coarsest first.
        resolutions: of the buckets and stages.
        samples: of each stage, or as many as its own bucket holds; rounded down to a multiple of ``ranks``, so that
            all ranks run the same stages in the same order.
        max_micro_batch: largest micro-batch of each stage.
        rank: this process takes every ``ranks``-th sample.
        ranks: all processes.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        resolutions: Sequence[int],
        samples: int,
        max_micro_batch: Sequence[int],
        rank: int,
        ranks: int,
    ) -> None:
        self.buckets, self.resolutions = buckets, resolutions
        self.parts = []
        for stage, (bucket, limit) in enumerate(zip(buckets, max_micro_batch, strict=True)):
            rows = list(range(min(samples, len(bucket)) // ranks * ranks))[rank::ranks]
            self.parts += [(stage, rows[first : first + limit]) for first in range(0, len(rows), limit)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> MicroBatch:
        if not 0 <= index < len(self.parts):
            raise IndexError(index)
        stage, rows = self.parts[index]
        records = self.buckets[stage].read(rows)
        images = torch.stack([decode_image(record.image, self.resolutions[stage]) for record in records])
        return MicroBatch(0, stage, images, [r.captions[0] for r in records], [r.id for r in records], rows)


class MultiResolutionDataModule(L.LightningDataModule):
    """Streams image-caption shards bucketed by resolution, mixed as the curriculum says.

    Args:
        folder: a prepared data set, or, with ``source``, where data sets are made, one folder a set of settings.
        resolutions: side in px of each stage's images, coarsest first.
        curriculum: step to samples of each stage.
        max_micro_batch: samples of each stage that go through the model at once, at most; one number a stage.
        source: prepares the data set if it isn't there yet.
        heldout_percent: share of the source's groups kept for validation, 0..100.
        latent_pyramid: as the model's; ``pool`` makes every stage draw the finest bucket.
        seed: of the order.
        num_workers: processes that read and decode; 0 for none.
        prefetch_factor: steps that each of them works ahead.
        shuffle_window: chunks whose samples are shuffled together.
        validation_samples: held-out samples of each stage in a validation.

    Raises:
        ValueError: settings that don't fit together.
    """

    def __init__(
        self,
        folder: str,
        resolutions: list[int],
        curriculum: Curriculum,
        max_micro_batch: list[int],
        source: Source | None = None,
        heldout_percent: float = 10.0,
        latent_pyramid: str = "encode",
        seed: int = 0,
        num_workers: int = 2,
        prefetch_factor: int = 4,
        shuffle_window: int = 16,
        validation_samples: int = 64,
    ) -> None:
        super().__init__()
        for name, values in (("resolutions", resolutions), ("data.max_micro_batch", max_micro_batch)):
            if len(values) != curriculum.num_stages:
                raise ValueError(
                    f"{name} {values} must have one number a stage; the curriculum has {curriculum.num_stages} stages"
                )
            if min(values) < 1:
                raise ValueError(f"{name} {values} must be positive")
        self.folder, self.source, self.heldout_percent = Path(folder), source, heldout_percent
        self.resolutions, self.curriculum, self.max_micro_batch = resolutions, curriculum, max_micro_batch
        self.top_only = latent_pyramid == "pool"
        self.seed, self.shuffle_window = seed, shuffle_window
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.validation_samples = validation_samples

    def prepare_data(self) -> None:
        """Make the data set if a source is given and its settings' data set isn't there."""
        if self.source is not None:
            prepare(self.source, self.folder, self.resolutions, self.heldout_percent, max(1, self.num_workers))

    @cached_property
    def dataset_folder(self) -> Path:
        """The folder of the prepared data set."""
        if self.source is None:
            return self.folder
        return prepare(self.source, self.folder, self.resolutions, self.heldout_percent, max(1, self.num_workers))

    def steps(self, rank: int = 0, ranks: int = 1) -> StepDataset:
        """Step number to one rank's micro-batches; what training reads, without a trainer."""
        return StepDataset(
            self.curriculum,
            open_buckets(self.dataset_folder, "train", self.resolutions),
            self.resolutions,
            self.max_micro_batch,
            self.seed,
            self.shuffle_window,
            self.top_only,
            rank,
            ranks,
        )

    def heldout(
        self, samples: int, rank: int = 0, ranks: int = 1, micro_batch: Sequence[int] | None = None
    ) -> HeldoutDataset:
        """The first ``samples`` held-out images of each stage, ``micro_batch`` (or ``max_micro_batch``) at once."""
        buckets = open_buckets(self.dataset_folder, "heldout", self.resolutions)
        return HeldoutDataset(buckets, self.resolutions, samples, micro_batch or self.max_micro_batch, rank, ranks)

    def train_dataloader(self) -> StepLoader:
        """From the step that the model has reached."""
        trainer = self.trainer
        assert trainer is not None
        steps = self.steps(trainer.global_rank, trainer.world_size)
        module = trainer.lightning_module
        assert isinstance(module, NamiModule)
        pin_memory = trainer.strategy.root_device.type == "cuda"
        return StepLoader(steps, module.step, self.num_workers, self.prefetch_factor, pin_memory)

    def val_dataloader(self) -> DataLoader[MicroBatch]:
        """Fixed micro-batches of the held-out split."""
        trainer = self.trainer
        assert trainer is not None
        heldout = self.heldout(self.validation_samples, trainer.global_rank, trainer.world_size)
        return DataLoader(heldout, batch_size=None)
