"""Image files in a folder and its subfolders, with captions beside them or in metadata files."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nami_lightning.datamodules.sources.base import Skipped, Source, SourceSample, part_ranges
from nami_lightning.datamodules.sources.fields import COLUMNS, BadText, Columns, decode, decode_object, printable
from nami_lightning.datamodules.sources.listing import LINK, Entry, is_inside, list_images

PART_SIZE = 1000


class ImageFolder(Source):
    """Image files with captions from ``NAME.txt``, from a field of ``NAME.json``, or from a row of a metadata file.

    A ``metadata.jsonl`` or ``metadata.csv`` in any of the folders has a row for each image. The row holds
    ``file_name``, relative to the metadata file's folder, and other columns. All rows are held in memory, so millions
    of images are better kept in tars or Parquet files. Names that start with a dot are ignored. An id is the path
    relative to the folder.

    Args:
        path: the folder.
        columns: which columns of metadata, or fields of ``NAME.json``, hold captions and scores; ``txt`` is the text
            file.
        one_caption_a_line: every line of a text file is a caption; else the whole file is one caption.
        follow_links: read the files outside the folder that symbolic links point to, as in Hugging Face's cache; else
            these files are skipped.
    """

    def __init__(
        self, path: str, columns: Columns = COLUMNS, one_caption_a_line: bool = False, follow_links: bool = False
    ) -> None:
        self.path, self.columns = os.path.normpath(path), columns
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
        """Return ``FIRST-END-DIGEST`` of every thousand images, sorted by name; the digest is a hash of their names.

        Raises:
            FileNotFoundError: the folder doesn't exist.
        """
        list_images.cache_clear()
        return [self._part(first, end) for first, end in part_ranges(len(self._entries()), PART_SIZE)]

    def read(self, part: str) -> Iterator[SourceSample | Skipped]:
        """Yield the images of a part.

        Raises:
            OSError: the system can't read an existing file, for another reason than missing permission.
            ValueError: images were added or removed after :meth:`parts`.
        """
        first, end = map(int, part.split("-")[:2])
        if self._part(first, end) != part:
            list_images.cache_clear()
            if self._part(first, end) != part:
                raise ValueError(f"{self.path}: images were added or removed while it was being prepared; start again")
        for entry in self._entries()[first:end]:
            yield Skipped(printable(entry.name), printable(entry.reason)) if entry.reason else self._sample(entry)

    def _entries(self) -> list[Entry]:
        return list_images(self.path, self.follow_links)

    def _part(self, first: int, end: int) -> str:
        """Return the name of the part with the images ``first`` to ``end``."""
        names = "\0".join(entry.name for entry in self._entries()[first:end])
        digest = hashlib.blake2b(names.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return f"{first:07d}-{end:07d}-{digest}"

    def _sample(self, entry: Entry) -> SourceSample | Skipped:
        file = Path(self.path, entry.name)
        try:
            image = self._read(file)
            if image is None:
                return Skipped(printable(entry.name), "no such file")
            fields = decode_object(self._read(file.with_suffix(".json")) or b"{}")
            text: Any = self._read(file.with_suffix(".txt"))
            if text and self.one_caption_a_line:
                text = decode(text).splitlines()
        except (BadText, PermissionError, _OutsideFolder) as error:
            return Skipped(printable(entry.name), printable(str(error)))
        return self.columns.sample(entry.name, image, fields | {"txt": text} | entry.row)

    def _read(self, file: Path) -> bytes | None:
        """Return the content of a file, or None if it doesn't exist.

        Raises:
            _OutsideFolder: the file is a link to a file outside the folder, and links are not followed.
        """
        if not file.is_file():
            return None
        if not self.follow_links and not is_inside(file, self.path):
            raise _OutsideFolder(LINK)
        return file.read_bytes()


class _OutsideFolder(Exception):
    """An error for a link to a file outside the folder."""
