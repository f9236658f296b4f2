"""Files of other people's in a remote store: list them, and read them in blocks, each of which is tried again alone."""

import io
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nami_lightning.datamodules.storage.remote import FetchFailed, is_remote, try_again

BLOCK_BYTES = 2**23
"""Bytes that are fetched at once, and fetched again if the transfer breaks; a file that is read has one in memory."""

TOGETHER_BYTES = 2**26
"""Bytes of the small files that are fetched at the same time."""

FILES = re.compile(r".+\.(tar|parquet|arrow|zip|tgz|gz|bz2|xz|zst)", re.IGNORECASE)
"""Names of files, as opposed to folders, where a store can't tell, as a web server can't."""

CHANGED = (
    "ETag",
    "etag",
    "blob_id",
    "md5Hash",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)
"""The keys by which the stores tell that a file has changed; the first that there is counts."""

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class FileInfo(NamedTuple):
    """What a store says of a file: its size in bytes, if it says so, and a text that changes when the file changes."""

    size: int | None
    stamp: str


class RemoteFiles(NamedTuple):
    """The files at a URL.

    Attributes:
        root: the URL of the folder that the names are relative to.
        files: the files by name, sorted.
        is_folder: the URL is that of a folder, and not of one file or a pattern.
    """

    root: str
    files: dict[str, FileInfo]
    is_folder: bool

    def info(self, name: str) -> FileInfo:
        """Return what the store says of a file; a web server is asked for each file.

        Raises:
            FetchFailed: the server does not say how large the file is.
        """
        found = self.files[name]
        return remote_info(f"{self.root}/{name}") if found.size is None else found


def normalized(path: str) -> str:
    """Return a local path without what is superfluous in it, and a URL without slashes at its end."""
    return path.rstrip("/") if is_remote(path) else os.path.normpath(path)


@lru_cache(maxsize=4)
def list_remote(url: str) -> RemoteFiles:
    """Return the files at a URL: those below a folder, or those of a pattern, or one file.

    A pattern has ``*``, or ``{00000..00099}`` for numbered files, which needs no list from the store. The result is
    kept in memory; :meth:`list_remote.cache_clear` makes the next call ask the store again.

    Raises:
        FileNotFoundError: nothing is there.
        FetchFailed: the store can't be reached, or it refuses access.
    """
    if expanded := expand_braces(url):
        root = os.path.commonpath([_beyond_protocol(one).rpartition("/")[0] for one in expanded])
        root = url[: len(url) - len(_beyond_protocol(url))] + root
        return RemoteFiles(root, {one.removeprefix(f"{root}/"): FileInfo(None, "") for one in expanded}, False)

    def find(store: Any, path: str) -> tuple[Mapping[str, Any], str]:
        store.invalidate_cache()
        if has_wildcard(url):
            return store.glob(path, detail=True), "pattern"
        if FILES.fullmatch(path) and (info := store.info(path))["type"] == "file":
            return {path: info}, "file"
        found = store.find(path, detail=True)
        if not all(found.values()):  # a web server's page that was not read
            raise OSError("it lists no files")
        return found, "file" if list(found) == [path] else "folder"

    found, kind = try_again(url, find, how="listed")
    root = {"folder": url, "file": url.rpartition("/")[0]}.get(kind) or before_wildcard(url)
    prefix = try_again(root, lambda _, path: path.rstrip("/") + "/", ())
    files = {
        path.removeprefix(prefix): FileInfo(info.get("size"), _stamp(info))
        for path, info in found.items()
        if info["type"] == "file" and path.startswith(prefix) and "?" not in path.removeprefix(prefix)
    }
    if not files:
        raise FileNotFoundError(f"no files are at {url}")
    return RemoteFiles(root, dict(sorted(files.items())), kind == "folder")


def expand_braces(url: str) -> list[str]:
    """Return the URLs that ``{000..099}`` in a URL stands for; none if there are no such braces."""
    match = BRACES.search(url)
    if match is None:
        return []
    first, last = match.groups()
    texts = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    urls = [url[: match.start()] + text + url[match.end() :] for text in texts]
    return [full for one in urls for full in (expand_braces(one) or [one])]


def has_wildcard(url: str) -> bool:
    """Return whether a URL is a pattern; a question mark begins the query of a web server's URL."""
    return any(sign in _beyond_protocol(url) for sign in ("*", "[", *([] if url.startswith("http") else ["?"])))


