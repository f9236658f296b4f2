"""Parquet files with image files in a column, for example those of img2dataset and Hugging Face."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from nami_lightning.datamodules.sources.base import Skipped, Source, SourceSample, Surveyed, most_unpacked
from nami_lightning.datamodules.sources.fields import COLUMNS, Columns, printable
from nami_lightning.datamodules.sources.files import Files
from nami_lightning.datamodules.sources.tables import TableColumns, rows_of_table
from nami_lightning.datamodules.storage.remote import is_remote
from nami_lightning.datamodules.storage.remote_files import file_size, normalized, open_file

BUFFER_BYTES = 2**20
"""Bytes that are read from a file at once."""

REMOTE_BUFFER_BYTES = 2**16
"""Bytes that are fetched at least of a file in a store; its footer is read in small pieces."""

LEAST_ROW_BYTES = 64
"""Bytes that a row counts for at least in the limit of what a file may unpack to: rows of nulls have none."""


class Parquet(Source):
    """Rows that hold an image file, or ``{bytes, path}`` of one. A few rows are read at a time.

    An id is ``FILE/KEY``, or ``FILE/NUMBER`` if there is no column of keys.

    Args:
        path: a folder of ``.parquet`` files, one such file, or a pattern (``data/train-*.parquet``); or the URL of one
            of them. Of a file in a store, the wanted columns of one row group are in memory.
        columns: which columns hold captions and scores.
        image: column of the images; null: ``image``, ``jpg`` or another usual name.
        key: column of unique names; null: ``key`` if there is such a column.
    """

    def __init__(self, path: str, columns: Columns = COLUMNS, image: str | None = None, key: str | None = None) -> None:
        self.path, self.columns, self.image, self.key = normalized(path), columns, image, key
        self.files = Files(self.path, ".parquet")

    def settings(self) -> dict[str, Any]:
        """Return all arguments."""
        columns = asdict(self.columns)
        return {"name": "Parquet", "path": self.path, "columns": columns, "image": self.image, "key": self.key}

    def parts(self) -> list[str]:
        """Return ``NAME:BYTES`` of every file.

        Raises:
            FileNotFoundError: there are no such files.
            ModuleNotFoundError: the extra ``data`` is not installed.
            ValueError: the first readable file lacks a column that is requested or needed.
        """
        parts = self.files.parts()
        for part in parts:
            try:
                self._table_columns(open_parquet(self.files.file(part)), part)
                break
            except DamagedParquet:
                continue
        return parts

    def signature(self, part: str) -> dict[str, str]:
        """Return the name of the file, with its size and time of modification."""
        return self.files.signature(part)

    def uses_network(self) -> bool:
        """Return whether the path is a URL."""
        return is_remote(self.path)

    def part_bytes(self, part: str) -> int:
        """Return the bytes of the part's file."""
        return int(part.rpartition(":")[2])

    def part_samples(self, part: str) -> int | None:
        """Return the number of rows that the file's footer says; None if it is damaged."""
        try:
            return int(open_parquet(self.files.file(part)).metadata.num_rows)
        except DamagedParquet:
            return None

    def survey(self) -> list[Surveyed]:
        """Return how many files of the folder are read, and how many are ignored."""
        return self.files.survey()

    def read(self, part: str) -> Iterator[SourceSample | Skipped]:
        """Yield the samples of a file; of a damaged row group, those before the damage, then a skipped sample for it.

        Raises:
            ValueError: the file lacks a column that is requested or needed.
            OSError: the system can't read the file (no permission, a failing disk).
            FetchFailed: a store can't be reached.
        """
        try:
            file = open_parquet(self.files.file(part))
            table = self._table_columns(file, part)
        except DamagedParquet as error:
            # Its footer, the last bytes, says where the rows are, so a file that breaks off has none.
            ends = f"the file ends at byte {file_size(self.files.file(part)):,}"
            yield Skipped(printable(part.rpartition(":")[0]), f"damaged Parquet file: {error} ({ends})")
            return
        first, name = 0, printable(part.rpartition(":")[0])
        unpacked, limit = 0, most_unpacked(file_size(self.files.file(part)))
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            number = first
            try:
                for rows, size in rows_of_group(file, group, table.wanted):
                    unpacked += max(size, LEAST_ROW_BYTES)
                    if unpacked > limit:
                        raise DamagedParquet(f"it unpacks to more than {limit:,} bytes")
                    yield from table.samples(iter(rows), f"{self.files.name(part)}/", number)
                    number += len(rows)
            except DamagedParquet as error:
                yield Skipped(f"{name} rows {number} to {end - 1}", f"damaged Parquet file: {error}")
            first = end

    def _table_columns(self, file: Any, part: str) -> TableColumns:
        """Return which columns of a part's file are read."""
        try:
            return TableColumns(file.schema_arrow.names, image_columns(file), self.columns, self.image, self.key)
        except ValueError as error:
            raise ValueError(f"{self.files.file(part)} has {error}") from error


class DamagedParquet(Exception):
    """An error for a Parquet file that can't be read, or can't be read further."""


def open_parquet(file: str) -> Any:
    """Open a Parquet file as a ``pyarrow.parquet.ParquetFile``, which can be read piece by piece.

    Raises:
        DamagedParquet: it is not a valid Parquet file.
        ModuleNotFoundError: the extra ``data`` is not installed.
        OSError: the system can't read it.
        FetchFailed: a store can't be reached.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading Parquet files needs pyarrow: pip install '.[data]' ({error})") from error
    with _DamageAsOneError():
        if is_remote(file):  # the columns of a row group are fetched in a few large pieces
            return ParquetFile(open_file(file, REMOTE_BUFFER_BYTES), pre_buffer=True)
        return ParquetFile(file, buffer_size=BUFFER_BYTES)


def image_columns(file: Any) -> list[str]:
    """Return the columns that can hold image files: binary columns, and structs with a binary field ``bytes``."""
    from pyarrow import types

    def is_binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    return [
        column.name
        for column in file.schema_arrow
        if is_binary(column.type)
        or (types.is_struct(column.type) and any(f.name == "bytes" and is_binary(f.type) for f in column.type))
    ]


def rows_of_group(file: Any, group: int, columns: list[str]) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Yield all rows of a row group, each in a list of its own, with its bytes.

    More at a time would save 10 us a row. But a file of a few bytes may hold a large value, which all rows share.

    Raises:
        DamagedParquet: the row group is damaged; all rows before the damage were yielded.
    """
    batches = file.iter_batches(1, row_groups=[group], columns=columns, use_threads=False)
    while True:
        with _DamageAsOneError():
            batch = next(batches, None)
            rows = None if batch is None else rows_of_table(batch)
        if batch is None or rows is None:
            return
        yield rows, batch.nbytes


class _DamageAsOneError:
    """A ``with`` block that turns all errors of pyarrow on damaged files into :class:`DamagedParquet`."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from pyarrow import ArrowException

        from_system = isinstance(error, OSError) and error.errno is not None
        if isinstance(error, ArrowException | OSError) and not from_system:
            raise DamagedParquet(str(error).strip()) from error
