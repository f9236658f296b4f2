"""Buckets on disk: litdata shards of encoded images with their captions, written in order and read by index.

A record is ``{"id": str, "image": bytes, "captions": JSON list of str}``; the image is a PNG, JPEG or WebP file.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from litdata import StreamingDataset
from litdata.streaming import Cache
from PIL import Image
from torch import Tensor

CHUNK_BYTES = 16 * 2**20


class Record(NamedTuple):
    """One stored sample: its name, its encoded image, its captions (at least one)."""

    id: str
    image: bytes
    captions: list[str]


class BucketWriter:
    """Writes records to a new bucket; usable only once :meth:`close` returned.

    Args:
        folder: created; must not exist.
        chunk_bytes: size at which a chunk is closed.
    """

    def __init__(self, folder: Path, chunk_bytes: int = CHUNK_BYTES) -> None:
        folder.mkdir(parents=True)
        self.cache = Cache(str(folder), chunk_bytes=chunk_bytes)
        self.count = 0

    def write(self, record: Record) -> None:
        """Append a record."""
        self.cache[self.count] = record._asdict() | {"captions": json.dumps(record.captions, ensure_ascii=False)}
        self.count += 1

    def close(self) -> None:
        """Write the last chunk and the index (none for an empty bucket)."""
        if self.count:
            self.cache.done()
            self.cache.merge()


class Bucket:
    """Reads a bucket by index. Opened lazily, so that it can be sent to a worker process.

    Args:
        folder: of the shards; a bucket without an index is empty.

    Raises:
        ValueError: an index that can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chunk_sizes = _chunk_sizes(folder)
        self._dataset: StreamingDataset | None = None

    def __len__(self) -> int:
        return sum(self.chunk_sizes)

    def read(self, indices: Sequence[int]) -> list[Record]:
        """The records at ``indices``, in that order; read in the order in which they lie on disk.

        Raises:
            RuntimeError: a chunk is missing or damaged.
        """
        if self._dataset is None:
            self._dataset = StreamingDataset(str(self.folder), shuffle=False)
        try:
            items = {index: self._dataset[index] for index in sorted(set(indices))}
        except Exception as error:
            raise RuntimeError(
                f"{self.folder}: reading samples {min(indices)}..{max(indices)} failed ({error!r}): "
                "a chunk is missing or damaged; prepare this data set again"
            ) from error
        return [
            Record(item["id"], bytes(item["image"]), json.loads(item["captions"]))
            for item in (items[index] for index in indices)
        ]


def _chunk_sizes(folder: Path) -> list[int]:
    index = folder / "index.json"
    if not index.exists():
        return []
    try:
        return [chunk["chunk_size"] for chunk in json.loads(index.read_text())["chunks"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not a litdata index ({error!r}): prepare this data set again") from error


def decode_image(data: bytes, resolution: int) -> Tensor:
    """An encoded square image to uint8 ``(3, resolution, resolution)``.

    Down-sampling is by the mean of whole cells, the filter that composes: an image brought from 64 to 16 px is
    the same as one brought there by way of 32, so all stages agree on what an image's coarse version is.

    Raises:
        ValueError: the stored side is not a multiple of ``resolution``.
    """
    image = Image.open(io.BytesIO(data)).convert("RGB")
    factor, rest = divmod(image.width, resolution)
    if rest or image.width != image.height:
        raise ValueError(
            f"a stored image is {image.width}x{image.height}: not a multiple of the {resolution} px of its stage"
        )
    if factor > 1:
        image = image.reduce(factor)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
