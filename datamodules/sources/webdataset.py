"""Tar files as WebDataset and img2dataset write them: KEY.jpg, KEY.txt, KEY.json, one sample after another."""

import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Self

from nami_lightning.datamodules.image_formats import PLUGIN_OF, image_extensions, why_no_image
from nami_lightning.datamodules.sources.base import (
    MOST_IMAGE_BYTES,
    MOST_TEXT_BYTES,
    Skipped,
    Source,
    SourceSample,
    Surveyed,
    most_unpacked,
)
from nami_lightning.datamodules.sources.fields import COLUMNS, Columns, Unusable, printable
from nami_lightning.datamodules.sources.files import Files, is_hidden
from nami_lightning.datamodules.storage.remote import FetchFailed, is_remote
from nami_lightning.datamodules.storage.remote_files import file_size, normalized, open_file

SIDECARS = ("txt", "caption", "json")
LINK = Unusable("a link in a tar")
CUT_OFF = "the tar breaks off after it: a file of it may be missing"
BREAKS_OFF = ("empty header", "truncated header", "unexpected end of data")
"""What tarfile says of a tar that ends too early."""

LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
MOST_HEADER_BYTES = 2**20

NAME = re.compile(r"(?:\./)*((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
"""The name of a file in a tar: its key, which ends at the first dot after the last slash, and its extension."""


class WebDataset(Source):
    """Images and captions in tar files, which are read once from start to end, so memory does not grow with their size.

    The caption is ``KEY.txt``, else ``KEY.caption``, else a field of ``KEY.json``. An id is ``TAR/KEY``. Hidden files
    and those in hidden folders are ignored.

    Args:
        path: a folder of ``.tar`` files, one such file, or a pattern; or the URL of one of them. A tar in a store is
            read while it comes: 8 MiB of it are in memory.
        columns: which fields of ``KEY.json`` hold captions and scores; ``txt`` is ``KEY.txt``.
        extension: extension of the image to use, if a key has several images: ``jpg``; null: any that Pillow reads.
    """

    def __init__(self, path: str, columns: Columns = COLUMNS, extension: str | None = None) -> None:
        self.path, self.columns, self.extension = normalized(path), columns, extension
        self.files = Files(self.path, ".tar")
        self.extensions = image_extensions() if extension is None else (extension.lower().removeprefix("."),)

    def settings(self) -> dict[str, Any]:
        """Return all arguments."""
        return {"name": "WebDataset", "path": self.path, "columns": asdict(self.columns), "extension": self.extension}

    def parts(self) -> list[str]:
        """Return ``NAME:BYTES`` of every tar.

        Raises:
            FileNotFoundError: there are no such files.
        """
        return self.files.parts()

    def signature(self, part: str) -> dict[str, str]:
        """Return the name of the file, with its size and time of modification."""
        return self.files.signature(part)

    def uses_network(self) -> bool:
        """Return whether the path is a URL."""
        return is_remote(self.path)

    def part_bytes(self, part: str) -> int:
        """Return the bytes of the part's file."""
        return int(part.rpartition(":")[2])

    def survey(self) -> list[Surveyed]:
        """Return how many files of the folder are read, and how many are ignored."""
        return self.files.survey()

    def read(self, part: str) -> Iterator[SourceSample | Skipped]:
        """Yield the samples of a tar; of a damaged tar, those before the damage, then a skipped sample for the tar.

        The sample at which a tar breaks off is kept, with a note, if its image and a caption were read.

        Raises:
            OSError: the system can't read the tar (no permission, a failing disk).
            FetchFailed: a store can't be reached.
        """
        members = read_members(self.files.file(part), {*self.extensions, *SIDECARS})
        last, files = "", dict[str, bytes | Unusable | None]()
        try:
            for key, group in groupby(members, key=lambda member: member.key):
                last, files = key, {}
                for member in group:
                    if member.extension in files:  # another sample of the same name
                        yield self._sample(f"{self.files.name(part)}/{key}", files)
                        files = {}
                    files[member.extension] = member.data
                yield self._sample(f"{self.files.name(part)}/{key}", files)
                files = {}
        except DamagedTar as error:
            sample = self._sample(f"{self.files.name(part)}/{last}", files)
            if isinstance(sample, SourceSample):
                yield replace(sample, notes=[*sample.notes, CUT_OFF])
            reason = f"damaged tar: {error}, in or after {last}" if last else f"damaged tar: {error}"
            yield Skipped(printable(part.rpartition(":")[0]), printable(reason))

    def _sample(self, id: str, members: Mapping[str, bytes | Unusable | None]) -> SourceSample | Skipped:
        image = next((data for name in self.extensions if (data := members.get(name)) is not None), None)
        if image is None:
            only = f"only {', '.join(members)}"
            unread = [name for name in members if name in PLUGIN_OF and name not in self.extensions]
            plugin = why_no_image(f".{unread[0]}") if unread and self.extension is None else ""
            return Skipped(printable(id), printable(f"{plugin} ({only})" if plugin else f"no image: {only}"))
        if isinstance(image, Unusable):
            return Skipped(printable(id), image)
        files = {name: LINK if data is None else data for name, data in members.items() if name in SIDECARS}
        texts = {name: files[name] for name in ("txt", "caption") if files.get(name)}
        return self.columns.sample_of_files(id, image, texts, files.get("json"))


class DamagedTar(ValueError):
    """An error for a tar that can't be read any further; the message says at which byte of its content."""


class Member(NamedTuple):
    """One file of a tar. Its data is None if it is not wanted, or if it is a link; :class:`Unusable` if too large."""

    key: str
    extension: str
    data: bytes | Unusable | None


def read_members(file: str, extensions: set[str]) -> Iterator[Member]:
    """Yield the files of a tar, compressed or not, in their order; files without an extension are left out.

    Args:
        file: the path or the URL of the tar.
        extensions: the extensions, without dots, of the files whose content is wanted.

    Raises:
        DamagedTar: the tar is damaged; all complete files before the damage were yielded.
        OSError: the system can't read the tar.
        FetchFailed: a store can't be reached.
    """
    tar: Any = None
    limit = most_unpacked(file_size(file))
    try:
        with open_file(file) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictHeader) as tar:
            while (header := tar.next()) is not None:
                tar.members.clear()  # else tarfile keeps all headers in memory
                if header.offset_data + header.size > limit:
                    raise tarfile.ReadError(f"it unpacks to more than {limit:,} bytes")
                if any(map(is_hidden, PurePosixPath(header.name).parts)):
                    continue
                if not header.isdir() and (match := NAME.fullmatch(header.name)):
                    extension = match[2].lower()
                    wanted = header.isreg() and extension in extensions
                    yield Member(match[1], extension, _data(tar, header, extension) if wanted else None)
    except Exception as error:  # on damaged files, tarfile and the decompressors raise errors of many classes
        if isinstance(error, FetchFailed) or (isinstance(error, OSError) and error.errno is not None):
            raise
        reason = str(error) or type(error).__name__
        reason = "it breaks off" if reason in BREAKS_OFF else reason
        raise DamagedTar(f"{reason} at byte {tar.fileobj.tell() if tar else 0:,} of its content") from error


def _data(tar: tarfile.TarFile, header: tarfile.TarInfo, extension: str) -> bytes | Unusable:
    most = MOST_TEXT_BYTES if extension in SIDECARS else MOST_IMAGE_BYTES
    if header.size > most:
        return Unusable(f"too large: a .{extension} of {header.size:,} bytes; the limit is {most:,}")
    file = tar.extractfile(header)
    assert file is not None
    return file.read()


class _StrictHeader(tarfile.TarInfo):
    """A tar header that is an error if it is damaged; tarfile's own class takes it for the end of the tar.

    So is one with a long name or other additions of more than a megabyte, which tarfile would read into memory.
    """

    def _proc_member(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in LONG_HEADERS and self.size > MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tarfile_)  # type: ignore[misc]

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(str(error)) from error
