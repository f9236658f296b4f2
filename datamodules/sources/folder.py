"""Image files in a folder and its subfolders, with captions beside them or in metadata files."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from errno import ENAMETOOLONG
from itertools import pairwise
from pathlib import Path
from typing import Any

from nami_lightning.datamodules.sources.base import (
    MOST_IMAGE_BYTES,
    MOST_TEXT_BYTES,
    Skipped,
    Source,
    SourceSample,
    Surveyed,
    stamp,
)
from nami_lightning.datamodules.sources.fields import COLUMNS, BadText, Columns, Unusable, decode, printable
from nami_lightning.datamodules.sources.listing import LINK, Entry, is_inside, list_images
from nami_lightning.datamodules.storage.remote import is_remote
from nami_lightning.datamodules.storage.remote_files import TOGETHER_BYTES, fetch_together, list_remote, normalized
from nami_lightning.training.rng import derive_seed
from nami_lightning.utils.text_files import split_lines

PART_SIZE = 1000
TOGETHER = 64
"""The number of images that are fetched from a store at the same time."""


class ImageFolder(Source):
    """Image files with captions from ``NAME.txt``, ``NAME.caption``, a row of a metadata file or ``NAME.json``.

    If several of these have a caption, the first one wins, in this order; the number that differ is counted.

    A ``metadata.jsonl`` or ``metadata.csv`` in any of the folders has a row for each image. The row holds
    ``file_name``, relative to the metadata file's folder, and other columns. All rows are held in memory, so millions
    of images are better kept in tars or Parquet files. Names that start with a dot are ignored. An id is the path
    relative to the folder.

    Args:
        path: the folder, or its URL (``s3://bucket/photos``). Links exist in local folders only. The files of a web
            server (``https://``) are compared by name: an image that changed and kept its name is not seen.
        columns: which columns of metadata, or fields of ``NAME.json``, hold captions and scores; ``txt`` is the text
            file.
        one_caption_a_line: every line of a text file is a caption; else the whole file is one caption.
        follow_links: read the files outside the folder that symbolic links point to, as in Hugging Face's cache; else
            these files are skipped.
    """

    def __init__(
        self, path: str, columns: Columns = COLUMNS, one_caption_a_line: bool = False, follow_links: bool = False
    ) -> None:
        self.path, self.columns = normalized(path), columns
        self.one_caption_a_line, self.follow_links = one_caption_a_line, follow_links

    def settings(self) -> dict[str, Any]:
        """Return all arguments."""
        return {
            "name": "ImageFolder",
            "path": self.path,
            "columns": asdict(self.columns),
            "one_caption_a_line": self.one_caption_a_line,
            "follow_links": self.follow_links,
        }

    def parts(self) -> list[str]:
        """Return ``FIRST-END-DIGEST`` of about every thousand images, sorted by name; the digest hashes their names.

        A part ends where a hash of a name says so. So an image that is added or removed changes only its own part.

        Raises:
            FileNotFoundError: the folder doesn't exist.
        """
        self._forget()
        entries = self._entries()
        ends = [
            end for end, entry in enumerate(entries, 1) if derive_seed("part", printable(entry.name)) % PART_SIZE == 0
        ]
        ends = list(dict.fromkeys([*ends, len(entries)]))
        return [self._part(first, end) for first, end in pairwise([0, *ends]) if first < end]

    def signature(self, part: str) -> dict[str, str]:
        """Return the images of a part, each with a hash of the sizes and times of its files, and of its metadata."""
        first, end = map(int, part.split("-")[:2])
        return {printable(entry.name): self._stamp(entry) for entry in self._entries()[first:end]}

    def uses_network(self) -> bool:
        """Return whether the path is a URL."""
        return is_remote(self.path)

    def part_samples(self, part: str) -> int:
        """Return the number of images."""
        first, end = map(int, part.split("-")[:2])
        return end - first

    def survey(self) -> list[Surveyed]:
        """Return how many files of each extension hold images or captions, and how many are ignored."""
        return list_images(self.path, self.follow_links).surveyed

    def read(self, part: str) -> Iterator[SourceSample | Skipped]:
        """Yield the images of a part.

        Raises:
            OSError: the system can't read an existing file, for another reason than missing permission.
            FetchFailed: a store can't be reached.
            ValueError: images were added or removed after :meth:`parts`.
        """
        first, end = map(int, part.split("-")[:2])
        if self._part(first, end) != part:
            self._forget()
            if self._part(first, end) != part:
                raise ValueError(f"{self.path}: images were added or removed while it was being prepared; start again")
        for entries in self._groups(self._entries()[first:end]):
            names = [name for entry in entries for name in self._fetched_of(entry)]
            fetched = fetch_together(self.path, names) if names else {}
            for entry in entries:
                reason = printable(entry.reason)
                yield Skipped(printable(entry.name), reason) if reason else self._sample(entry, fetched)

    def _groups(self, entries: list[Entry]) -> Iterator[list[Entry]]:
        """Yield the entries in groups, each of which is fetched at once from a store."""
        group: list[Entry] = []
        size = 0
        for entry in entries:
            group.append(entry)
            size += sum(list_remote(self.path).files[name].size or 0 for name in self._fetched_of(entry))
            if len(group) == TOGETHER or size > TOGETHER_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _fetched_of(self, entry: Entry) -> list[str]:
        """Return the files of an entry that are fetched from a store: those that exist and are not too large."""
        if not is_remote(self.path) or entry.reason:
            return []
        files = list_remote(self.path).files
        most = {entry.name: MOST_IMAGE_BYTES, **dict.fromkeys(entry.files.values(), MOST_TEXT_BYTES)}
        return [name for name, limit in most.items() if name in files and (files[name].size or 0) <= limit]

    def _forget(self) -> None:
        """Make the next call list the folder again."""
        list_images.cache_clear()
        list_remote.cache_clear()

    def _entries(self) -> list[Entry]:
        return list_images(self.path, self.follow_links).entries

    def _stamp(self, entry: Entry) -> str:
        names = (entry.name, *entry.files.values())
        if is_remote(self.path):
            files = list_remote(self.path).files
            stamps = [files[name].stamp if name in files else "" for name in names]
        else:
            paths = [Path(self.path, name) for name in names]
            stamps = [stamp(path) if _is_file(path) else "" for path in paths]
        content = [entry.row, entry.reason, *stamps]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()

    def _part(self, first: int, end: int) -> str:
        """Return the name of the part with the images ``first`` to ``end``."""
        names = "\0".join(entry.name for entry in self._entries()[first:end])
        digest = hashlib.blake2b(_bytes(names), digest_size=8).hexdigest()
        return f"{first:07d}-{end:07d}-{digest}"

    def _sample(self, entry: Entry, fetched: Mapping[str, bytes | None]) -> SourceSample | Skipped:
        """Return the sample of an entry; ``fetched`` holds its files, if they lie in a store."""
        try:
            image = self._read(entry.name, MOST_IMAGE_BYTES, fetched)
            if image is None:
                return Skipped(printable(entry.name), "no such file")
        except (PermissionError, _NotRead) as error:
            return Skipped(printable(entry.name), printable(str(error)))
        beside = {extension: self._beside(name, fetched) for extension, name in entry.files.items()}
        texts: dict[str, Any] = {name: beside.get(f".{name}") for name in ("txt", "caption")}
        if self.one_caption_a_line:
            texts = {name: _lines(text) for name, text in texts.items()}
        texts = {name: text for name, text in texts.items() if text}
        return self.columns.sample_of_files(entry.name, image, texts, beside.get(".json"), entry.row)

    def _beside(self, name: str, fetched: Mapping[str, bytes | None]) -> bytes | Unusable:
        """Return the content of a file beside an image, or the reason why it can't be used."""
        extension = Path(name).suffix
        try:
            content = self._read(name, MOST_TEXT_BYTES, fetched)
        except PermissionError as error:
            return Unusable(f"{extension} without permission: {error}")
        except _NotRead as error:
            return Unusable(f"{extension} {error}")
        return Unusable(f"{extension} is a link to nothing") if content is None else content

    def _read(self, name: str, most: int, fetched: Mapping[str, bytes | None]) -> bytes | None:
        """Return the content of a file, or None if it doesn't exist.

        Raises:
            _NotRead: it has more than ``most`` bytes, or is a link to a file outside the folder, and links are not
                followed.
        """
        if is_remote(self.path):
            size = list_remote(self.path).files[name].size if name in list_remote(self.path).files else 0
            if (size or 0) > most:
                raise _NotRead(f"too large: {size:,} bytes; the limit is {most:,}")
            return fetched.get(name)
        file = Path(self.path, name)
        if not _is_file(file):
            return None
        if not self.follow_links and not is_inside(file, self.path):
            raise _NotRead(LINK)
        if (size := file.stat().st_size) > most:
            raise _NotRead(f"too large: {size:,} bytes; the limit is {most:,}")
        return file.read_bytes()


def _lines(text: bytes | Unusable | None) -> list[str] | Unusable | None:
    """Return the lines of a text file, or the reason why it can't be used."""
    if text is None or isinstance(text, Unusable):
        return text
    try:
        return split_lines(decode(text))
    except BadText as error:
        return Unusable(str(error))


def _is_file(file: Path) -> bool:
    """Return whether a file exists; the system takes a name that is too long for an error."""
    try:
        return file.is_file()
    except OSError as error:
        if error.errno != ENAMETOOLONG:
            raise
        return False


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


class _NotRead(Exception):
    """An error for a file that is too large, or a link to one outside the folder."""
