"""The buckets of a split as the stages see them: places of samples to micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from nami_lightning.datamodules.aspect_buckets import Aspect
from nami_lightning.datamodules.preparation.image_io import Position, read_image
from nami_lightning.datamodules.storage.chunk_file import DamagedChunk, DataError
from nami_lightning.datamodules.storage.dataset import Bucket
from nami_lightning.datamodules.storage.shards import Record
from nami_lightning.training.batch import Encodings, MicroBatch


class Place(NamedTuple):
    """Where a sample lies: the number of its bucket, its index there, and its position in the order of reading."""

    bucket: int
    record: int
    position: int


Others = Callable[[Place], Iterator[Place]]
"""A sample's place to those of the samples that may stand in for it, the best first."""


class Choice(NamedTuple):
    """What chance decides of a sample: among its captions, by a number in [0, 1), and where it is cropped."""

    caption: float
    window: Position


class Sample(NamedTuple):
    """One of a micro-batch: its id, caption, image (uint8 ``(3, H, W)``), and its encodings, if there are any."""

    id: str
    caption: str
    image: Tensor
    encodings: Encodings | None = None


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

    def items(self, places: Sequence[Place]) -> list[Any]:
        """What is stored, in the order asked for; one read a bucket. Bytes are views of the files."""
        items: dict[Place, Any] = {}
        for number in {place.bucket for place in places}:
            of_bucket = [place for place in places if place.bucket == number]
            read = self.buckets[number].shards.views([place.record for place in of_bucket])
            items |= dict(zip(of_bucket, read, strict=True))
        return [items[place] for place in places]

    def micro_batch(
        self,
        step: int,
        stage: int,
        aspect: Aspect,
        places: Sequence[Place],
        rows: list[int],
        choices: Sequence[Choice],
        others: Others | None = None,
    ) -> MicroBatch:
        """Read and decode samples of one stage and aspect.

        Args:
            step: number of the global batch.
            stage: of all of them.
            aspect: of all of them.
            places: where they lie.
            rows: their places in the global batch.
            choices: chance of each.
            others: stand in for damaged samples; None: damage is an error.

        Raises:
            DamagedChunk: a file or a sample of it can't be read.
            DataError: none of the samples that may stand in can be read.
        """
        damaged: list[str] = []
        try:
            samples = self._samples(stage, aspect, places, choices)
        except DamagedChunk:
            if others is None:
                raise
            samples = [
                self._first_readable(stage, aspect, chain([place], others(place)), choice, damaged)
                for place, choice in zip(places, choices, strict=True)
            ]
        encodings = [sample.encodings for sample in samples if sample.encodings is not None]
        return MicroBatch(
            step=step,
            stage=stage,
            images=torch.stack([sample.image for sample in samples]),
            captions=[sample.caption for sample in samples],
            ids=[sample.id for sample in samples],
            places=rows,
            encodings=Encodings.joined(encodings) if encodings else None,
            damaged=damaged,
        )

    def _samples(self, stage: int, aspect: Aspect, places: Sequence[Place], choices: Sequence[Choice]) -> list[Sample]:
        samples = []
        for item, place, choice in zip(self.items(places), places, choices, strict=True):
            try:
                samples.append(self.sample(stage, aspect, place, item, choice))
            except Exception as error:  # Pillow raises nearly anything on damaged files
                reason = "it is no image" if isinstance(error, UnidentifiedImageError) else repr(error)
                name = item[0] if isinstance(item, tuple) and item else None
                problem = f"(sample {name!r}) can't be decoded: {reason}"
                raise self.buckets[place.bucket].shards.damaged_sample(place.record, problem) from error
        return samples

    def sample(self, stage: int, aspect: Aspect, place: Place, item: Any, choice: Choice) -> Sample:
        """What a stored item holds for a stage."""
        record = Record.from_item(item)
        side = self.sides[stage]
        factor = self.buckets[place.bucket].resolution // side
        image = read_image(record.image, aspect.shape(side), factor, choice.window)
        return Sample(record.id, record.caption(choice.caption), image)

    def _first_readable(
        self, stage: int, aspect: Aspect, places: Iterator[Place], choice: Choice, damaged: list[str]
    ) -> Sample:
        """The sample at the first of ``places`` or, if it is damaged, at the next; its damage is added to the list."""
        problem = ""
        for place in places:
            try:
                sample = self._samples(stage, aspect, [place], [choice])[0]
            except DamagedChunk as error:
                problem = problem or str(error)
            else:
                damaged += [problem] * bool(problem)
                return sample
        raise DataError(f"{problem}. Nor can any sample of its bucket be read that could stand in for it")
