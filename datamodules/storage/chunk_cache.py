"""Chunks of a remote data set on this machine: a folder with a limit, shared by all its processes and runs.

Each process writes down, in a lease, which chunks it reads now or will read next; they stay. When there is no room
for a chunk that is to come, the others go, the oldest first. A lease ends with its process, however that ends. Each
chunk is fetched by one process at a time, under a name of its own until it is whole.

CACHE/locks/                       cache.lock guards leases, room and removal; 00.lock .. ff.lock the fetching
CACHE/locks/HOST-PID-N.lease       what one process holds: file names; locked by it for as long as it lives
CACHE/NAME-FINGERPRINT/            one data set as it lies at its URL, as far as it was fetched
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
"""Chunks of the cache that a process keeps open; each is an open file, of which systems allow a process 1,024."""

PAUSE = 0.2
"""Seconds until a process looks again at what others are about to do."""

PATIENCE = 60.0
"""Seconds for which a chunk that is needed now waits for room, which other processes may be about to give up."""

READING = "reading"
"""The purpose of a chunk that is read but not held for another one."""

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_numbers = itertools.count()


@dataclass(frozen=True)
class CacheSettings:
    """Where chunks of a remote data set are kept.

    Args:
        folder: on a local disk; null: ``nami_lightning`` in $XDG_CACHE_HOME or ~/.cache.
        max_size: of all chunks in it, 50GB or 500GiB say.
    """

    folder: str | None = None
    max_size: str = "50GB"

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise ValueError(f"cache.max_size must be positive; got {self.max_size}")

    @property
    def limit(self) -> int:
        """``max_size`` in bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?)B?", self.max_size.strip())
        if not match or match[2] not in UNITS:
            raise ValueError(f"cache.max_size must be a number of bytes, 50GB or 500GiB say; got {self.max_size!r}")
        return int(float(match[1]) * UNITS[match[2]])

    @property
    def path(self) -> Path:
        """The folder."""
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(self.folder or f"{home}/nami_lightning").expanduser().absolute()


class _Reader:
    """What one process knows of the cache and holds in it; made anew after a fork."""

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
"""Of the parents of this process: kept, since freeing them could end their leases."""


class ChunkCache:
    """The chunk files of one remote data set.

    Args:
        remote: where they lie.
        settings: where they are kept.
        description: what the data set's ``dataset.json`` says, as it was read; another one is another data set.

    Attributes:
        folder: the data set's local twin, where its indices stay, and chunks come and go.
        sizes: bytes of each chunk file, by its name below the folder; to be filled in by who reads the indices.
        sums: their checksums.
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

    # --- what is read --------------------------------------------------------------------------

    def metadata(self, file: str) -> None:
        """Have a small file, an index say, in :attr:`folder`; it stays, and does not count."""
        path = self.folder / file
        if not path.exists():
            _write(path, self.remote.read(file), self._reader.name)

    @contextmanager
    def chunk(self, file: str, entry: dict[str, Any], config: dict[str, Any]) -> Iterator[ChunkFile]:
        """A chunk, fetched if it isn't here; it is kept open as long as it is held, so don't keep it.

        Args:
            file: its name below the folder.
            entry: of its index; see :class:`ChunkFile`.
            config: of its index.

        Raises:
            DamagedChunk: it is missing or damaged where it comes from.
            FetchFailed: it can't be fetched.
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
        """Keep these chunks, and no others, for a purpose; the missing ones are fetched in the background, in order."""
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
        """What a process's thread does: fetch what is wanted. What fails is left to the one who needs it."""
        busy = 0
        while True:
            with reader.more:
                while not reader.wanted:
                    reader.more.wait()
                    busy = 0
                file = reader.wanted.popleft()
            try:
                if self._fetch(file, wait=False):
                    busy = 0
                    continue
            except (DataError, OSError) as error:
                log.debug("fetching %s ahead: %s", file, error)
                continue
            busy += 1
            with reader.more:
                reader.wanted.append(file)
                if busy >= len(reader.wanted):
                    reader.more.wait(PAUSE)

    def _fetch(self, file: str, wait: bool) -> bool:
        """Have a chunk here; False if another process is fetching it and ``wait`` isn't set."""
        path, size = self.folder / file, self.sizes[file]
        if _is_whole(path, size):
            return True
        stripe = hashlib.blake2b(str(path).encode(), digest_size=1).hexdigest()
        try:
            with FileLock(self.locks / f"{stripe}.lock", timeout=-1 if wait else 0):
                if not _is_whole(path, size):
                    self._fetch_alone(file, path, size, wait)
        except Timeout:
            return False
        return True

    def _fetch_alone(self, file: str, path: Path, size: int, wait: bool) -> None:
        partial = path.with_name(f"{path.name}.{size}.{self._reader.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        deadline = monotonic() + PATIENCE * wait
        while (taken := self._claim(size, partial)) > self.settings.limit:
            if monotonic() > deadline:
                raise DataError(
                    f"the cache {self.root} is full: {taken:,} bytes are needed at a time, of its "
                    f"{self.settings.limit:,}: give this run a cache.folder of its own, or a larger cache.max_size"
                )
            sleep(PAUSE)
        try:
            self.remote.download(file, partial, size, self.sums.get(file, ""), None if wait else ())
            with self._bookkeeping():
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _claim(self, size: int, partial: Path) -> int:
        """Remove chunks that nobody holds until ``size`` bytes are free, and claim them by making ``partial``.

        Returns:
            The bytes that are then taken; above the limit if too much is held, and nothing is claimed.
        """
        with self._bookkeeping():
            held, alive = self._leases()
            chunks, used = [], 0
            for path in self.root.glob("*/**/*"):
                if path.suffix == ".partial" and path.name.split(".")[-2] not in alive:
                    path.unlink(missing_ok=True)  # of a process that is no more
                elif path.suffix == ".partial":
                    used += int(path.name.split(".")[-3])
                elif path.suffix == ".bin":
                    stat = path.stat()
                    used += stat.st_size
                    chunks.append((stat.st_mtime_ns, stat.st_size, path))
            for _, of_chunk, path in sorted(chunks):
                if used + size <= self.settings.limit:
                    break
                if str(path.relative_to(self.root)) not in held:
                    path.unlink()
                    used -= of_chunk
            if used + size <= self.settings.limit:
                partial.touch()
            return used + size

    def _leases(self) -> tuple[set[str], set[str]]:
        """Files, below the root, that living processes hold, and the processes' names; the leases of others end."""
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


def _is_whole(path: Path, size: int) -> bool:
    """Whether a chunk is here; one that isn't as long as it should be was cut short when the machine went down."""
    return path.exists() and path.stat().st_size == size


def _is_locked(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _write(path: Path, content: bytes, name: str) -> None:
    """A small file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{name}")
    partial.write_bytes(content)
    partial.replace(path)
