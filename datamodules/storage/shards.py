"""Buckets on disk: litdata shards of records, which are written in order and read by index."""

import json
import re
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

from litdata.streaming import Cache
from litdata.utilities.env import _DistributedEnv

from nami_lightning.datamodules.storage.chunk_cache import OPEN_CHUNKS, ChunkCache
from nami_lightning.datamodules.storage.chunk_file import ChunkFile, DamagedChunk, DamagedSample

INDEX = "index.json"
CHUNK_NAME = re.compile(r"[\w-][\w.-]*\.bin", re.ASCII)
"""The names of chunk files, ``000012-chunk-0-3.bin`` for example."""

ONE_CHUNK = "chunk-0-0.bin"
"""The name of the chunk in a folder that has no other; litdata writes the same."""

SOURCE = "source"
"""The kind of the captions that a source had, beside those that a model wrote."""


class Record(NamedTuple):
    """One stored sample.

    Attributes:
        id: its name.
        image: the content of a PNG, JPEG or WebP file.
        captions: one caption or more.
        weights: the weight of each caption; empty if all have the same weight.
        kinds: what each caption is: ``source``, or what ``lightning data caption`` made, ``long`` for example; empty
            if all are the source's.
    """

    id: str
    image: bytes
    captions: list[str]
    weights: list[float]
    kinds: Sequence[str] = ()

    def to_item(self) -> tuple[str, bytes, str]:
        """Return the tuple that litdata stores.

        It holds no dict: if pyarrow is installed, litdata stores dicts in Arrow's format. That can't be read where
        pyarrow is missing, and it is read 256 items at a time.
        """
        texts = [self.captions, self.weights, *([self.kinds] if self.kinds else [])]
        return self.id, self.image, json.dumps(texts, ensure_ascii=False)

    def with_captions(self, numbers: Sequence[int]) -> "Record":
        """Return the record with those of its captions that have these numbers."""
        weights = [self.weights[number] for number in numbers] if self.weights else []
        return self._replace(
            captions=[self.captions[number] for number in numbers],
            weights=weights if any(weights) else [],
            kinds=[self.kinds[number] for number in numbers] if self.kinds else (),
        )

    def caption(self, number: float) -> str:
        """Return the caption that ``number``, uniform in [0, 1), selects in proportion to the weights."""
        return self.captions[pick_index(self.weights or [1.0] * len(self.captions), number)]

    @classmethod
    def from_item(cls, item: tuple[str, bytes, str]) -> "Record":
        """Return the record that an item holds, as litdata read it."""
        name, image, texts = item
        return cls(name, image, *json.loads(texts))


def pick_index(weights: Sequence[float], number: float) -> int:
    """Return the index that ``number``, uniform in [0, 1), selects in proportion to ``weights``."""
    ends = list(accumulate(weights))
    return bisect_right(ends, number * ends[-1])


