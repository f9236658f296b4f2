"""Tables with a column of images, in Parquet files and in Hugging Face datasets."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from nami_lightning.datamodules.sources.base import MOST_IMAGE_BYTES, Skipped, SourceSample
from nami_lightning.datamodules.sources.fields import Columns, Unusable, printable

IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
KEY = "key"
STATUS = ("status", "error_message")
BATCH = 32
"""The number of rows that are in memory at once."""


def rows_of_table(table: Any) -> list[dict[str, Any]]:
    """Return the rows of a table or a record batch of ``pyarrow``; a value that can't be read is :class:`Unusable`."""
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows
    except (ValueError, OverflowError):  # a text that is not UTF-8, a year that Python doesn't have
        columns = {name: table.column(name) for name in table.schema.names}
        return [{name: _value(column, row) for name, column in columns.items()} for row in range(len(table))]


def _value(column: Any, number: int) -> Any:
    try:
        return column[number].as_py()
    except (ValueError, OverflowError) as error:
        return Unusable("caption is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"unreadable: {error}")


class TableColumns:
    """The columns of one table that are read, and how its rows become samples.

    Args:
        names: the names of all columns of the table.
        images: those of them that hold image files.
        columns: which columns hold captions and scores.
        image: the column of images to use; null: the first of ``images`` with a usual name, or the only one.
        key: the column of the rows' names; null: ``key`` if there is such a column, else the rows are numbered.

    Attributes:
        wanted: the names of the columns to read.

    Raises:
        ValueError: a column that is requested or needed is missing.
    """

    def __init__(
        self, names: Sequence[str], images: Collection[str], columns: Columns, image: str | None, key: str | None
    ) -> None:
        candidates = [name for name in IMAGES if name in images] or (list(images) if len(images) == 1 else [])
        if image is not None:
            candidates = [image] if image in images else []
        if not candidates:
            raise ValueError(
                f"no column {image or 'of encoded images'} among {', '.join(names)} "
                f"(of images: {', '.join(images) or 'none'}): name it, --source.image NAME"
            )
        if key is not None and key not in names:
            raise ValueError(f"no column {key} among {', '.join(names)}")
        self.columns = columns
        self.image = candidates[0]
        self.key = key or (KEY if KEY in names else None)
        key_and_status = [name for name in names if name in (self.key, *STATUS)]
        self.wanted = list(dict.fromkeys([self.image, *key_and_status, *columns.wanted(names)]))

    def samples(
        self, rows: Iterator[Mapping[str, Any]], prefix: str, first: int = 0
    ) -> Iterator[SourceSample | Skipped]:
        """Yield the samples of consecutive rows.

        Args:
            rows: the rows.
            prefix: the beginning of every id.
            first: the number of the first row.
        """
        for number, row in enumerate(rows, first):
            name = row.get(self.key) if self.key else None
            name = None if isinstance(name, Unusable) else name
            yield self._sample(f"{prefix}{f'{number:07d}' if name is None else name}", row)

    def _sample(self, id: str, row: Mapping[str, Any]) -> SourceSample | Skipped:
        image = row[self.image]
        if isinstance(image, Unusable):
            return Skipped(printable(id), f"no image: {image}")
        data = image.get("bytes") if isinstance(image, dict) else image
        if data is None:
            details = [row[name] for name in STATUS if row.get(name)] or ([image.get("path")] if image else [])
            return Skipped(printable(id), printable(": ".join(map(str, ["no image", *details]))))
        if len(data) > MOST_IMAGE_BYTES:
            return Skipped(printable(id), f"too large: {len(data):,} bytes; the limit is {MOST_IMAGE_BYTES:,}")
        return self.columns.sample(id, data, row)
