"""What feeds a run: sources of images, their preparation into shards, and the multi-resolution DataModule.

Names are imported on first use: preparing data needs no trainer.
"""

from nami_lightning.utils.lazy_import import lazy

_HOMES = {
    "HuggingFaceDataset": "sources",
    "ImageFolder": "sources",
    "MultiResolutionDataModule": "multi_resolution",
    "OpenMoji": "sources",
    "Parquet": "sources",
    "WebDataset": "sources",
}

__all__, __getattr__, __dir__ = lazy(__name__, _HOMES)
