"""Where images come from: one class a kind of collection; yours needs the three methods of :class:`Source`."""

from nami_lightning.datamodules.sources.base import Skipped, Source, SourceSample
from nami_lightning.datamodules.sources.openmoji import OpenMoji

__all__ = ["OpenMoji", "Skipped", "Source", "SourceSample"]
