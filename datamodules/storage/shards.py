"""Buckets on disk: litdata shards of records, written in order and read by index."""

import json
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

from litdata.streaming import Cache

from nami_lightning.datamodules.storage.chunk_cache import OPEN_CHUNKS, ChunkCache
from nami_lightning.datamodules.storage.chunk_file import ChunkFile, DamagedChunk, DamagedSample

INDEX = "index.json"


class Record(NamedTuple):
    """One stored sample.

    Attributes:
        id: its name.
        image: a PNG, JPEG or WebP file.
        captions: at least one.
        weights: of the captions; empty: all alike.
    """

    id: str
    image: bytes
    captions: list[str]
    weights: list[float]

    def to_item(self) -> tuple[str, bytes, str]:
        """What litdata stores. No dict: where pyarrow is installed, litdata would store those in Arrow's format, which
        can't be read where it isn't, and is read 256 at a time."""
        return self.id, self.image, json.dumps([self.captions, self.weights], ensure_ascii=False)

    def caption(self, chance: float) -> str:
        """The caption that ``chance``, in [0, 1), falls on."""
        return self.captions[chosen(self.weights or [1.0] * len(self.captions), chance)]

    @classmethod
    def from_item(cls, item: tuple[str, bytes, str]) -> "Record":
        """What litdata read."""
        name, image, texts = item
        return cls(name, image, *json.loads(texts))


def chosen(weights: Sequence[float], chance: float) -> int:
    """Which of several things with ``weights`` the number ``chance``, in [0, 1), falls on."""
    ends = list(accumulate(weights))
    return bisect_right(ends, chance * ends[-1])


class ShardWriter:
    """Writes items to a new folder of shards; usable only once :meth:`close` returned.

    Args:
        folder: created; must not exist.
        chunk_bytes: size at which a chunk is closed.
    """

    def __init__(self, folder: Path, chunk_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.cache = Cache(str(folder), chunk_bytes=chunk_bytes)
        self.count = 0

    def write(self, item: tuple[Any, ...]) -> None:
        """Append an item."""
        self.cache[self.count] = item
        self.count += 1

    def close(self) -> None:
        """Write the last chunk and the index (none for an empty folder)."""
        if self.count:
            self.cache.done()
            self.cache.merge()


class Shards:
    """Reads a folder of shards by index. Files are opened when they are read, so this can be sent to a worker process.

    Args:
        folder: of the shards; one without an index is empty.
        cache: through which their chunks come, if they lie remotely: ``folder`` is one below the cache's.

    Raises:
        ValueError: an index that can't be read.
    """

    def __init__(self, folder: Path, cache: ChunkCache | None = None) -> None:
        self.folder, self.cache = folder, cache
        self._index = read_index(folder)
        self.chunk_sizes = [chunk["chunk_size"] for chunk in self._index["chunks"]]
        self.chunk_bytes = [int(chunk.get("chunk_bytes", 0)) for chunk in self._index["chunks"]]
        self._ends = list(accumulate(self.chunk_sizes))
        self._damaged: dict[int, DamagedChunk] = {}

    def __len__(self) -> int:
        return sum(self.chunk_sizes)

    def read(self, indices: Sequence[int]) -> list[Any]:
        """The items at ``indices``, in that order; read in the order in which they lie on disk.

        Raises:
            DamagedChunk: a chunk is missing or damaged.
            FetchFailed: a remote chunk can't be fetched.
        """
        return list(map(_plain, self.views(indices)))

    def views(self, indices: Sequence[int]) -> list[Any]:
        """As :meth:`read`, but bytes are views of the chunk's file: what isn't looked at isn't read."""
        items = {}
        for number, of_chunk in groupby(sorted(set(indices)), self.chunk_of):
            start = self._ends[number] - self.chunk_sizes[number]
            with self._chunk(number) as chunk:
                for index in of_chunk:
                    items[index] = chunk[index - start]
        return [items[index] for index in indices]

    def damaged_sample(self, index: int, problem: str) -> DamagedSample:
        """The error that says what the item at ``index`` is."""
        number = self.chunk_of(index)
        place = index - self._ends[number] + self.chunk_sizes[number]
        return DamagedSample(self.chunk_file(number), f"item {place} {problem}")

    def chunk_of(self, index: int) -> int:
        """The number of the chunk in which an item lies."""
        return bisect_right(self._ends, index)

    def chunk_file(self, number: int) -> Path:
        """The path of a chunk; of a remote one, when it is here."""
        path: Path = self.folder / self._index["chunks"][number]["filename"]
        return path

    def chunk_name(self, number: int) -> str:
        """The name by which the cache knows a remote chunk."""
        return self._chunk_names[number]

    @cached_property
    def _chunk_names(self) -> list[str]:
        assert self.cache is not None
        folder = self.folder.relative_to(self.cache.folder).as_posix()
        return [f"{folder}/{chunk['filename']}" for chunk in self._index["chunks"]]

    @contextmanager
    def _chunk(self, number: int) -> Iterator[ChunkFile]:
        if number in self._damaged:  # and known to be: not fetched and tried again for every sample
            raise self._damaged[number]
        try:
            if self.cache is None:
                yield self._open(number)
            else:
                entry, config = self._index["chunks"][number], self._index["config"]
                with self.cache.chunk(self.chunk_name(number), entry, config) as chunk:
                    yield chunk
        except DamagedChunk as error:
            if not isinstance(error, DamagedSample):
                self._damaged[number] = error
            raise

    @lru_cache(maxsize=OPEN_CHUNKS)  # noqa: B019  (one for all folders, which live as long as the process)
    def _open(self, number: int) -> ChunkFile:
        return ChunkFile(self.chunk_file(number), self._index["chunks"][number], self._index["config"])


def _plain(item: tuple[Any, ...]) -> tuple[Any, ...]:
    """litdata gives views of a chunk's memory; bytes can be sent between processes and written again."""
    return tuple(bytes(value) if isinstance(value, memoryview) else value for value in item)


def read_index(folder: Path) -> dict[str, Any]:
    """A shard folder's index: ``chunks`` and ``config``; without chunks if the folder has none.

    Raises:
        ValueError: it can't be read.
    """
    path = folder / INDEX
    if not path.exists():
        return {"chunks": [], "config": {}}
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        for chunk in index["chunks"]:
            int(chunk["chunk_size"]), str(chunk["filename"])
        return index
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a litdata index ({error!r}): prepare this data set again") from error


def join(folders: Sequence[Path], names: Sequence[str], target: Path) -> int:
    """Make one folder of shards from several without rewriting a chunk: chunks are linked, indices joined.

    Args:
        folders: of shards, of the same kind of items; empty ones add nothing.
        names: one a folder; prefixes of its chunks' new names.
        target: created.

    Returns:
        The number of items.
    """
    chunks: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    target.mkdir(parents=True)
    for folder, name in zip(folders, names, strict=True):
        index = read_index(folder)
        config = config or index["config"]
        for chunk in index["chunks"]:
            renamed = f"{name}-{chunk['filename']}"
            _link(folder / chunk["filename"], target / renamed)
            chunks.append(chunk | {"filename": renamed})
    (target / INDEX).write_text(json.dumps({"chunks": chunks, "config": config}))
    return sum(chunk["chunk_size"] for chunk in chunks)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system can't."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
