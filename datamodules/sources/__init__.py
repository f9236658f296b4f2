"""Where images come from: one class a kind of collection; yours needs the three methods of :class:`Source`."""

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