class ShardWriter:
    """Writes items to a new folder of shards, which can be read once :meth:`close` has returned.

    Args:
        folder: the folder, which is created; it must not exist.
        chunk_bytes: a chunk is closed when it reaches this size in bytes.
    """

    def __init__(self, folder: Path, chunk_bytes: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.cache = Cache(str(folder), chunk_bytes=chunk_bytes)
        # A writer is on its own. In a process of several ranks litdata would wait for the others' indexes, for good.
        self.cache._writer._distributed_env = _DistributedEnv(1, 0, 1)
        self.count = 0

    def write(self, item: tuple[Any, ...]) -> None:
        """Append an item."""
        self.cache[self.count] = item
        self.count += 1

    def close(self) -> None:
        """Write the last chunk and the index; without items, write nothing."""
        if self.count:
            self.cache.done()
            self.cache.merge()


class Shards:
    """Reads a folder of shards by index.

    Files are opened when they are read, so this object can be sent to a worker process.

    Args:
        folder: the folder of the shards; without an index it counts as empty.
        cache: fetches the chunks if they are remote; ``folder`` must lie below the cache's folder.

    Raises:
        ValueError: the index can't be read.
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
        """Return the items at ``indices``, in that order. They are read in the order in which they lie on disk.

        Raises:
            DamagedChunk: a chunk is missing or damaged.
            FetchFailed: a remote chunk can't be fetched.
        """
        return list(map(_copy_views, self.views(indices)))

    def views(self, indices: Sequence[int]) -> list[Any]:
        """Return the items at ``indices`` like :meth:`read`, with bytes as views of the chunk's file.

        So bytes that nobody uses are not read from the disk.
        """
        items = {}
        for number, chunk_indices in groupby(sorted(set(indices)), self.chunk_of):
            start = self._ends[number] - self.chunk_sizes[number]
            with self._chunk(number) as chunk:
                for index in chunk_indices:
                    items[index] = chunk[index - start]
        return [items[index] for index in indices]

    def damaged_sample(self, index: int, problem: str) -> DamagedSample:
        """Return the error for a damaged item at ``index``: it names the chunk file and the item's number in it."""
        number = self.chunk_of(index)
        item = index - self._ends[number] + self.chunk_sizes[number]
        return DamagedSample(self.chunk_file(number), f"item {item} {problem}")

    def chunk_of(self, index: int) -> int:
        """Return the number of the chunk that holds the item at ``index``."""
        return bisect_right(self._ends, index)

    def chunk_file(self, number: int) -> Path:
        """Return the local path of a chunk; a remote chunk lies there only after it was fetched."""
        path: Path = self.folder / self._index["chunks"][number]["filename"]
        return path

    def chunk_name(self, number: int) -> str:
        """Return the name by which the cache knows a remote chunk."""
        return self._chunk_names[number]

    @cached_property
    def _chunk_names(self) -> list[str]:
        assert self.cache is not None
        folder = self.folder.relative_to(self.cache.folder).as_posix()
        return [f"{folder}/{chunk['filename']}" for chunk in self._index["chunks"]]

    @contextmanager
    def _chunk(self, number: int) -> Iterator[ChunkFile]:
        if number in self._damaged:  # a chunk that is known to be damaged is not fetched again for every sample
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

    @lru_cache(maxsize=OPEN_CHUNKS)  # noqa: B019  (one cache for all folders, and these live as long as the process)
    def _open(self, number: int) -> ChunkFile:
        return ChunkFile(self.chunk_file(number), self._index["chunks"][number], self._index["config"])


def _copy_views(item: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return an item with bytes in place of litdata's views of a chunk's memory.

    Bytes, unlike views, can be sent to other processes and written again.
    """
    return tuple(bytes(value) if isinstance(value, memoryview) else value for value in item)


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a folder of shards: ``chunks`` and ``config``, both empty if the folder has none.

    Raises:
        ValueError: the index can't be read.
    """
    path = folder / INDEX
    if not path.is_file():
        return {"chunks": [], "config": {}}
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        for chunk in index["chunks"]:
            sizes = chunk["chunk_size"], chunk.get("chunk_bytes", 0)
            if not all(isinstance(size, int) and size >= 0 for size in sizes) or not is_chunk_name(chunk["filename"]):
                raise ValueError(f"a chunk is {chunk}")
        if not isinstance(index["config"], dict):
            raise TypeError("its config is no object")
        return index
    except (ValueError, KeyError, RecursionError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a litdata index ({error!r}): prepare this data set again") from error


def is_chunk_name(name: Any) -> bool:
    """Tell whether a name can be that of a chunk's file, which lies in its index's folder and nowhere else."""
    return isinstance(name, str) and CHUNK_NAME.fullmatch(name) is not None


def join(folders: Sequence[Path], names: Sequence[str], target: Path, in_store: bool = False) -> int:
    """Make one folder of shards from several without copying chunks: chunks are linked, and indices are joined.

    Args:
        folders: folders of shards that hold items of the same kind; empty ones add nothing.
        names: one name for each folder, which becomes the prefix of its chunks' new names.
        target: the new folder, which is created.
        in_store: chunks that are not in their folders lie in a store under their new names already.

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
            if not in_store or (folder / chunk["filename"]).exists():
                _link(folder / chunk["filename"], target / renamed)
            chunks.append(chunk | {"filename": renamed})
    (target / INDEX).write_text(json.dumps({"chunks": chunks, "config": config}))
    return sum(chunk["chunk_size"] for chunk in chunks)


def link_chunks(folder: Path, prefix: str, target: Path) -> None:
    """Undo a part of :func:`join`: make a folder of the chunks whose names begin with ``prefix``, without copying them.

    Args:
        folder: a folder of shards.
        prefix: the beginning of the names of the chunks, which their names in ``target`` lack.
        target: the new folder, which is created.
    """
    index = read_index(folder)
    target.mkdir(parents=True)
    chunks = []
    for chunk in index["chunks"]:
        if chunk["filename"].startswith(prefix):
            name = chunk["filename"].removeprefix(prefix)
            _link(folder / chunk["filename"], target / name)
            chunks.append(chunk | {"filename": name})
    (target / INDEX).write_text(json.dumps({"chunks": chunks, "config": index["config"]}))


def link_chunk(folder: Path, number: int, target: Path) -> None:
    """Make a folder of one chunk of a folder of shards, without copying it.

    Args:
        folder: a folder of shards.
        number: the number of the chunk in it.
        target: the new folder, which is created.
    """
    index = read_index(folder)
    target.mkdir(parents=True)
    chunk = index["chunks"][number]
    _link(folder / chunk["filename"], target / ONE_CHUNK)
    entry = chunk | {"filename": ONE_CHUNK}
    (target / INDEX).write_text(json.dumps({"chunks": [entry], "config": index["config"]}))


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
