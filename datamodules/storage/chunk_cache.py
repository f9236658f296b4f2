"""A local cache for the chunks of remote data sets: a folder of limited size that all processes and runs here share.

Each process writes the chunks that it reads now or will read next into a file, its lease. These chunks stay in the
cache. When there is no room for a new chunk, chunks that are in no lease are removed, the oldest first. A lease ends
with its process, however that ends. Each chunk is fetched by one process at a time, under a temporary name until it is
complete.

CACHE/locks/                       cache.lock guards leases, space and removal; 00.lock .. ff.lock guard fetching
CACHE/locks/HOST-PID-N.lease       the names of the files that one process holds; locked while the process lives
CACHE/NAME-FINGERPRINT/            the fetched files of one data set, with the same paths as at its URL
"""

import hashlib
import itertools
import json
import logging
import os
import re
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from filelock import FileLock, Timeout

from nami_lightning.datamodules.storage.chunk_file import ChunkFile, DataError
from nami_lightning.datamodules.storage.remote import Remote

log = logging.getLogger(__name__)

OPEN_CHUNKS = 512
"""The number of chunks that a process keeps open. Each is an open file, and systems allow a process 1,024 of these."""

PAUSE = 0.2
"""Seconds that a process waits before it looks again at what the other processes have done."""

PATIENCE = 60.0
"""Seconds that a process waits for room for a chunk that it needs now, because other processes may soon make room."""

READING = "reading"
"""The purpose of a chunk that is held only while it is read."""

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_numbers = itertools.count()


def parse_size(text: str, key: str) -> int:
    """Return the number of bytes that a setting states, for example 50GB or 500GiB.

    Raises:
        ValueError: it states none; the message names the setting's ``key``.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?)B?", text.strip())
    if not match or match[2] not in UNITS:
        raise ValueError(f"{key} must be a number of bytes, for example 50GB or 500GiB; got {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True)
class CacheSettings:
    """Where chunks of a remote data set are kept, and how many bytes of them.

    Args:
        folder: a folder on a local disk; null: ``nami_lightning`` in $XDG_CACHE_HOME or ~/.cache.
        max_size: the largest size of all chunks in it together, for example 50GB or 500GiB.
    """

    folder: str | None = None
    max_size: str = "50GB"

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise ValueError(f"cache.max_size must be positive; got {self.max_size}")

    @property
    def limit(self) -> int:
        """The value of ``max_size`` in bytes."""
        return parse_size(self.max_size, "cache.max_size")

    @property
    def path(self) -> Path:
        """The absolute path of the cache's folder."""
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(self.folder or f"{home}/nami_lightning").expanduser().absolute()


class _Reader:
    """What one process knows of the cache and holds in it; a forked process makes a new one.

    Attributes:
        pid: the process.
        name: a name that no other process on any machine has.
        lease: the file that lists the chunks that the process holds.
        alive: a lock that the process keeps for as long as it lives.
        held: the files that it holds for each purpose.
        open: the chunks that it has open, by file.
        wanted: the files that its thread is to fetch, in order.
        more: notified when ``wanted`` changes.
        thread: fetches in the background.
    """

    def __init__(self, locks: Path) -> None:
        self.pid = os.getpid()
        self.name = re.sub(r"\W", "-", f"{socket.gethostname()}-{self.pid}-{next(_numbers)}")
        self.lease = locks / f"{self.name}.lease"
        self.alive = FileLock(f"{self.lease}.lock")
        self.alive.acquire()
        self.held: dict[str, tuple[str, ...]] = {}
        self.open: dict[str, ChunkFile] = {}
        self.wanted: deque[str] = deque()
        self.more = threading.Condition()
        self.thread: threading.Thread | None = None


_inherited: list[_Reader] = []
"""The readers inherited from this process's parents; they are kept, because freeing them could end their leases."""


