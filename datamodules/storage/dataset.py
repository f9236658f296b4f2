"""A prepared data set's description of itself, and its buckets.

FOLDER/dataset.json                format, settings, counts, checksums: written last
FOLDER/skipped.jsonl               the samples that could not be used, with their reasons
FOLDER/train/256/256x256/          one bucket: shards of images of one shape
FOLDER/heldout/256/256x256/        the same for the held-out split
FOLDER/encodings/NAME/             the same data set as latents and text states: again all of the above
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from nami_lightning.datamodules.aspect_buckets import Aspect, Shape, aspect_of
from nami_lightning.datamodules.storage.chunk_cache import CacheSettings, ChunkCache
from nami_lightning.datamodules.storage.remote import Remote, is_remote
from nami_lightning.datamodules.storage.shards import INDEX, Shards

FORMAT = "nami-shards/3"
ENCODED_FORMAT = "nami-encodings/1"
DESCRIPTION = "dataset.json"
SKIPPED = "skipped.jsonl"
ENCODINGS = "encodings"
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclass(frozen=True)
class Bucket:
    """The images of one split, resolution and shape.

    Attributes:
        shards: the records.
        resolution: of its stage; the shape's area is about its square.
        shape: of the images; with random crops they are larger than it on one side.
        chunk_sizes: samples that are shuffled as one; their order is made of these. Those of the shards, but for
            encodings, which keep the order of the images that they were made of.
    """

    shards: Shards
    resolution: int
    shape: Shape
    chunk_sizes: Sequence[int]

    def __len__(self) -> int:
        return len(self.shards)

    @cached_property
    def files(self) -> list[range]:
        """For each of the chunks that are shuffled, the numbers of the files in which its samples lie."""
        ends = accumulate(self.chunk_sizes)
        spans = ((end - size, end - 1) for size, end in zip(self.chunk_sizes, ends, strict=True))
        return [range(self.shards.chunk_of(first), self.shards.chunk_of(last) + 1) for first, last in spans]

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
    """A data set that :func:`~nami_lightning.datamodules.preparation.prepare.prepare` made.

    Args:
        folder: where it lies, or the URL of a remote one.
        cache: where chunks of a remote one are kept.

    Attributes:
        folder: where it lies; of a remote one, where what is fetched of it lies.
        cache: of a remote one.
        description: what ``dataset.json`` says: ``settings``, ``samples`` of each split and bucket, ``removed`` and
            ``skipped`` by reason, ``checksums`` (BLAKE2b) of every chunk; ``encodings``, if it holds those instead of
            images: see :mod:`nami_lightning.datamodules.precomputed.encode`.

    Raises:
        FileNotFoundError: no folder, or one whose preparation did not finish.
        FetchFailed: a remote one can't be reached.
        ValueError: another format, or a description that can't be read.
    """

    def __init__(self, folder: str | Path, cache: CacheSettings = CacheSettings()) -> None:
        remote = Remote(str(folder)) if is_remote(folder) else None
        self.location = remote.url if remote else str(folder)
        try:
            content = remote.read(DESCRIPTION) if remote else (Path(folder) / DESCRIPTION).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            state = "holds no finished data set" if remote or Path(folder).exists() else "does not exist"
            raise FileNotFoundError(
                f"data.folder {self.location} {state} (no {DESCRIPTION}): prepare it first, or set data.source"
            ) from error
        self.description = _parse(content, f"{self.location}/{DESCRIPTION}")
        self.cache = ChunkCache(remote, cache, content) if remote else None
        self.folder = self.cache.folder if self.cache else Path(folder)

    @property
    def encodings(self) -> dict[str, Any] | None:
        """What the description says of the encodings, if the data set holds those instead of images."""
        return self.description.get("encodings")

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
            if not samples:
                continue
            shards = self._shards(f"{split}/{name}")
            if len(shards) != samples:
                raise ValueError(
                    f"{self.location}/{split}/{name} holds {len(shards)} samples, but {DESCRIPTION} says {samples}: "
                    "it was changed after its preparation; prepare it again"
                )
            chunks = shards.chunk_sizes if self.encodings is None else self.encodings["chunks"][f"{split}/{name}"]
            found.append(Bucket(shards, *parse_bucket_name(name), chunks))
        return sorted(found, key=lambda bucket: (bucket.resolution, bucket.aspect.ratio))

    def _shards(self, bucket: str) -> Shards:
        if self.cache is None:
            return Shards(self.folder / bucket)
        self.cache.metadata(f"{bucket}/{INDEX}")
        shards = Shards(self.folder / bucket, self.cache)
        for number, size in enumerate(shards.chunk_bytes):
            self.cache.sizes[shards.chunk_name(number)] = size
        return shards


def _parse(content: bytes, path: str) -> dict[str, Any]:
    """A description, of this version's format."""
    try:
        description: dict[str, Any] = json.loads(content)
        found = description.get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged: it is no description in JSON ({error}); copy it again, or prepare the data set again"
        ) from error
    if found not in (FORMAT, ENCODED_FORMAT):
        raise ValueError(f"{path} has format {found!r}; this version reads {FORMAT!r}: prepare it again")
    return description
