"""A data set that is written to a remote store, part by part, with its description last.

URL/train/256/256x256/000012-chunk-0-0.bin   a chunk of part 12, written once, under its final name
URL.parts/settings.json                      the settings that all parts share
URL.parts/000012.json                        what finished part 12 holds; written after the last of its chunks
URL/dataset.json                             the description, written after everything else

So a reader that finds a description finds all that it describes, and a part whose record is missing is made again. What
a store has no cheap way for, to rename or to replace a folder, is not needed.
"""

import hashlib
import json
import re
import shutil
import socket
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nami_lightning.datamodules.preparation.parts_folder import REPORT, SETTINGS, SOURCE, part_name, parts_folder
from nami_lightning.datamodules.storage.dataset import DESCRIPTION, ENCODINGS, SKIPPED, SPLITS
from nami_lightning.datamodules.storage.remote import FetchFailed, Remote, try_again
from nami_lightning.datamodules.storage.remote_files import fetch_together
from nami_lightning.datamodules.storage.shards import INDEX, is_chunk_name, read_index
from nami_lightning.utils.atomic_write import is_running, this_process

TOGETHER = 64
"""The number of records that are fetched at the same time."""

RECORD = re.compile(r"\d{6,}\.json")
OURS = {DESCRIPTION, SKIPPED, SOURCE, ENCODINGS, *SPLITS}
"""The names of what may be at the URL of a data set."""


