"""What feeds a run: sources of images, their preparation into shards, and the multi-resolution DataModule.

Names are imported on first use: preparing data needs no trainer.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "HuggingFaceDataset": "sources",
    "ImageFolder": "sources",
    "MultiResolutionDataModule": "multires",
    "OpenMoji": "sources",
    "Parquet": "sources",
    "WebDataset": "sources",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
