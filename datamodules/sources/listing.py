"""List the images of a folder and its subfolders, with their rows in metadata files."""

import csv
import json
import posixpath
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from nami_lightning.datamodules.image_formats import extension_of, is_image, why_no_image
from nami_lightning.datamodules.sources.base import Surveyed
from nami_lightning.datamodules.sources.fields import Unusable
from nami_lightning.datamodules.sources.files import ignored, walk
from nami_lightning.datamodules.storage.remote import is_remote
from nami_lightning.datamodules.storage.remote_files import open_file
from nami_lightning.utils.text_files import encoding_of

SIDECARS = (".txt", ".caption", ".json")
METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"
MOST_CHARACTERS = 131_072
"""Longer fields of CSV files are not used: a quotation mark that is not closed makes one field of all that follows."""

OUTSIDE = "outside the folder"
LINK = f"{OUTSIDE}: a link, and follow_links is off"


class Entry(NamedTuple):
    """An image of a folder, or a name that should have been one.

    Attributes:
        name: its path relative to the folder.
        row: its row in a metadata file.
        reason: why it can't be used; empty if no reason is known yet.
        files: the files with its captions, by extension.
    """

    name: str
    row: dict[str, Any]
    reason: str = ""
    files: dict[str, str] = {}


class Listing(NamedTuple):
    """What a folder holds.

    Attributes:
        entries: its images, sorted by name.
        surveyed: which files are taken, and which are ignored.
    """

    entries: list[Entry]
    surveyed: list[Surveyed]


@lru_cache(maxsize=1)
def list_images(path: str, follow_links: bool) -> Listing:
    """Return all images. They are kept in memory, because a process reads many parts of one folder.

    Args:
        path: the folder, or its URL.
        follow_links: follow symbolic links that lead outside the folder.

    Raises:
        FileNotFoundError: the folder doesn't exist.
        OSError: the system can't list one of the folders, or can't read a metadata file.
        FetchFailed: a store can't be reached.
    """
    if not is_remote(path) and not Path(path).is_dir():
        raise FileNotFoundError(f"no folder {path}")
    images: dict[str, dict[str, Any]] = {}
    bad: list[Entry] = []
    metadata, sidecars = [], []
    taken: Counter[tuple[str, str]] = Counter()
    left: Counter[tuple[str, str]] = Counter()
    hidden: Counter[str] = Counter()
    for name, is_folder in walk(path, follow_links, hidden):
        extension = extension_of(name)
        if is_folder:
            bad.append(Entry(name, {}, LINK))
        elif is_image(name):
            images[name] = {}
            taken[extension, "image"] += 1
        elif posixpath.basename(name) in METADATA:
            metadata.append(name)
            taken[extension, "metadata"] += 1
        elif extension in SIDECARS:
            sidecars.append(name)
        else:
            left[extension, why_no_image(extension)] += 1
    for name in metadata:
        bad += _add_metadata(images, path, name, follow_links)
    beside = _match(images, sidecars)
    used = {name for files in beside.values() for name in files.values()}
    for name in sidecars:
        if name in used:
            taken[extension_of(name), "caption"] += 1
        else:
            left[extension_of(name), "no image has this name"] += 1
    entries = [Entry(name, row, "", beside[name]) for name, row in images.items()]
    rows = [Surveyed(extension, count, use) for (extension, use), count in sorted(taken.items())]
    return Listing(sorted(entries + bad, key=lambda entry: (entry.name, entry.reason)), rows + ignored(left, hidden))


def _match(images: Iterable[str], sidecars: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the files beside each image that have its name with another extension, by that extension.

    ``IMG.JPG`` finds ``img.txt`` too, unless that has exactly the name of another image.
    """
    exact: dict[str, dict[str, str]] = defaultdict(dict)
    for name in sidecars:
        exact[_stem(name)][extension_of(name)] = name
    stems = set(map(_stem, images))
    similar: dict[str, dict[str, str]] = defaultdict(dict)
    for stem in sorted(exact.keys() - stems):
        similar[_fold(stem)] |= exact[stem]
    return {name: similar.get(_fold(_stem(name)), {}) | exact.get(_stem(name), {}) for name in images}


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _fold(stem: str) -> str:
    """Return a name without its case; the case of its folder stays."""
    folder, name = posixpath.split(stem)
    return f"{folder}/{name.casefold()}"


def is_inside(file: Path, folder: str) -> bool:
    """Return whether a file lies inside a folder after all links are resolved."""
    return file.resolve().is_relative_to(Path(folder).resolve())


def _add_metadata(images: dict[str, dict[str, Any]], path: str, name: str, follow_links: bool) -> Iterator[Entry]:
    """Add the rows of metadata file ``name`` to ``images``; yield an entry for each row that can't be used."""
    if not is_remote(path) and not follow_links and not is_inside(Path(path, name), path):
        yield Entry(name, {}, LINK)
        return
    if not is_remote(path) and not Path(path, name).is_file():  # a pipe would be waited for
        yield Entry(name, {}, "damaged metadata: a link to nothing, or no file")
        return
    file = f"{path}/{name}"
    with open_file(file) as stream:
        encoding = encoding_of(stream.read(2))
    # Bytes that are not UTF-8 become lone surrogates here, so that only the captions with such bytes are lost.
    errors = "surrogatepass" if encoding == "utf-16" else "surrogateescape"
    with TextIOWrapper(open_file(file), encoding, errors, newline="") as text:
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
    csv.field_size_limit(sys.maxsize)  # a field that is longer ends the reading of the file otherwise
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        yield from text
        ended = True

    reader = csv.DictReader(lines())
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, str(error)
            continue
        if ended:  # a row that is complete ends with its line, before the reader asks for another
            yield first, f"the file ends within quotation marks, in the row of line {first}"
            return
        yield reader.line_num, {name: _limited(value) for name, value in row.items() if name and value is not None}


def _limited(value: Any) -> Any:
    """Return a field of a CSV file, or the reason why it can't be used."""
    if isinstance(value, str) and len(value) > MOST_CHARACTERS:
        return Unusable(f"caption of {len(value):,} characters: is a quotation mark not closed?")
    return value


def _add_row(images: dict[str, dict[str, Any]], folder: str, row: Any) -> str:
    """Add a row of a metadata file in ``folder`` to ``images``; return why it can't be added, or an empty text."""
    if not isinstance(row, dict):
        return f"damaged metadata: {row}" if isinstance(row, str) else "damaged metadata: not a JSON object"
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
