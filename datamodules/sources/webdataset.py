"""Tar files as WebDataset lays them out, and img2dataset writes them: KEY.jpg, KEY.txt, KEY.json, one after another."""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Self

from nami_lightning.datamodules.sources.base import Skipped, Source, SourceSample
from nami_lightning.datamodules.sources.fields import COLUMNS, BadText, Columns, decode_object, printable
from nami_lightning.datamodules.sources.files import IMAGE_EXTENSIONS, Files

NAME = re.compile(r"(?:\./)*((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
"""A member's key, up to the first dot of the last part of its name, and the extension."""


class WebDataset(Source):
    """Images and captions in tar files, read once from start to end: memory does not grow with their size.

    The caption is ``KEY.txt`` or ``KEY.caption``, or a field of ``KEY.json``. An id is ``TAR/KEY``.

    Args:
        path: a folder of ``.tar`` files, one of them, or a pattern.
        columns: which fields of ``KEY.json`` hold captions and scores; ``txt`` is ``KEY.txt``.
        extension: of the images, where a key has several: ``jpg``; null: any that Pillow reads.
    """

    def __init__(self, path: str, columns: Columns = COLUMNS, extension: str | None = None) -> None:
        self.path, self.columns, self.extension = os.path.normpath(path), columns, extension
        self.files = Files(path, ".tar")
        self.extensions = IMAGE_EXTENSIONS if extension is None else (extension.lower().removeprefix("."),)

    def settings(self) -> dict[str, Any]:
        """All arguments."""
        return {"name": "WebDataset", "path": self.path, "columns": asdict(self.columns), "extension": self.extension}

    def parts(self) -> list[str]:
        """``NAME:BYTES`` of every tar.

        Raises:
            FileNotFoundError: there are none.
        """
        return self.files.parts()

    def read(self, part: str) -> Iterator[SourceSample | Skipped]:
        """The samples of a tar; of a damaged one those that end before the damage, then the tar itself.

        Raises:
            OSError: the system can't read the tar (no permission, a failing disk).
        """
        members = read_members(self.files.file(part), {*self.extensions, "txt", "caption", "json"})
        last = ""
        try:
            for key, group in groupby(members, key=lambda member: member.key):
                last = key
                yield self._sample(f"{self.files.name(part)}/{key}", {m.extension: m.data for m in group})
        except DamagedTar as error:
            reason = f"damaged tar: {error}, in or after {last}" if last else f"damaged tar: {error}"
            yield Skipped(printable(part.rpartition(":")[0]), printable(reason))

    def _sample(self, id: str, members: dict[str, bytes | None]) -> SourceSample | Skipped:
        image = next((data for name in self.extensions if (data := members.get(name)) is not None), None)
        if image is None:
            return Skipped(printable(id), f"no image: only {', '.join(members)}")
        try:
            fields = decode_object(members.get("json") or b"{}")
        except BadText as error:
            return Skipped(printable(id), str(error))
        texts = {name: members[name] for name in ("txt", "caption") if members.get(name)}
        return self.columns.sample(id, image, fields | texts)


class DamagedTar(ValueError):
    """A tar that can't be read any further."""


class Member(NamedTuple):
    """One file of a tar; without data if it wasn't wanted, or is a link."""

    key: str
    extension: str
    data: bytes | None


def read_members(file: Path, extensions: set[str]) -> Iterator[Member]:
    """The files of a tar, compressed or not, in their order; those whose names have no extension are left out.

    Raises:
        DamagedTar: after the last whole one.
        OSError: the system can't read it.
    """
    try:
        with tarfile.open(file, "r|*", tarinfo=_StrictHeader) as tar:
            while (header := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it remembers all
                if not header.isdir() and (match := NAME.fullmatch(header.name)):
                    extension = match[2].lower()
                    wanted = tar.extractfile(header) if header.isreg() and extension in extensions else None
                    yield Member(match[1], extension, wanted.read() if wanted else None)
    except Exception as error:  # tarfile and the decompressors raise nearly anything on damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DamagedTar(str(error) or type(error).__name__) from error


class _StrictHeader(tarfile.TarInfo):
    """Without it, tarfile takes a damaged header for the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(str(error)) from error
