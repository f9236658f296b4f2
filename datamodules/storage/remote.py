"""Files of a remote data set, at any URL that fsspec reads: s3://, hf://, gs://, https://, ...

fsspec is used because it reaches all stores in one way, because Lightning writes remote checkpoints with it, and
because it finds credentials and endpoints where each store's own tools find them (AWS_ENDPOINT_URL, HF_TOKEN, ...).
litdata's downloaders know fewer stores, and each has its own rules for retries: the one for S3 tries a thousand times,
and the one for the Hub keeps a second copy of every file.
"""

import errno
import logging
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from nami_lightning.datamodules.storage.chunk_file import DamagedChunk, DataError, checksum

log = logging.getLogger(__name__)
T = TypeVar("T")

DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""The longest wait in seconds before each new try of a failed transfer; the wait is random, at least half as long."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class FetchFailed(DataError):
    """An error for a remote file or folder that can't be fetched, listed or written.

    Args:
        url: the URL of the file.
        problem: why it can't be fetched.
        how: what can't be done with it: ``fetched``, ``listed`` or ``written``.
    """

    def __init__(self, url: str, problem: str, how: str = "fetched") -> None:
        super().__init__(url, problem, how)
        self.url, self.problem, self.how = url, problem, how

    def __str__(self) -> str:
        return f"{self.url} can't be {self.how}: {self.problem}"


def is_remote(folder: str | Path) -> bool:
    """Return whether ``folder`` is a URL."""
    return "://" in str(folder)


class Remote:
    """A remote folder.

    Args:
        url: the URL of the folder.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def read(self, file: str) -> bytes:
        """Return the content of a file below the folder.

        Raises:
            FileNotFoundError: the file doesn't exist.
            FetchFailed: the store can't be reached, or it refuses access.
        """
        return self._try(file, lambda store, path: bytes(store.cat_file(path)), DELAYS)

    def download(self, file: str, target: Path, size: int, sum_: str, delays: Sequence[float] | None = None) -> None:
        """Copy a file below the folder to a local file, and check its size and checksum.

        Args:
            file: its path relative to the folder.
            target: the local file, which is overwritten.
            size: the size in bytes that it must have.
            sum_: the checksum that it must have.
            delays: the longest wait in seconds before each new try; None: :data:`DELAYS`.

        Raises:
            DamagedChunk: the file doesn't exist, or in every try its size or checksum was wrong.
            FetchFailed: the store can't be reached, or it refuses access.
        """

        def fetch(store: Any, path: str) -> None:
            store.get_file(path, str(target))
            if (got := target.stat().st_size) != size:
                raise DamagedChunk(f"{self.url}/{file}", f"it has {got:,} bytes, but its index says {size:,}")
            if checksum(target) != sum_:
                raise DamagedChunk(f"{self.url}/{file}", "its checksum is not that of the data set's description")

        try:
            self._try(file, fetch, DELAYS if delays is None else delays)
        except FileNotFoundError as error:
            raise DamagedChunk(f"{self.url}/{file}", "it is missing") from error

    def _try(self, file: str, action: Callable[[Any, str], T], delays: Sequence[float]) -> T:
        return try_again(f"{self.url}/{file}", action, delays)


def try_again(
    url: str, action: Callable[[Any, str], T], delays: Sequence[float] | None = None, how: str = "fetched"
) -> T:
    """Call ``action`` with a URL's store and the path there, and return its result; if it fails, try again later.

    Args:
        url: the URL.
        action: what is to be done.
        delays: the longest wait in seconds before each new try; None: :data:`DELAYS`.
        how: what is done, for the message: the URL can't be fetched, listed or written.

    Raises:
        FileNotFoundError: nothing is at the URL.
        DamagedChunk: ``action`` raised it in every try.
        FetchFailed: the store can't be reached, or it refuses access.
    """
    delays = DELAYS if delays is None else delays
    for delay in (*delays, None):
        try:
            return action(*_store(url))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{url} does not exist") from error
        except (ModuleNotFoundError, NotImplementedError, PermissionError) as error:
            raise FetchFailed(url, str(error) or repr(error), how) from error
        except FetchFailed:
            raise
        except Exception as error:  # each store's client has its own classes of errors
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise
            if delay is None and isinstance(error, DamagedChunk):
                raise
            if delay is None:
                raise FetchFailed(url, f"{error!r}, in {len(delays) + 1} tries", how) from error
            log.warning("%s can't be %s (%r): trying again in up to %g s", url, how, error, delay)
            time.sleep(random.SystemRandom().uniform(delay / 2, delay))  # leaves the run's random state alone
    raise AssertionError("unreachable")


def _store(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, made in this process, and the path in it."""
    try:
        store, path = url_to_fs(url)
    except ImportError as error:
        raise ModuleNotFoundError(f"{error}; or pip install 'nami_lightning[remote]'") from error
    except ValueError as error:
        raise ModuleNotFoundError(str(error)) from error  # an unknown protocol
    return store, path
