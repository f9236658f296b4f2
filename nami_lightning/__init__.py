"""nami_lightning: train, resume, compare, sample and ship NAMI text-to-image models.

Names are imported on first use, so that ``import nami_lightning`` and ``nami --help`` stay quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "BridgeFlow": "bridge",
    "Curriculum": "curriculum",
    "NamiModule": "module",
    "NamiPipeline": "pipeline",
    "NamiTransformer2DModel": "transformer",
    "Phase": "curriculum",
    "PixelCodec": "encoders",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
