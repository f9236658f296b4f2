"""The items of one of litdata's chunk files on this machine, read one at a time and in any order.

litdata's own access by index reads the whole local chunk for every item that is not the next one. A shuffled stream
would spend more time on that than on decoding. Here each chunk is mapped into memory once and stays open.
"""

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

from litdata.streaming.item_loader import PyTreeLoader
from litdata.streaming.serializers import _get_serializers
from litdata.utilities._pytree import treespec_loads

KINDS = ("str", "bytes")
"""Kinds of values in an item. Others of litdata's run code when they are read (pickle) or are never written here."""


class DataError(RuntimeError):
    """An error for data that can't be read."""


class DamagedChunk(DataError):
    """An error for a chunk file that is missing or does not hold what it should.

    Args:
        path: the path of the file, or its URL.
        problem: what is wrong with it.
    """

    def __init__(self, path: Path | str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"{self.path} is damaged: {self.problem}. To find all damage: lightning data verify"


class DamagedSample(DamagedChunk):
    """An error for one sample of a chunk that can't be used; the others may be readable."""


def checksum(file: Path) -> str:
    """Return the BLAKE2b hash (128 bits, hexadecimal) of a file's content.

    Raises:
        OSError: it can't be read, or is a device or a pipe, which may have no end.
    """
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "no plain file", str(file))
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def check_config(config: dict[str, Any]) -> None:
    """Check that an index describes plain tuples of texts and bytes: reading anything else could run code.

    Raises:
        ValueError: it describes something else.
    """
    formats, spec = config["data_format"], json.loads(config["data_spec"])[1]
    if not formats or any(kind not in KINDS for kind in formats):
        raise ValueError(f"its values are {formats}, not of {' and '.join(KINDS)}")
    children = [(child["type"], child["context"], child["children_spec"]) for child in spec["children_spec"]]
    if spec["type"] != "builtins.tuple" or spec["context"] != "null" or children != [(None, None, [])] * len(formats):
        raise ValueError("its items are no plain tuples")


class ChunkFile:
    """The items of one chunk file, by their number.

    Args:
        path: the path of the file.
        entry: its entry in the index of its folder: ``chunk_size`` (the number of items) and ``chunk_bytes``.
        config: the config in that index, which says how items are packed.

    Raises:
        DamagedChunk: the file is missing, or ``entry`` describes another file.
    """

    def __init__(self, path: Path, entry: dict[str, Any], config: dict[str, Any]) -> None:
        self.path = path
        try:
            self.items, self.bytes = int(entry["chunk_size"]), int(entry["chunk_bytes"])
            check_config(config)
            config = config | {"data_spec": treespec_loads(config["data_spec"])}
            self._loader = PyTreeLoader(batch_decode="item")
            self._loader.setup(config, [entry], _get_serializers(None))
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise DamagedChunk(path, f"its index does not say how it is to be read ({error!r})") from error
        try:
            if path.exists() and not path.is_file():
                raise OSError(errno.EINVAL, "no plain file")
            size = path.stat().st_size
            with path.open("rb") as file:
                stored_items = int.from_bytes(file.read(4), "little")
        except OSError as error:
            raise DamagedChunk(path, f"it can't be read: {error.strerror}") from error
        if size != self.bytes:
            raise DamagedChunk(path, f"it has {size:,} bytes, but its index says {self.bytes:,}")
        if stored_items != self.items:
            raise DamagedChunk(path, f"it holds {stored_items:,} items, but its index says {self.items:,}")
        self._loader.set_mmap_allowed_chunks({0})

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, number: int) -> Any:
        """Return item ``number``.

        Raises:
            DamagedSample: it can't be unpacked.
        """
        if not 0 <= number < self.items:
            raise IndexError(number)
        try:
            return self._loader.load_item_from_chunk(number, 0, str(self.path), 0, self.bytes)
        except Exception as error:
            raise DamagedSample(self.path, f"item {number} can't be unpacked ({error!r})") from error
