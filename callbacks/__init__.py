"""What watches or steers a run."""

from nami_lightning.callbacks.checkpoint import RunCheckpoint
from nami_lightning.callbacks.curriculum import CurriculumCallback
from nami_lightning.callbacks.ema import EMA
from nami_lightning.callbacks.fit_bridges import BridgePretraining
from nami_lightning.callbacks.image_metrics import Metrics
from nami_lightning.callbacks.image_samples import ImageSamples
from nami_lightning.callbacks.sampler_settings import Drawing
from nami_lightning.callbacks.throughput import Throughput
from nami_lightning.callbacks.watchdog import Watchdog

__all__ = [
    "EMA",
    "BridgePretraining",
    "CurriculumCallback",
    "Drawing",
    "ImageSamples",
    "Metrics",
    "RunCheckpoint",
    "Throughput",
    "Watchdog",
]
