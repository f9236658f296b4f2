"""Find and name the files of a source; each file is one part."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from nami_lightning.datamodules.image_formats import extension_of
from nami_lightning.datamodules.sources.base import Surveyed, stamp
from nami_lightning.datamodules.sources.fields import printable
from nami_lightning.datamodules.storage.remote import is_remote
from nami_lightning.datamodules.storage.remote_files import file_size, list_remote

NO_EXTENSION = "(none)"


def walk(path: str, follow_links: bool = False, hidden: Counter[str] | None = None) -> Iterator[tuple[str, bool]]:
    """Yield all files below a folder with False, and linked folders that are not followed with True.

    Names are sorted. Hidden files and folders are left out, and counted by extension in ``hidden``; such a folder is
    counted as one. In a store there are no folders, so each hidden file counts.

    Args:
        path: the folder, or its URL.
        follow_links: follow symbolic links that lead outside the folder.
        hidden: where hidden files are counted.

    Raises:
        OSError: the system can't list one of the folders.
        FetchFailed: a store can't be reached.
    """
    if is_remote(path):
        yield from _walk_remote(path, hidden)
        return
    seen = set()
    for top, folders, files in os.walk(path, onerror=_raise, followlinks=follow_links):
        if follow_links and (real := os.path.realpath(top)) in seen:  # a link leads to a folder that was already listed
            folders.clear()
            continue
        if follow_links:
            seen.add(real)
        below = os.path.relpath(top, path)
        prefix = "" if below == os.curdir else f"{below}/"
        if hidden is not None:
            hidden.update(extension_of(name) for name in files if is_hidden(name))
            hidden["folder"] += sum(map(is_hidden, folders))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from ((prefix + name, False) for name in sorted(files) if not is_hidden(name))
        if not follow_links:
            yield from ((prefix + name, True) for name in folders if os.path.islink(os.path.join(top, name)))


def _walk_remote(url: str, hidden: Counter[str] | None) -> Iterator[tuple[str, bool]]:
    for name in list_remote(url).files:
        if not any(map(is_hidden, name.split("/"))):
            yield name, False
        elif hidden is not None:
            hidden[extension_of(name)] += 1


def _raise(error: OSError) -> None:
    raise error


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden: its name starts with a dot, or is that of the Mac's resource forks."""
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def ignored(counts: Mapping[tuple[str, str], int], hidden: Mapping[str, int]) -> list[Surveyed]:
    """Return what is ignored of a folder.

    Args:
        counts: the number of files by extension and reason.
        hidden: the number of hidden files by extension, and of hidden folders.
    """
    rows = [Surveyed(extension or NO_EXTENSION, count, "", why) for (extension, why), count in counts.items()]
    rows += [Surveyed(extension or NO_EXTENSION, count, "", "hidden") for extension, count in hidden.items() if count]
    return sorted(rows)


class Files(NamedTuple):
    """The files of one kind at a path or a URL; each is one part of a source.

    Attributes:
        path: a folder whose files and subfolders are searched, one file, or a pattern (``data/train-*``); or the URL of
            one of them.
        extension: the extension of the files to find in a folder, for example ``.tar``.
    """

    path: str
    extension: str

    def parts(self) -> list[str]:
        """Return ``NAME:BYTES`` of every file, sorted.

        A name is relative to the folder; for a pattern, relative to the part of the path before the first wildcard.

        Raises:
            FileNotFoundError: there are no such files.
            FetchFailed: a store can't be reached.
        """
        if is_remote(self.path):
            list_remote.cache_clear()
            found = list_remote(self.path)
            sizes = {name: found.info(name).size for name in found.files if self._is_wanted(name, found.is_folder)}
        elif Path(self.path).is_dir():
            below = (name for name, is_folder in walk(self.path) if not is_folder)
            sizes = {name: file_size(f"{self.path}/{name}") for name in below if self._is_wanted(name, True)}
        else:
            pattern = glob.escape(self.path) if Path(self.path).exists() else self.path
            paths = [path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file()]
            sizes = {path.relative_to(self._root()).as_posix(): path.stat().st_size for path in paths}
        if not sizes:
            raise FileNotFoundError(f"no {self.extension} files at {self.path}: give a folder, a file, or a pattern")
        return [f"{name}:{size}" for name, size in sorted(sizes.items())]

    def _is_wanted(self, name: str, in_folder: bool) -> bool:
        """Return whether a file is read: of a folder those with the extension, of a pattern all."""
        if not in_folder:
            return True
        return extension_of(name) == self.extension and not any(map(is_hidden, name.split("/")))

    def signature(self, part: str) -> dict[str, str]:
        """Return the name of a part's file, with its size and time of modification, or what a store says instead."""
        name = part.rpartition(":")[0]
        remote = is_remote(self.path)
        return {printable(name): list_remote(self.path).info(name).stamp if remote else stamp(self.file(part))}

    def survey(self) -> list[Surveyed]:
        """Return how many files of the folder are read, and how many are ignored; nothing for a file or a pattern."""
        hidden: Counter[str] = Counter()
        if not (list_remote(self.path).is_folder if is_remote(self.path) else Path(self.path).is_dir()):
            return []
        counts = Counter(extension_of(name) for name, _ in walk(self.path, hidden=hidden))
        taken = Surveyed(self.extension, counts.pop(self.extension, 0), "read")
        return [taken, *ignored({(name, f"not {self.extension}"): count for name, count in counts.items()}, hidden)]

    def file(self, part: str) -> str:
        """Return the path or the URL of a part's file."""
        name = part.rpartition(":")[0]
        return f"{list_remote(self.path).root}/{name}" if is_remote(self.path) else str(self._root() / name)

    def name(self, part: str) -> str:
        """Return the name of a part's file without its extension; the ids of its samples start with this name."""
        return Path(part.rpartition(":")[0]).with_suffix("").as_posix()

    def _root(self) -> Path:
        """Return the local folder to which the names of files are relative."""
        path = Path(self.path)
        if path.is_dir():
            return path
        if path.exists():
            return path.parent
        wildcards = [index for index, part in enumerate(path.parts) if glob.has_magic(part)]
        return Path(*path.parts[: wildcards[0]]) if wildcards else path.parent
