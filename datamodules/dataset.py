"""A prepared data set's description of itself, and its buckets.

FOLDER/dataset.json                format, settings, counts, checksums: written last
FOLDER/skipped.jsonl               the samples that could not be used, with their reasons
FOLDER/train/256/256x256/          one bucket: shards of images of one shape
FOLDER/heldout/256/256x256/        the same for the held-out split
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nami_lightning.datamodules.shapes import Aspect, Shape, aspect_of
from nami_lightning.datamodules.shards import Shards

FORMAT = "nami-shards/3"
DESCRIPTION = "dataset.json"
SKIPPED = "skipped.jsonl"
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclass(frozen=True)
class Bucket:
    """The images of one split, resolution and shape.

    Attributes:
        shards: the records.
        resolution: of its stage; the shape's area is about its square.
        shape: of the images; with random crops they are larger than it on one side.
    """

    shards: Shards
    resolution: int
    shape: Shape

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def aspect(self) -> Aspect:
        """The shape relative to the resolution."""
        return aspect_of(self.shape, self.resolution)

    @property
    def name(self) -> str:
        """``256/256x256``."""
        return bucket_name(self.resolution, self.shape)


def bucket_name(resolution: int, shape: Shape) -> str:
    """A bucket's folder below its split's."""
    return f"{resolution}/{shape}"


def parse_bucket_name(name: str) -> tuple[int, Shape]:
    """The resolution and the shape of :func:`bucket_name`."""
    resolution, _, shape = name.partition("/")
    return int(resolution), Shape(*map(int, shape.split("x")))


class PreparedDataset:
    """A data set that :func:`~nami_lightning.datamodules.prepare.prepare` made.

    Args:
        folder: where it lies.

    Attributes:
        description: what ``dataset.json`` says: ``settings``, ``samples`` of each split and bucket, ``removed`` and
            ``skipped`` by reason, ``checksums`` (BLAKE2b) of every chunk.

    Raises:
        FileNotFoundError: no folder, or one whose preparation did not finish.
        ValueError: another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / DESCRIPTION
        if not path.exists():
            state = "holds no finished data set" if folder.exists() else "does not exist"
            raise FileNotFoundError(
                f"data.folder {folder} {state} (no {DESCRIPTION}): prepare it first, or set data.source"
            )
        self.description: dict[str, Any] = json.loads(path.read_text())
        if self.description.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {self.description.get('format')!r}; this version reads {FORMAT!r}: prepare it again"
            )

    @property
    def resolutions(self) -> list[int]:
        """Of its buckets, coarsest first."""
        return sorted(self.description["settings"]["resolutions"])

    def buckets(self, split: Split) -> list[Bucket]:
        """The buckets of a split that hold anything, coarsest first.

        Raises:
            ValueError: shards that don't hold what the description says.
        """
        found = []
        for name, samples in self.description["samples"][split].items():
            shards = Shards(self.folder / split / name)
            if len(shards) != samples:
                raise ValueError(
                    f"{shards.folder} holds {len(shards)} samples, but {self.folder / DESCRIPTION} says {samples}: "
                    "it was changed after its preparation; prepare it again"
                )
            found.append(Bucket(shards, *parse_bucket_name(name)))
        return sorted(found, key=lambda bucket: (bucket.resolution, bucket.aspect.ratio))
