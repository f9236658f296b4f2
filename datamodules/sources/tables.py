"""Tables with a column of images, as Parquet files and Hugging Face datasets are."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from nami_lightning.datamodules.sources.base import Skipped, SourceSample
from nami_lightning.datamodules.sources.fields import Columns, printable

IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
KEY = "key"
STATUS = ("status", "error_message")
BATCH = 32
"""Rows that are in memory at once."""


class Layout:
    """Which columns of one table are read.

    Args:
        names: of all its columns.
        images: those of them that hold encoded images.
        columns: of captions and scores.
        image: the one to take; null: the first of ``images`` by the usual names, or the only one.
        key: column of the rows' names; null: ``key`` if there is one, else they are numbered.

    Raises:
        ValueError: a column that was asked for, or one that is needed, is not there.
    """

    def __init__(
        self, names: Sequence[str], images: Collection[str], columns: Columns, image: str | None, key: str | None
    ) -> None:
        usual = [name for name in IMAGES if name in images] or (list(images) if len(images) == 1 else [])
        if image is not None:
            usual = [image] if image in images else []
        if not usual:
            raise ValueError(
                f"no column {image or 'of encoded images'} among {', '.join(names)} "
                f"(of images: {', '.join(images) or 'none'}): name it, --source.image NAME"
            )
        if key is not None and key not in names:
            raise ValueError(f"no column {key} among {', '.join(names)}")
        self.columns = columns
        self.image = usual[0]
        self.key = key or (KEY if KEY in names else None)
        others = [name for name in names if name in (self.key, *STATUS)]
        self.wanted = list(dict.fromkeys([self.image, *others, *columns.wanted(names)]))

    def samples(
        self, rows: Iterator[Mapping[str, Any]], prefix: str, first: int = 0
    ) -> Iterator[SourceSample | Skipped]:
        """The samples of consecutive rows, the first of which is number ``first``; ids start with ``prefix``."""
        for number, row in enumerate(rows, first):
            name = row.get(self.key) if self.key else None
            yield self._sample(f"{prefix}{f'{number:07d}' if name is None else name}", row)

    def _sample(self, id: str, row: Mapping[str, Any]) -> SourceSample | Skipped:
        image = row[self.image]
        data = image.get("bytes") if isinstance(image, dict) else image
        if data is None:
            known = [row[name] for name in STATUS if row.get(name)] or ([image.get("path")] if image else [])
            return Skipped(printable(id), printable(": ".join(map(str, ["no image", *known]))))
        return self.columns.sample(id, data, row)
