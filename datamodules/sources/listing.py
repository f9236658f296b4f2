"""List the images of a folder and its subfolders, with their rows in metadata files."""

import csv
import json
import os
import posixpath
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from nami_lightning.datamodules.sources.fields import encoding_of
from nami_lightning.datamodules.sources.files import IMAGE_EXTENSIONS

METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"
OUTSIDE = "outside the folder"
LINK = f"{OUTSIDE}: a link, and follow_links is off"


class Entry(NamedTuple):
    """An image of a folder, or a name that should have been one.

    Attributes:
        name: its path relative to the folder.
        row: its row in a metadata file.
        reason: why it can't be used; empty if no reason is known yet.
    """

    name: str
    row: dict[str, Any]
    reason: str = ""


@lru_cache(maxsize=1)
def list_images(path: str, follow_links: bool) -> list[Entry]:
    """Return all images, sorted by name. The list is kept in memory, because a process reads many parts of one folder.

    Args:
        path: the folder.
        follow_links: follow symbolic links that lead outside the folder.

    Raises:
        FileNotFoundError: the folder doesn't exist.
        OSError: the system can't list one of the folders, or can't read a metadata file.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"no folder {path}")
    images: dict[str, dict[str, Any]] = {}
    bad: list[Entry] = []
    metadata = []
    for name, is_folder in walk(path, follow_links):
        if is_folder:
            bad.append(Entry(name, {}, LINK))
        elif is_image(name):
            images[name] = {}
        elif posixpath.basename(name) in METADATA:
            metadata.append(name)
    for name in metadata:
        bad += _add_metadata(images, path, name, follow_links)
    entries = [Entry(name, row) for name, row in images.items()]
    return sorted(entries + bad, key=lambda entry: (entry.name, entry.reason))


def is_image(name: str) -> bool:
    """Return whether a file has the extension of an image."""
    return posixpath.splitext(name)[1][1:].lower() in IMAGE_EXTENSIONS


def walk(path: str, follow_links: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield all files below a folder with False, and linked folders that are not followed with True.

    Names are sorted, and hidden ones are left out.

    Raises:
        OSError: the system can't list one of the folders.
    """
    seen = set()
    for top, folders, files in os.walk(path, onerror=_raise, followlinks=follow_links):
        if follow_links and (real := os.path.realpath(top)) in seen:  # a link leads to a folder that was already listed
            folders.clear()
            continue
        if follow_links:
            seen.add(real)
        below = os.path.relpath(top, path)
        prefix = "" if below == os.curdir else f"{below}/"
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from ((prefix + name, False) for name in sorted(files) if not name.startswith("."))
        if not follow_links:
            yield from ((prefix + name, True) for name in folders if os.path.islink(os.path.join(top, name)))


def _raise(error: OSError) -> None:
    raise error


def is_inside(file: Path, folder: str) -> bool:
    """Return whether a file lies inside a folder after all links are resolved."""
    return file.resolve().is_relative_to(Path(folder).resolve())


def _add_metadata(images: dict[str, dict[str, Any]], path: str, name: str, follow_links: bool) -> Iterator[Entry]:
    """Add the rows of metadata file ``name`` to ``images``; yield an entry for each row that can't be used."""
    file = Path(path, name)
    if not follow_links and not is_inside(file, path):
        yield Entry(name, {}, LINK)
        return
    with file.open("rb") as stream:
        encoding = encoding_of(stream.read(2))
    # Bytes that are not UTF-8 become lone surrogates here, so that only the captions with such bytes are lost.
    with file.open(encoding=encoding, errors="surrogateescape", newline="") as text:
        try:
            for number, row in _json_rows(text) if name.endswith(".jsonl") else _csv_rows(text):
                reason = _add_row(images, posixpath.dirname(name), row)
                if reason:
                    given = row.get(FILE_NAME) if isinstance(row, dict) else None
                    yield Entry(given if isinstance(given, str) and given else f"{name}:{number}", {}, reason)
        except (csv.Error, UnicodeError) as error:
            yield Entry(name, {}, f"damaged metadata: {error}")


def _json_rows(text: TextIO) -> Iterator[tuple[int, Any]]:
    """Yield the number of each line and the value in it, which is None if the line is not JSON."""
    for number, line in enumerate(text, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _csv_rows(text: TextIO) -> Iterator[tuple[int, Any]]:
    """Yield the number of the last line of each row, and the row's columns that have a name and a value."""
    reader = csv.DictReader(text)
    for row in reader:
        yield reader.line_num, {name: value for name, value in row.items() if name is not None and value is not None}


def _add_row(images: dict[str, dict[str, Any]], folder: str, row: Any) -> str:
    """Add a row of a metadata file in ``folder`` to ``images``; return why it can't be added, or an empty text."""
    if not isinstance(row, dict):
        return "damaged metadata: not a JSON object"
    given = row.pop(FILE_NAME, None)
    if not isinstance(given, str) or not given:
        return f"damaged metadata: no {FILE_NAME}"
    row[FILE_NAME] = given
    name = posixpath.normpath(posixpath.join(folder, given))
    if name.startswith(("/", "../")) or "\0" in name:
        return f"{OUTSIDE}: {given}"
    if images.get(name):
        return f"named twice in metadata: {name}"
    images[name] = row
    return ""
