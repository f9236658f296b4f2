"""Datasets of Hugging Face's ``datasets`` library that were saved to disk."""

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nami_lightning.datamodules.sources.base import Skipped, Source, SourceSample, part_ranges, stamp
from nami_lightning.datamodules.sources.fields import COLUMNS, Columns
from nami_lightning.datamodules.sources.tables import BATCH, TableColumns, rows_of_table
from nami_lightning.errors import one_line

PART_SIZE = 1000
SAVED = (".arrow", ".json")
"""Extensions of the files of a saved dataset."""


class HuggingFaceDataset(Source):
    """A dataset that ``save_to_disk`` wrote. Its image files are used as they are, without decoding them.

    An id is the row's key, or the row's number.

    Args:
        path: the folder of the dataset.
        split: the split to read, if the dataset has several.
        columns: which columns hold captions and scores.
        image: column of the images; null: ``image``, another usual name, or the only column of images.
        key: column of unique names; null: ``key`` if there is such a column.
    """

    def __init__(
        self,
        path: str,
        split: str | None = None,
        columns: Columns = COLUMNS,
        image: str | None = None,
        key: str | None = None,
    ) -> None:
        self.path, self.split, self.columns, self.image, self.key = os.path.normpath(path), split, columns, image, key

    def settings(self) -> dict[str, Any]:
        """Return all arguments."""
        return {
            "name": "HuggingFaceDataset",
            "path": self.path,
            "split": self.split,
            "columns": asdict(self.columns),
            "image": self.image,
            "key": self.key,
        }

    def parts(self) -> list[str]:
        """Return ``FIRST-END-FINGERPRINT`` of every thousand rows.

        Raises:
            FileNotFoundError: the folder doesn't exist or holds no dataset.
            ModuleNotFoundError: the extra ``data`` is not installed.
            ValueError: a split or a column doesn't exist, or has to be chosen.
        """
        dataset = self._load()
        self._table_columns(dataset)
        ranges = part_ranges(len(dataset), PART_SIZE)
        return [f"{first:07d}-{end:07d}-{dataset._fingerprint}" for first, end in ranges]

    def signature(self, part: str) -> dict[str, str]:
        """Return the dataset's files, with their sizes and times of modification, and the part's rows."""
        files = sorted(path for path in Path(self.path).rglob("*") if path.is_file() and path.suffix in SAVED)
        return {str(path.relative_to(self.path)): f"{stamp(path)} of rows {part}" for path in files}

    def part_samples(self, part: str) -> int:
        """Return the number of rows."""
        first, end = map(int, part.split("-")[:2])
        return end - first

    def read(self, part: str) -> Iterator[SourceSample | Skipped]:
        """Yield the samples of one part: a range of rows."""
        import datasets

        first, end = map(int, part.split("-")[:2])
        dataset = self._load()
        table = self._table_columns(dataset)
        dataset = dataset.select_columns(table.wanted)
        if isinstance(dataset.features[table.image], datasets.Image):
            dataset = dataset.cast_column(table.image, datasets.Image(decode=False))
        yield from table.samples(rows_of(dataset.with_format("arrow"), first, end), "", first)

    def _load(self) -> Any:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"reading a Hugging Face dataset needs datasets: pip install '.[data]' ({error})"
            ) from error
        try:
            dataset = datasets.load_from_disk(self.path)
        except Exception as error:  # datasets and pyarrow raise errors of many classes on damaged files
            if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno is not None):
                raise
            raise ValueError(
                f"{self.path} is damaged, or was not written by save_to_disk: {one_line(error)}"
            ) from error
        if not isinstance(dataset, datasets.DatasetDict):
            if self.split is not None:
                raise ValueError(f"{self.path} has no splits; split {self.split!r} was asked for")
            return dataset
        splits = list(dataset)
        split = splits[0] if self.split is None and len(splits) == 1 else self.split
        if split not in splits:
            problem = "choose one" if split is None else f"{split!r} is not among them"
            raise ValueError(f"{self.path} has the splits {', '.join(splits)}: {problem}, --source.split NAME")
        return dataset[split]

    def _table_columns(self, dataset: Any) -> TableColumns:
        """Return which columns of the dataset are read."""
        import datasets

        images = [
            name
            for name, feature in dataset.features.items()
            if isinstance(feature, datasets.Image)
            or getattr(feature, "dtype", None) in ("binary", "large_binary")
            or (isinstance(feature, dict) and "bytes" in feature)
        ]
        try:
            return TableColumns(dataset.column_names, images, self.columns, self.image, self.key)
        except ValueError as error:
            raise ValueError(f"{self.path} has {error}") from error


def rows_of(dataset: Any, first: int, end: int) -> Iterator[dict[str, Any]]:
    """Yield the rows ``first`` to ``end``, with a few in memory at a time."""
    for start in range(first, end, BATCH):
        yield from rows_of_table(dataset[start : min(start + BATCH, end)])
