"""Images that worker processes read and decode, in batches for the encoders."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nami_lightning.datamodules.precomputed.encoding_task import EncodingTask, Part
from nami_lightning.datamodules.precomputed.records import Level
from nami_lightning.datamodules.preparation.image_io import MIDDLE, Position, read_image
from nami_lightning.datamodules.storage.shards import Record
from nami_lightning.training.rng import derive_uniform


class RawBatch(NamedTuple):
    """Some samples of one part, decoded.

    Attributes:
        part: the number of the part.
        records: the stored records of the samples; their image files are removed unless the encodings keep them.
        images: uint8 ``(n, crops, 3, H, W)`` by resolution.
        levels: the kinds of latents to make.
    """

    part: int
    records: list[Record]
    images: dict[int, Tensor]
    levels: list[Level]


class RawBatches(Dataset[RawBatch]):
    """Batches of decoded samples, for a DataLoader with worker processes.

    Args:
        task: what is to be encoded.
        parts: the numbers of the parts to read, in order.
        batch_size: the largest number of samples in a batch; all samples of a batch are in one part.
    """

    def __init__(self, task: EncodingTask, parts: list[int], batch_size: int) -> None:
        self.parts, self.crops, self.pixels = task.parts, task.crops, task.pixels
        self.levels = {part.bucket.resolution: task.levels(part.bucket) for part in task.parts}
        self.batches = [
            (number, first, min(batch_size, self.parts[number].samples - first))
            for number in parts
            for first in range(0, self.parts[number].samples, batch_size)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> RawBatch:
        if not 0 <= index < len(self.batches):
            raise IndexError(index)
        number, first, count = self.batches[index]
        part = self.parts[number]
        first += part.first
        records = [Record.from_item(item) for item in part.bucket.shards.read(range(first, first + count))]
        levels = self.levels[part.bucket.resolution]
        keep_images = self.pixels or part.split == "heldout"
        return RawBatch(
            number,
            [record if keep_images else record._replace(image=b"") for record in records],
            {side: self._images(records, part, side) for side in {level.side for level in levels}},
            levels,
        )

    def _images(self, records: list[Record], part: Part, side: int) -> Tensor:
        """Return the crops of all records at resolution ``side``, ``(n, crops, 3, H, W)``."""
        shape, factor = part.bucket.aspect.shape(side), part.bucket.resolution // side
        return torch.stack(
            [
                torch.stack([read_image(record.image, shape, factor, window) for window in self._windows(record, part)])
                for record in records
            ]
        )

    def _windows(self, record: Record, part: Part) -> list[Position]:
        if part.split == "heldout":
            return [MIDDLE]
        return [crop_position(record.id, number) for number in range(self.crops)]


def crop_position(sample: str, number: int) -> Position:
    """Return the random position of a sample's ``number``-th stored crop; it is the same on every machine."""
    return derive_uniform("crop", sample, number, "left"), derive_uniform("crop", sample, number, "top")
