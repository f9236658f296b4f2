"""What feeds a run: sources of images, their preparation into shards, and the multi-resolution DataModule."""

from nami_lightning.datamodules.multires import MultiResolutionDataModule
from nami_lightning.datamodules.openmoji import OpenMoji

__all__ = ["MultiResolutionDataModule", "OpenMoji"]