class RemoteOutput:
    """The URL of a data set that is made, with a local folder in which its parts are made and its records are kept.

    It may be sent to other processes; they use the same local folder.

    Args:
        url: the URL of the data set.

    Attributes:
        local: the path of a data set whose folder of parts stands for the one in the store, without chunks.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.records = Remote(f"{self.url}.parts")
        name = f"nami-{hashlib.blake2b(self.url.encode(), digest_size=6).hexdigest()}"
        _remove_of_ended_processes(name)
        self.local = Path(tempfile.gettempdir(), f"{name}-{this_process()}", "data")

    def pull(self) -> Path:
        """Make the local folder of parts of the settings and the records in the store; return ``local``.

        Raises:
            FetchFailed: the store can't be reached, or it refuses access.
        """
        folder = parts_folder(self.local)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        there = self._list(self.records.url)
        if SETTINGS in there:
            (folder / SETTINGS).write_bytes(self.records.read(SETTINGS))
        names = [name for name in there if RECORD.fullmatch(name)]
        for some in (names[first : first + TOGETHER] for first in range(0, len(names), TOGETHER)):
            for name, record in fetch_together(self.records.url, some).items():
                if record is not None:
                    _unpack(record, folder / name[: -len(".json")])
        return self.local

    def push_settings(self) -> None:
        """Write the settings of the local folder of parts to the store."""
        self.write(f"{self.records.url}/{SETTINGS}", parts_folder(self.local) / SETTINGS)

    def push_part(self, number: int, bucket_of: Mapping[str, str] = {}) -> None:
        """Write the chunks of a finished local part, then its record; then remove the local chunks.

        Args:
            number: the number of the part.
            bucket_of: the buckets of the part's folders of shards, where they differ from the folders' names.

        Raises:
            FetchFailed: the store can't be reached, or it refuses access.
        """
        part = parts_folder(self.local) / part_name(number)
        chunks = {}
        for index in sorted(part.rglob(INDEX)):
            folder = index.parent.relative_to(part).as_posix()
            bucket = bucket_of.get(folder, folder)
            for chunk in read_index(index.parent)["chunks"]:
                chunks[index.parent / chunk["filename"]] = f"{bucket}/{part.name}-{chunk['filename']}"
        for path, name in chunks.items():
            self.write(f"{self.url}/{name}", path)
        record = {
            path.relative_to(part).as_posix(): b64encode(path.read_bytes()).decode()
            for path in sorted(part.rglob("*"))
            if path.is_file() and path not in chunks
        }
        self._write_bytes(f"{self.records.url}/{part.name}.json", json.dumps(record).encode())
        for path in chunks:
            path.unlink()

    def fetch_chunks(self, part: str, bucket: str, sums: dict[str, str]) -> None:
        """Fetch the chunks of a bucket of a part into its local folder, where they must be written again.

        Args:
            part: the name of the part.
            bucket: the folder of the bucket, relative to the part's.
            sums: the checksums of the chunks by name.
        """
        folder = parts_folder(self.local) / part / bucket
        sizes = {chunk["filename"]: int(chunk["chunk_bytes"]) for chunk in read_index(folder)["chunks"]}
        for file, sum_ in sums.items():
            Remote(self.url).download(f"{bucket}/{part}-{file}", folder / file, sizes[file], sum_)

    @contextmanager
    def merging(self) -> Iterator[Path]:
        """Give a temporary folder for what the merged data set holds besides chunks that are in the store already.

        When the block ends, it is written to the store, the description last. Then all that is not part of the data
        set is removed from the store.

        Raises:
            FetchFailed: the store can't be reached, or it refuses access.
        """
        partial = parts_folder(self.local) / "merging-here"
        yield partial
        files = [path for path in partial.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.name == DESCRIPTION, path)):
            self.write(f"{self.url}/{path.relative_to(partial).as_posix()}", path)
        chunks = set(json.loads((partial / DESCRIPTION).read_text(encoding="utf-8"))["checksums"])
        for split in SPLITS:
            for name in self._find(f"{self.url}/{split}"):
                if is_chunk_name(name.rpartition("/")[2]) and f"{split}/{name}" not in chunks:
                    self._remove(f"{self.url}/{split}/{name}")
        self._remove(self.records.url)
        self.close()

    def close(self) -> None:
        """Remove the local folder."""
        shutil.rmtree(self.local.parent, ignore_errors=True)

    def description(self) -> dict[str, Any] | None:
        """Return the description in the store, or None if there is none yet.

        Raises:
            ValueError: it is damaged, or the URL holds something else.
            FetchFailed: the store can't be reached, or it refuses access.
        """
        try:
            content: dict[str, Any] = json.loads(Remote(self.url).read(DESCRIPTION))
        except FileNotFoundError:
            if foreign := sorted(set(self._list(self.url)) - OURS):
                raise ValueError(
                    f"{self.url} holds something else than a data set ({foreign[0]}): choose another output"
                ) from None
            return None
        except ValueError as error:
            raise ValueError(f"{self.url}/{DESCRIPTION} is damaged ({error}): choose another output") from error
        return content

    def fetch_reports(self) -> Path:
        """Fetch the reports of the parts of the data set in the store; return the local folder that holds them."""
        self.local.mkdir(parents=True, exist_ok=True)
        try:
            (self.local / SOURCE).write_bytes(Remote(self.url).read(SOURCE))
        except FileNotFoundError:
            (self.local / SOURCE).unlink(missing_ok=True)
        return self.local

    def write(self, url: str, path: Path) -> None:
        """Copy a local file to a URL.

        Raises:
            FetchFailed: the store can't be reached, or it refuses access.
        """
        self._try(url, lambda store, target: store.put_file(str(path), target))

    def _write_bytes(self, url: str, content: bytes) -> None:
        self._try(url, lambda store, path: store.pipe_file(path, content))

    def _try(self, url: str, action: Callable[[Any, str], Any]) -> None:
        try:
            try_again(url, action, how="written")
        except FileNotFoundError as error:
            raise FetchFailed(url, "there is no such bucket or folder", "written") from error

    def _list(self, url: str) -> list[str]:
        """Return the names of what is directly below a URL."""

        def names(store: Any, path: str) -> list[str]:
            store.invalidate_cache()
            found = store.ls(path, detail=False)
            return [name.rstrip("/").rpartition("/")[2] for name in found if name.rstrip("/") != path.rstrip("/")]

        try:
            return try_again(url, names, how="listed")
        except FileNotFoundError:
            return []

    def _find(self, url: str) -> list[str]:
        """Return the names of all files below a URL, relative to it."""

        def names(store: Any, path: str) -> list[str]:
            store.invalidate_cache()
            return [name.removeprefix(path.rstrip("/") + "/") for name in store.find(path)]

        try:
            return try_again(url, names, how="listed")
        except FileNotFoundError:
            return []

    def _remove(self, url: str) -> None:
        def remove(store: Any, path: str) -> None:
            store.invalidate_cache()
            if store.exists(path):
                store.rm(path, recursive=True)

        self._try(url, remove)


def _unpack(record: bytes, part: Path) -> None:
    """Make the folder of a finished part of its record; a record that was not written completely makes none."""
    try:
        files = {name: b64decode(content) for name, content in json.loads(record).items()}
    except ValueError:
        return
    partial = part.with_name(f".{part.name}")
    shutil.rmtree(partial, ignore_errors=True)
    for name, content in files.items():
        path = partial / name
        if not path.resolve().is_relative_to(partial.resolve()):
            raise ValueError(f"a record of part {part.name} names {name}, outside the part: remove the folder of parts")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if (partial / REPORT).exists():
        partial.rename(part)


def _remove_of_ended_processes(name: str) -> None:
    """Remove the local folders that killed processes of this machine left behind."""
    pattern = re.compile(rf"{name}-{re.escape(socket.gethostname())}-(\d+)")
    for folder in Path(tempfile.gettempdir()).glob(f"{name}-*"):
        if (match := pattern.fullmatch(folder.name)) and not is_running(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)
