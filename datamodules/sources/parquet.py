"""Parquet files with the images' bytes in a column: img2dataset's, Hugging Face's, or others."""

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nami_lightning.datamodules.sources.base import Skipped, Source, SourceSample
from nami_lightning.datamodules.sources.fields import COLUMNS, Columns, printable
from nami_lightning.datamodules.sources.files import Files
from nami_lightning.datamodules.sources.tables import BATCH, Layout

BUFFER_BYTES = 2**20


class Parquet(Source):
    """Rows with an encoded image, or with ``{bytes, path}`` of one. Read a few rows at a time.

    An id is ``FILE/KEY``, or ``FILE/NUMBER`` without a column of keys.

    Args:
        path: a folder of ``.parquet`` files, one of them, or a pattern (``data/train-*.parquet``).
        columns: which columns hold captions and scores.
        image: column of the images; null: ``image``, ``jpg`` or another usual name.
        key: column of unique names; null: ``key`` if there is one.
    """

    def __init__(self, path: str, columns: Columns = COLUMNS, image: str | None = None, key: str | None = None) -> None:
        self.path, self.columns, self.image, self.key = os.path.normpath(path), columns, image, key
        self.files = Files(path, ".parquet")

    def settings(self) -> dict[str, Any]:
        """All arguments."""
        columns = asdict(self.columns)
        return {"name": "Parquet", "path": self.path, "columns": columns, "image": self.image, "key": self.key}

    def parts(self) -> list[str]:
        """``NAME:BYTES`` of every file.

        Raises:
            FileNotFoundError: there are none.
            ModuleNotFoundError: the extra ``data`` is not installed.
            ValueError: the first that can be read lacks a column that was asked for or is needed.
        """
        parts = self.files.parts()
        for part in parts:
            try:
                self._layout(open_parquet(self.files.file(part)), part)
                break
            except DamagedParquet:
                continue
        return parts

    def read(self, part: str) -> Iterator[SourceSample | Skipped]:
        """The samples of a file; of a damaged one those before the damage, then the file itself.

        Raises:
            ValueError: a column that was asked for or is needed is not there.
            OSError: the system can't read it (no permission, a failing disk).
        """
        try:
            table = open_parquet(self.files.file(part))
            layout = self._layout(table, part)
            yield from layout.samples(rows_of(table, layout.wanted), f"{self.files.name(part)}/")
        except DamagedParquet as error:
            yield Skipped(printable(part.rpartition(":")[0]), f"damaged Parquet file: {error}")

    def _layout(self, table: Any, part: str) -> Layout:
        try:
            return Layout(table.schema_arrow.names, image_columns(table), self.columns, self.image, self.key)
        except ValueError as error:
            raise ValueError(f"{self.files.file(part)} has {error}") from error


class DamagedParquet(Exception):
    """A Parquet file that can't be read, or no further."""


def open_parquet(file: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``, for reading in pieces.

    Raises:
        DamagedParquet: it is none.
        ModuleNotFoundError: the extra ``data`` is not installed.
        OSError: the system can't read it.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading Parquet files needs pyarrow: pip install '.[data]' ({error})") from error
    with _Damage():
        return ParquetFile(file, buffer_size=BUFFER_BYTES)


def image_columns(table: Any) -> list[str]:
    """The columns that can hold encoded images: binary ones, and structs with a binary field ``bytes``."""
    from pyarrow import types

    def is_binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    return [
        column.name
        for column in table.schema_arrow
        if is_binary(column.type)
        or (types.is_struct(column.type) and any(f.name == "bytes" and is_binary(f.type) for f in column.type))
    ]


def rows_of(table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """All rows, a few in memory at a time.

    Raises:
        DamagedParquet: after the last that can be read.
    """
    batches = table.iter_batches(BATCH, columns=columns, use_threads=False)
    while True:
        with _Damage():
            batch = next(batches, None)
            rows = batch.to_pylist() if batch is not None else None
        if rows is None:
            return
        yield from rows


class _Damage:
    """Turns what pyarrow raises on damaged files into one exception."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from pyarrow import ArrowException

        of_system = isinstance(error, OSError) and error.errno is not None
        if isinstance(error, ArrowException | UnicodeDecodeError | OSError) and not of_system:
            raise DamagedParquet(str(error).strip()) from error