def before_wildcard(url: str) -> str:
    """Return the URL of the folder above the first wildcard of a pattern."""
    parts = url.split("/")
    first = next(number for number, part in enumerate(parts) if number > 2 and has_wildcard(f"x://{part}"))
    return "/".join(parts[:first])


def _beyond_protocol(url: str) -> str:
    return url.partition("://")[2]


def _stamp(info: Mapping[str, Any]) -> str:
    changed = next((str(info[key]) for key in CHANGED if info.get(key)), "")
    return f"{info.get('size')}:{changed}"


def remote_info(url: str) -> FileInfo:
    """Return what a store says of one file.

    Raises:
        FileNotFoundError: it doesn't exist.
        FetchFailed: the store can't be reached, or does not say how large the file is.
    """
    info = try_again(url, lambda store, path: store.info(path))
    if info.get("size") is None:
        raise FetchFailed(url, "its server does not say how large it is: download it, and read it from a disk")
    return FileInfo(int(info["size"]), _stamp(info))


class RemoteFile(io.RawIOBase):
    """A file in a remote store that is read at any place; what is asked for is fetched in blocks of 8 MiB at most.

    Args:
        url: the URL of the file.
        size: its size in bytes.
    """

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.position = url, size, 0

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with what comes next, and return the number of bytes; 0 at the end.

        Raises:
            FetchFailed: the store can't be reached, or sends no parts of files.
            FileNotFoundError: the file is not there any more.
        """
        first, end = self.position, min(self.position + min(len(buffer), BLOCK_BYTES), self.size)
        if first >= end:
            return 0
        data = try_again(self.url, lambda store, path: self._fetch(store, path, first, end))
        buffer[: len(data)] = data
        self.position = end
        return len(data)

    def _fetch(self, store: Any, path: str, first: int, end: int) -> bytes:
        data = bytes(store.cat_file(path, start=first, end=end))
        if len(data) > end - first:
            raise FetchFailed(
                self.url, "its server sends whole files only (no Range requests): download it, and read it from a disk"
            )
        if len(data) < end - first:
            raise OSError(f"{len(data):,} bytes came of {end - first:,} from byte {first:,} on")
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place in the file, and return it."""
        self.position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence])
        return self.position

    def tell(self) -> int:
        """Return the place in the file."""
        return self.position

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True


def open_file(file: str, buffer_bytes: int = BLOCK_BYTES) -> BinaryIO:
    """Open a file at a path or a URL to read its bytes, at any place.

    Args:
        file: the path or the URL.
        buffer_bytes: bytes that are fetched at least, if it is remote; more where one read asks for more.

    Raises:
        FileNotFoundError: it doesn't exist.
        OSError: the system can't open it.
        FetchFailed: the store can't be reached.
    """
    if is_remote(file):
        return io.BufferedReader(RemoteFile(file, file_size(file)), buffer_bytes)
    return Path(file).open("rb")


def file_size(file: str) -> int:
    """Return the size in bytes of a file at a path or a URL.

    Raises:
        FileNotFoundError: it doesn't exist.
        OSError: the system can't tell.
        FetchFailed: the store can't be reached.
    """
    return int(remote_info(file).size or 0) if is_remote(file) else os.stat(file).st_size


def fetch_together(root: str, names: Sequence[str]) -> dict[str, bytes | None]:
    """Return the contents of small files below a URL; None for one that doesn't exist any more.

    Stores whose clients can do so send them all at the same time. What fails then is tried again alone.

    Raises:
        FetchFailed: the store can't be reached, or it refuses access.
    """
    if not names:
        return {}
    urls = {name: f"{root}/{name}" for name in names}
    paths = try_again(root, lambda store, _: {name: store._strip_protocol(url) for name, url in urls.items()}, ())
    found = try_again(root, lambda store, _: store.cat(list(paths.values()), on_error="return"))
    contents: dict[str, bytes | None] = {}
    for name, path in paths.items():
        content = found.get(path)
        contents[name] = content if isinstance(content, bytes) else fetch_whole(urls[name])
    return contents


def fetch_whole(url: str) -> bytes | None:
    """Return the content of a small file; None if it doesn't exist.

    Raises:
        FetchFailed: the store can't be reached, or it refuses access.
    """
    try:
        return try_again(url, lambda store, path: bytes(store.cat_file(path)))
    except FileNotFoundError:
        return None
