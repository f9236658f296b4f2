"""Files of a data set that lies remotely, at any URL that fsspec reads: s3://, hf://, gs://, https://, ...

fsspec, since it is one way to all stores, the one that Lightning writes remote checkpoints by, and finds credentials
and endpoints where each store's own tools do (AWS_ENDPOINT_URL, HF_TOKEN, ...). litdata's downloaders know fewer
stores; each retries by rules of its own, S3's a thousand times, and the Hub's keeps a second copy of every file.
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
"""Seconds at most before each new try of a transfer that failed; at least half of them, by chance."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class FetchFailed(DataError):
    """A remote file that can't be fetched.

    Args:
        url: of the file.
        problem: what kept it.
    """

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(url, problem)
        self.url, self.problem = url, problem

    def __str__(self) -> str:
        return f"{self.url} can't be fetched: {self.problem}"


def is_remote(folder: str | Path) -> bool:
    """Whether it is a URL."""
    return "://" in str(folder)


class Remote:
    """A remote folder.

    Args:
        url: of the folder.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def read(self, file: str) -> bytes:
        """The content of a file below the folder.

        Raises:
            FileNotFoundError: it isn't there.
            FetchFailed: the store can't be reached or refuses.
        """
        return self._try(file, lambda store, path: bytes(store.cat_file(path)), DELAYS)

    def download(self, file: str, target: Path, size: int, sum_: str, delays: Sequence[float] | None = None) -> None:
        """A file below the folder to a local one, which is what it should be.

        Args:
            file: below the folder.
            target: written over.
            size: that it must have, in bytes.
            sum_: checksum that it must have.
            delays: before each new try; None: :data:`DELAYS`.

        Raises:
            DamagedChunk: it isn't there, or it is something else, in every try.
            FetchFailed: the store can't be reached or refuses.
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
        """``action`` on a file's store and its path there, tried again after each of ``delays``."""
        url = f"{self.url}/{file}"
        for delay in (*delays, None):
            try:
                return action(*_store(url))
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{url} does not exist") from error
            except (ModuleNotFoundError, PermissionError) as error:
                raise FetchFailed(url, str(error)) from error
            except Exception as error:  # each store's client has errors of its own
                if isinstance(error, OSError) and error.errno in NO_SPACE:
                    raise
                if delay is None and isinstance(error, DamagedChunk):
                    raise
                if delay is None:
                    raise FetchFailed(url, f"{error!r}, in {len(delays) + 1} tries") from error
                log.warning("%s can't be fetched (%r): trying again in up to %g s", url, error, delay)
                time.sleep(random.SystemRandom().uniform(delay / 2, delay))  # the run's own chance is left alone
        raise AssertionError("unreachable")


def _store(url: str) -> tuple[Any, str]:
    """The file system of a URL, made for this process, and the path in it."""
    try:
        store, path = url_to_fs(url)
    except ImportError as error:
        raise ModuleNotFoundError(f"{error}; or pip install 'nami_lightning[remote]'") from error
    except ValueError as error:
        raise ModuleNotFoundError(str(error)) from error  # an unknown protocol
    return store, path
