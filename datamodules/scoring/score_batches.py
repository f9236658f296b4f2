"""Samples that worker processes read and decode, in batches for the networks that score them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from nami_lightning.datamodules.preparation.image_io import BadImage, open_image
from nami_lightning.datamodules.scoring.image_scores import colours, entropy, perceptual_hash, resolution
from nami_lightning.datamodules.scoring.score_files import ScorePart
from nami_lightning.datamodules.storage.shards import Record


class ScoreBatch(NamedTuple):
    """Some samples of one part.

    Attributes:
        part: the number of the part.
        captions: the captions of each sample.
        scores: the scores that need no network, by name.
        inputs: the images as the CLIP takes them; empty without one.
        images: the images, if a detector is to see them.
    """

    part: int
    captions: list[list[str]]
    scores: dict[str, np.ndarray]
    inputs: dict[str, Tensor]
    images: list[Image.Image]


class ScoreBatches(Dataset[ScoreBatch]):
    """Batches of decoded samples, for a DataLoader with worker processes.

    Args:
        parts: all parts of the data set.
        numbers: the numbers of the parts to read, in order.
        batch_size: the largest number of samples in a batch; all samples of a batch are in one part.
        processor: makes of images what the CLIP takes, a processor of transformers; None: there is no CLIP.
        keep_images: return the images too.
    """

    def __init__(
        self,
        parts: Sequence[ScorePart],
        numbers: Sequence[int],
        batch_size: int,
        processor: Any,
        keep_images: bool,
    ) -> None:
        self.parts, self.processor, self.keep_images = parts, processor, keep_images
        self.batches = [
            (number, first, min(batch_size, parts[number].samples - first))
            for number in numbers
            for first in range(0, parts[number].samples, batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> ScoreBatch:
        if not 0 <= index < len(self.batches):
            raise IndexError(index)
        number, first, count = self.batches[index]
        records, images = read_images(self.parts[number], first, count)
        scores: dict[str, np.ndarray] = {
            "captions": np.array([len(record.captions) for record in records], np.int32),
            "resolution": np.array([resolution(image) for image in images], np.float32),
            "entropy": np.array([entropy(image) for image in images], np.float32),
            "hash": np.array([perceptual_hash(image) for image in images], np.uint64),
            "colours": np.stack([colours(image) for image in images]),
        }
        captions = [record.captions for record in records]
        inputs = dict(self.processor(images, return_tensors="pt")) if self.processor else {}
        return ScoreBatch(number, captions, scores, inputs, images if self.keep_images else [])


def read_images(part: ScorePart, first: int, count: int) -> tuple[list[Record], list[Image.Image]]:
    """Return ``count`` samples of a part from its ``first`` on, and their images.

    Raises:
        DamagedChunk: a chunk or a sample can't be read.
    """
    indices = range(part.first + first, part.first + first + count)
    records, images = [], []
    for index, item in zip(indices, part.bucket.shards.read(indices), strict=True):
        try:
            records.append(Record.from_item(item))
            images.append(open_image(records[-1].image))
        except (BadImage, TypeError, ValueError) as error:
            raise part.bucket.shards.damaged_sample(index, f"can't be read: {error}") from error
    return records, images
