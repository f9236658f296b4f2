"""A prepared data set: its description and its buckets.

FOLDER/dataset.json                format, settings, counts and checksums; it is written last
FOLDER/skipped.jsonl               the samples that could not be used, each with the reason
FOLDER/source.jsonl                what it was prepared from: a line for each part of the source
FOLDER/train/256/256x256/          one bucket: shards of images of one shape
FOLDER/heldout/256/256x256/        the same for the held-out split
FOLDER/encodings/NAME/             the same data set as latents and text states, again with all of the above
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from nami_lightning.datamodules.aspect_buckets import Aspect, Shape, aspect_of
from nami_lightning.datamodules.storage.chunk_cache import CacheSettings, ChunkCache
from nami_lightning.datamodules.storage.remote import Remote, is_remote
from nami_lightning.datamodules.storage.shards import INDEX, SOURCE, Shards, is_chunk_name
from nami_lightning.utils.text_files import parse_json

FORMAT = "nami-shards/3"
ENCODED_FORMAT = "nami-encodings/1"
DESCRIPTION = "dataset.json"
SKIPPED = "skipped.jsonl"
ENCODINGS = "encodings"
BUCKET_NAME = re.compile(r"\d+/\d+x\d+")
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclass(frozen=True)
class Bucket:
    """The images of one split, resolution and shape.

    Attributes:
        shards: the stored records.
        resolution: the resolution in px that the bucket was made for; the shape's area is about its square.
        shape: the shape of the images; with random crops, images are larger than it on one side.
        chunk_sizes: the number of samples in each chunk that is shuffled as a unit; the order of samples is computed
            from these. They are the shards' own chunk sizes. Encodings are the exception: they keep the chunk sizes,
            and so the order, of the images that they were made from.
    """

    shards: Shards
    resolution: int
    shape: Shape
    chunk_sizes: Sequence[int]

    def __len__(self) -> int:
        return len(self.shards)

    @cached_property
    def files(self) -> list[range]:
        """For each chunk that is shuffled as a unit, the numbers of the files that hold its samples."""
        ends = accumulate(self.chunk_sizes)
        spans = ((end - size, end - 1) for size, end in zip(self.chunk_sizes, ends, strict=True))
        return [range(self.shards.chunk_of(first), self.shards.chunk_of(last) + 1) for first, last in spans]

    @property
    def aspect(self) -> Aspect:
        """The aspect ratio: the shape relative to the resolution."""
        return aspect_of(self.shape, self.resolution)

    @property
    def name(self) -> str:
        """The bucket's name, for example ``256/256x256``."""
        return bucket_name(self.resolution, self.shape)


def bucket_name(resolution: int, shape: Shape) -> str:
    """Return the folder of a bucket, relative to its split's folder."""
    return f"{resolution}/{shape}"


def parse_bucket_name(name: str) -> tuple[int, Shape]:
    """Return the resolution and the shape that a name from :func:`bucket_name` holds."""
    resolution, _, shape = name.partition("/")
    return int(resolution), Shape(*map(int, shape.split("x")))


class PreparedDataset:
    """A data set that :func:`~nami_lightning.datamodules.preparation.prepare.prepare` made.

    Args:
        folder: the data set's folder, or the URL of a remote data set.
        cache: where chunks of a remote data set are kept.

    Attributes:
        location: the folder or the URL, as messages name it.
        folder: the data set's folder; for a remote data set, the local folder with its fetched files.
        cache: the cache of a remote data set; None for a local one.
        description: the content of ``dataset.json``: ``settings``, ``samples`` of each split and bucket, ``removed``
            and ``skipped`` by reason, and ``checksums`` (BLAKE2b) of every chunk. If the data set holds encodings
            instead of images, also ``encodings``: see :mod:`nami_lightning.datamodules.precomputed.encode`.

    Raises:
        FileNotFoundError: the folder does not exist, or its preparation did not finish.
        FetchFailed: a remote data set can't be reached.
        ValueError: the format is another, or the description can't be read.
    """

    def __init__(self, folder: str | Path, cache: CacheSettings = CacheSettings()) -> None:
        remote = Remote(str(folder)) if is_remote(folder) else None
        self.location = remote.url if remote else str(folder)
        try:
            content = remote.read(DESCRIPTION) if remote else _read_plain(Path(folder) / DESCRIPTION)
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
        """The part of the description about encodings, or None if the data set holds images."""
        return self.description.get("encodings")

    @property
    def identity(self) -> str:
        """A short hash of the content: of all samples and their order. It is cheap, and changes with any of them."""
        encodings = self.encodings or {}
        content = [
            self.description["format"],
            self.description["samples"],
            self.description["checksums"],
            {name: value for name, value in encodings.items() if name != "images"},
        ]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def caption_kinds(self) -> list[str]:
        """What captions the data set has: those of its source, and those that ``lightning data caption`` made."""
        return [SOURCE, *(label for one in self.description.get("captions", []) for label in one["counts"])]

    @property
    def resolutions(self) -> list[int]:
        """The resolutions of the buckets in px, coarsest first."""
        return sorted(self.description["settings"]["resolutions"])

    def buckets(self, split: Split) -> list[Bucket]:
        """Return the buckets of a split that hold samples, coarsest first.

        Raises:
            ValueError: shards don't hold the number of samples that the description says.
        """
        found = []
        for name, samples in self.description["samples"][split].items():
            if not samples:
                continue
            shards = self._shards(f"{split}/{name}")
            if len(shards) != samples:
                raise ValueError(
                    f"{self.location}/{split}/{name} holds {len(shards)} samples, but {DESCRIPTION} says {samples}: "
                    "it was changed after it was prepared; prepare it again"
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


def _read_plain(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        FileNotFoundError: it doesn't exist, or is a device or a pipe, which may have no end.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.read_bytes()


def _parse(content: bytes, path: str) -> dict[str, Any]:
    """Return the content of a description, and check that its format is the one of this version."""
    try:
        description: dict[str, Any] = parse_json(content)
        found = description.get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged: it is no description in JSON ({error}); copy it again, or prepare the data set again"
        ) from error
    if found not in (FORMAT, ENCODED_FORMAT):
        raise ValueError(f"{path} has format {found!r}; this version reads {FORMAT!r}: prepare it again")
    if wrong := _wrong_key(description):
        raise ValueError(
            f"{path} is damaged: its {wrong} is not what it should be; copy it again, or prepare the data set again"
        )
    return description


def _wrong_key(description: dict[str, Any]) -> str:
    """Return a key of a description that is missing, or has a value of another kind; an empty text if there is none."""
    for key in ("settings", "samples", "checksums"):
        if not isinstance(description.get(key), dict):
            return key
    for key in ("removed", "notes", "skipped"):  # older versions lack some
        if not isinstance(description.get(key, {}), dict):
            return key
    for split in SPLITS:
        counts = description["samples"].get(split)
        if not isinstance(counts, dict) or not all(
            BUCKET_NAME.fullmatch(name) and isinstance(count, int) and count >= 0 for name, count in counts.items()
        ):
            return f"samples.{split}"
    for name, value in description["checksums"].items():
        split, _, file = name.partition("/")
        bucket, _, chunk = file.rpartition("/")
        if (
            split not in SPLITS
            or not BUCKET_NAME.fullmatch(bucket)
            or not is_chunk_name(chunk)
            or not isinstance(value, str)
        ):
            return f"checksums[{name!r}]"
    return ""
