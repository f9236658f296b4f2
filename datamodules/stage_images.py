"""The buckets of one split as the stages use them: read and decode samples into micro-batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from nami_lightning.datamodules.aspect_buckets import Aspect
from nami_lightning.datamodules.augmentation import NO_AUGMENTATION, Augmentation
from nami_lightning.datamodules.preparation.image_io import Position, read_image
from nami_lightning.datamodules.storage.chunk_file import DamagedChunk, DataError
from nami_lightning.datamodules.storage.dataset import Bucket
from nami_lightning.datamodules.storage.shards import SOURCE, Record, pick_index
from nami_lightning.training.batch import Encodings, MicroBatch


class SampleRef(NamedTuple):
    """Where a sample is stored, and its position in the order of reading.

    Attributes:
        bucket: the index of its bucket.
        record: its index in that bucket.
        position: its position in the bucket's stream of samples.
    """

    bucket: int
    record: int
    position: int


Substitutes = Callable[[SampleRef], Iterator[SampleRef]]
"""A function from a sample to the samples that may replace it if it is damaged, the preferred one first."""


class Choice(NamedTuple):
    """The random choices for one sample.

    Attributes:
        caption: a number in [0, 1) that selects one of the captions.
        window: the position of the crop.
        flip: a number in [0, 1) that decides whether the image is mirrored.
        crop: a number in [0, 1) that selects the share of the image that is shown.
        shorten: two numbers in [0, 1): they decide whether the caption is shortened, and to how many sentences.
    """

    caption: float
    window: Position
    flip: float = 0.0
    crop: float = 0.0
    shorten: tuple[float, float] = (0.0, 0.0)


class Sample(NamedTuple):
    """One sample of a micro-batch.

    Attributes:
        id: its name.
        caption: the caption that was selected.
        image: uint8 ``(3, H, W)``.
        encodings: its precomputed encodings, if the data set holds them.
    """

    id: str
    caption: str
    image: Tensor
    encodings: Encodings | None = None


def image_bytes(side: int) -> int:
    """Return the bytes of an image in a micro-batch; other aspect ratios have about as many as the square."""
    return 3 * side**2


class HasCaptions(Protocol):
    """A record of images or of encodings; see :class:`~nami_lightning.datamodules.storage.shards.Record`."""

    @property
    def captions(self) -> list[str]: ...

    @property
    def weights(self) -> list[float]: ...

    @property
    def kinds(self) -> Sequence[str]: ...


def weights_by_kind(record: HasCaptions, by_kind: Mapping[str, float]) -> list[float]:
    """Return the weight of each caption of a record.

    Args:
        record: the record.
        by_kind: the weight of each kind, which its captions share in proportion to their stored weights; kinds that are
            not named count nothing. Empty, or if the record has none of the kinds: the stored weights count.
    """
    stored = record.weights or [1.0] * len(record.captions)
    kinds = record.kinds or [SOURCE] * len(record.captions)
    if not any(by_kind.get(kind) for kind in kinds):
        return stored
    weights = []
    for weight, kind in zip(stored, kinds, strict=True):
        total = sum(other for other, other_kind in zip(stored, kinds, strict=True) if other_kind == kind)
        share = weight / total if total else 1 / list(kinds).count(kind)
        weights.append(by_kind.get(kind, 0.0) * share)
    return weights


class StageImages:
    """The buckets of one split as the stages use them.

    Args:
        buckets: all buckets of the split.
        resolutions: the resolution of each stage in px, coarsest first.
        top_only: give every stage images of the finest stage's resolution, as the pooled latent pyramid needs.
        augmentation: what is changed in the samples.
        caption_weights: how often captions of each kind are used, see :func:`weights_by_kind`; empty: as is stored.

    Attributes:
        sides: the resolution in px of the images that each stage gets.
        aspects: for each stage, the aspect ratios that it can use, each with the indices of its buckets. These have the
            stage's resolution or a higher one.

    Raises:
        ValueError: a bucket's resolution is not a multiple of a coarser stage's resolution.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        resolutions: Sequence[int],
        top_only: bool,
        augmentation: Augmentation = NO_AUGMENTATION,
        caption_weights: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.buckets, self.augmentation, self.caption_weights = buckets, augmentation, dict(caption_weights)
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

    def sample_bytes(self, stage: int) -> int:
        """Return the bytes of one sample of ``stage`` in a micro-batch."""
        return image_bytes(self.sides[stage])

    def sizes(self, stage: int, aspect: Aspect) -> list[int]:
        """Return the number of samples in each bucket of ``aspect`` that ``stage`` can use."""
        return [len(self.buckets[number]) for number in self.aspects[stage][aspect]]

    def items(self, refs: Sequence[SampleRef]) -> list[Any]:
        """Return the stored items of ``refs``, in that order, with one read for each bucket.

        The bytes in the items are views of the files.
        """
        items: dict[SampleRef, Any] = {}
        for number in {ref.bucket for ref in refs}:
            in_bucket = [ref for ref in refs if ref.bucket == number]
            read = self.buckets[number].shards.views([ref.record for ref in in_bucket])
            items |= dict(zip(in_bucket, read, strict=True))
        return [items[ref] for ref in refs]

    def micro_batch(
        self,
        step: int,
        stage: int,
        aspect: Aspect,
        refs: Sequence[SampleRef],
        global_indices: list[int],
        choices: Sequence[Choice],
        substitutes: Substitutes | None = None,
    ) -> MicroBatch:
        """Read and decode samples of one stage and one aspect ratio.

        Args:
            step: the number of the global batch.
            stage: the stage of all samples.
            aspect: the aspect ratio of all samples.
            refs: where the samples are stored.
            global_indices: the positions of the samples in the global batch.
            choices: the random choices for each sample.
            substitutes: gives the samples that may replace a damaged one; with None, damage is an error.

        Raises:
            DamagedChunk: a file, or a sample in it, can't be read.
            DataError: none of the samples that may replace a damaged one can be read.
        """
        damaged: list[str] = []
        try:
            samples = self._samples(stage, aspect, refs, choices)
        except DamagedChunk:
            if substitutes is None:
                raise
            samples = [
                self._first_readable(stage, aspect, chain([ref], substitutes(ref)), choice, damaged)
                for ref, choice in zip(refs, choices, strict=True)
            ]
        encodings = [sample.encodings for sample in samples if sample.encodings is not None]
        return MicroBatch(
            step=step,
            stage=stage,
            images=torch.stack([sample.image for sample in samples]),
            captions=[sample.caption for sample in samples],
            ids=[sample.id for sample in samples],
            global_indices=global_indices,
            encodings=Encodings.joined(encodings) if encodings else None,
            damaged=damaged,
        )

    def _samples(
        self, stage: int, aspect: Aspect, refs: Sequence[SampleRef], choices: Sequence[Choice]
    ) -> list[Sample]:
        samples = []
        for item, ref, choice in zip(self.items(refs), refs, choices, strict=True):
            try:
                samples.append(self.sample(stage, aspect, ref, item, choice))
            except Exception as error:  # Pillow raises errors of many classes on damaged files
                reason = "it is no image" if isinstance(error, UnidentifiedImageError) else repr(error)
                name = item[0] if isinstance(item, tuple) and item else None
                problem = f"(sample {name!r}) can't be decoded: {reason}"
                raise self.buckets[ref.bucket].shards.damaged_sample(ref.record, problem) from error
        return samples

    def sample(self, stage: int, aspect: Aspect, ref: SampleRef, item: Any, choice: Choice) -> Sample:
        """Return the sample that a stored item holds, as ``stage`` needs it."""
        record = Record.from_item(item)
        side = self.sides[stage]
        factor = self.buckets[ref.bucket].resolution // side
        augmentation = self.augmentation
        share = augmentation.crop_share(choice.crop)
        flip = augmentation.flips(choice.flip, record.captions)
        image = read_image(record.image, aspect.shape(side), factor, choice.window, share, flip)
        caption = record.captions[self.pick_caption(record, choice)]
        return Sample(record.id, augmentation.shortened(caption, *choice.shorten), image)

    def pick_caption(self, record: HasCaptions, choice: Choice) -> int:
        """Return the number of the caption that is used of a record."""
        return pick_index(weights_by_kind(record, self.caption_weights), choice.caption)

    def _first_readable(
        self, stage: int, aspect: Aspect, refs: Iterator[SampleRef], choice: Choice, damaged: list[str]
    ) -> Sample:
        """Return the first of ``refs`` that can be read; append the first problem, if there was one, to ``damaged``."""
        problem = ""
        for ref in refs:
            try:
                sample = self._samples(stage, aspect, [ref], [choice])[0]
            except DamagedChunk as error:
                problem = problem or str(error)
            else:
                damaged += [problem] * bool(problem)
                return sample
        raise DataError(f"{problem}. No other sample of its bucket can be read in its place")
