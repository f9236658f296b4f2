"""Where images come from: one class for each kind of collection.

Your own class needs the three methods of :class:`Source`.

- ``base``: what a source is, and the samples that it gives.
- ``find``: find the source that reads what is at a path.
- ``folder``: image files in a folder, with captions in text, JSON or metadata files.
- ``listing``: list the images of a folder, with their rows in metadata files.
- ``webdataset``: tar files, as WebDataset and img2dataset write them.
- ``parquet``: Parquet files with a column of images.
- ``huggingface``: datasets of Hugging Face that were saved to disk.
- ``openmoji``: the emoji of the OpenMoji project.
- ``tables``: rows of a table turned into samples, for ``parquet`` and ``huggingface``.
- ``fields``: which fields of a sample hold captions and scores.
- ``files``: find the files of a source that consists of tar or Parquet files.
"""

from nami_lightning.datamodules.sources.base import Skipped, Source, SourceSample
from nami_lightning.datamodules.sources.fields import Columns
from nami_lightning.datamodules.sources.find import find_source
from nami_lightning.datamodules.sources.folder import ImageFolder
from nami_lightning.datamodules.sources.huggingface import HuggingFaceDataset
from nami_lightning.datamodules.sources.openmoji import OpenMoji
from nami_lightning.datamodules.sources.parquet import Parquet
from nami_lightning.datamodules.sources.webdataset import WebDataset

__all__ = [
    "Columns",
    "HuggingFaceDataset",
    "ImageFolder",
    "OpenMoji",
    "Parquet",
    "Skipped",
    "Source",
    "SourceSample",
    "WebDataset",
    "find_source",
]