class ChunkCache:
    """The local cache of the chunk files of one remote data set.

    Args:
        remote: the folder of the data set in its store.
        settings: where chunks are kept.
        description: the content of the data set's ``dataset.json``; another content means another data set.

    Attributes:
        folder: the data set's local folder. The indices stay in it; chunks are fetched into it and removed again.
        sizes: the bytes of each chunk file, by its name below the folder. Whoever reads the indices fills this in.
        sums: the checksums of the chunk files, by the same names.
    """

    def __init__(self, remote: Remote, settings: CacheSettings, description: bytes) -> None:
        self.remote, self.settings = remote, settings
        fingerprint = hashlib.blake2b(remote.url.encode() + b"\n" + description, digest_size=6).hexdigest()
        self.root = settings.path
        self.folder = self.root / f"{remote.url.rsplit('/', 1)[-1]}-{fingerprint}"
        self.locks = self.root / "locks"
        self.locks.mkdir(parents=True, exist_ok=True)
        self.sizes: dict[str, int] = {}
        self.sums: dict[str, str] = json.loads(description)["checksums"]
        self._own: _Reader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_own": None}

    @property
    def _reader(self) -> _Reader:
        if self._own is None or self._own.pid != os.getpid():
            if self._own is not None:
                _inherited.append(self._own)
            with self._bookkeeping():
                self._own = _Reader(self.locks)
        return self._own

    def _bookkeeping(self) -> FileLock:
        return FileLock(self.locks / "cache.lock")

    # --- reading -------------------------------------------------------------------------------

    def metadata(self, file: str) -> None:
        """Fetch a small file, for example an index, into :attr:`folder`. It stays, and is not counted as used space."""
        path = self.folder / file
        if not path.exists():
            _write(path, self.remote.read(file), self._reader.name)

    @contextmanager
    def chunk(self, file: str, entry: dict[str, Any], config: dict[str, Any]) -> Iterator[ChunkFile]:
        """Give access to a chunk inside a ``with`` block, and fetch it first if it isn't here.

        The cache keeps the chunk open for as long as the chunk is held. Don't use it outside the block.

        Args:
            file: the chunk's name below the folder.
            entry: its entry in the index; see :class:`ChunkFile`.
            config: the config in the index.

        Raises:
            DamagedChunk: the chunk is missing or damaged in its store.
            FetchFailed: the chunk can't be fetched.
        """
        reader = self._reader
        if file in reader.open:
            yield reader.open[file]
            return
        held = any(file in files for files in reader.held.values())
        if not held:
            self.hold(READING, [file])
        try:
            self._fetch(file, wait=True)
            chunk = ChunkFile(self.folder / file, entry, config)
            if held:
                while len(reader.open) >= OPEN_CHUNKS:
                    reader.open.pop(next(iter(reader.open)))
                reader.open[file] = chunk
            yield chunk
        finally:
            if not held:
                self.hold(READING, [])

    def hold(self, purpose: str, files: Iterable[str]) -> None:
        """Hold these chunks for a purpose, and release those held for it before.

        Chunks that are missing here are fetched in the background, in the given order.
        """
        reader = self._reader
        files = tuple(dict.fromkeys(files))
        if reader.held.get(purpose, ()) == files:
            return
        reader.held[purpose] = files
        held = dict.fromkeys(itertools.chain.from_iterable(reader.held.values()))
        with self._bookkeeping():
            reader.lease.write_text("".join(f"{self.folder.name}/{file}\n" for file in held))
        for file in reader.open.keys() - held:
            del reader.open[file]
        if purpose == READING:
            return
        with reader.more:
            reader.wanted = deque(held)
            reader.more.notify()
        if reader.thread is None:
            reader.thread = threading.Thread(target=self._fetch_ahead, args=(reader,), daemon=True)
            reader.thread.start()

    # --- fetching ------------------------------------------------------------------------------

    def _fetch_ahead(self, reader: _Reader) -> None:
        """Fetch the wanted chunks; this runs in a thread of the process.

        A chunk that can't be fetched is left to the reader that needs it, which then raises the error.
        """
        postponed = 0  # chunks in a row that other processes are fetching
        while True:
            with reader.more:
                while not reader.wanted:
                    reader.more.wait()
                    postponed = 0
                file = reader.wanted.popleft()
            try:
                if self._fetch(file, wait=False):
                    postponed = 0
                    continue
            except (DataError, OSError) as error:
                log.debug("fetching %s ahead: %s", file, error)
                continue
            postponed += 1
            with reader.more:
                reader.wanted.append(file)
                if postponed >= len(reader.wanted):
                    reader.more.wait(PAUSE)

    def _fetch(self, file: str, wait: bool) -> bool:
        """Fetch a chunk if it isn't here; return False if another process is fetching it and ``wait`` isn't set."""
        path, size = self.folder / file, self.sizes[file]
        if _is_complete(path, size):
            return True
        lock_name = hashlib.blake2b(str(path).encode(), digest_size=1).hexdigest()
        try:
            with FileLock(self.locks / f"{lock_name}.lock", timeout=-1 if wait else 0):
                if not _is_complete(path, size):
                    self._fetch_alone(file, path, size, wait)
        except Timeout:
            return False
        return True

    def _fetch_alone(self, file: str, path: Path, size: int, wait: bool) -> None:
        """Fetch a chunk as soon as there is room for it; the caller holds the lock for it."""
        partial = path.with_name(f"{path.name}.{size}.{self._reader.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        deadline = monotonic() + PATIENCE * wait
        while (used := self._reserve(size, partial)) > self.settings.limit:
            if monotonic() > deadline:
                raise DataError(
                    f"the cache {self.root} is full: {used:,} bytes are needed at the same time, but its limit is "
                    f"{self.settings.limit:,}: give this run its own cache.folder, or set a larger cache.max_size"
                )
            sleep(PAUSE)
        try:
            self.remote.download(file, partial, size, self.sums.get(file, ""), None if wait else ())
            with self._bookkeeping():
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, size: int, partial: Path) -> int:
        """Remove chunks that nobody holds until ``size`` bytes are free, and create ``partial`` to reserve the bytes.

        Returns:
            The bytes that are then used. If this is above the limit, too much is held, and nothing is reserved.
        """
        with self._bookkeeping():
            held, alive = self._leases()
            chunks, used = [], 0
            for path in self.root.glob("*/**/*"):
                if path.suffix == ".partial" and path.name.split(".")[-2] not in alive:
                    path.unlink(missing_ok=True)  # its process has ended
                elif path.suffix == ".partial":
                    used += int(path.name.split(".")[-3])
                elif path.suffix == ".bin":
                    stat = path.stat()
                    used += stat.st_size
                    chunks.append((stat.st_mtime_ns, stat.st_size, path))
            for _, chunk_size, path in sorted(chunks):
                if used + size <= self.settings.limit:
                    break
                if str(path.relative_to(self.root)) not in held:
                    path.unlink()
                    used -= chunk_size
            if used + size <= self.settings.limit:
                partial.touch()
            return used + size

    def _leases(self) -> tuple[set[str], set[str]]:
        """Return the files, relative to the root, that living processes hold, and the names of these processes.

        The leases of processes that have ended are removed.
        """
        held: set[str] = set()
        alive: set[str] = set()
        own = self._reader.name
        for path in self.locks.glob("*.lease.lock"):
            lease = path.with_suffix("")
            if lease.stem == own or _is_locked(path):
                alive.add(lease.stem)
                if lease.exists():
                    held.update(lease.read_text().splitlines())
            else:
                lease.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        return held, alive


def _is_complete(path: Path, size: int) -> bool:
    """Return whether a complete chunk is here; a crash of the machine may have left a file that is too short."""
    return path.exists() and path.stat().st_size == size


def _is_locked(path: Path) -> bool:
    """Return whether a process holds the lock at ``path``."""
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _write(path: Path, content: bytes, name: str) -> None:
    """Write a small file, either completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{name}")
    partial.write_bytes(content)
    partial.replace(path)
