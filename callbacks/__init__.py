"""Callbacks: they watch or steer a run.

- ``curriculum``: logs the phase, the ratio and the learning rate.
- ``fit_bridges``: fits the bridges before training starts.
- ``ema``: an exponential moving average of the weights.
- ``checkpoint``: checkpoints, and a clean end when the run is asked to stop.
- ``image_samples``: grids of generated images.
- ``image_metrics``: distances and agreement of generated images.
- ``generation``: how the callbacks generate images.
- ``throughput``: speed, memory, and time waiting for data.
- ``terminal``: the progress bar, and the summary of the model.
- ``watchdog``: ends a run that hangs, and says where.
"""

from nami_lightning.callbacks.checkpoint import RunCheckpoint
from nami_lightning.callbacks.curriculum import CurriculumCallback
from nami_lightning.callbacks.ema import EMA
from nami_lightning.callbacks.fit_bridges import BridgePretraining
from nami_lightning.callbacks.image_metrics import Metrics
from nami_lightning.callbacks.image_samples import ImageSamples
from nami_lightning.callbacks.terminal import ProgressBar
from nami_lightning.callbacks.throughput import Throughput
from nami_lightning.callbacks.watchdog import Watchdog
from nami_lightning.pipelines.sampler_settings import SamplerSettings

__all__ = [
    "EMA",
    "BridgePretraining",
    "CurriculumCallback",
    "ImageSamples",
    "Metrics",
    "ProgressBar",
    "RunCheckpoint",
    "SamplerSettings",
    "Throughput",
    "Watchdog",
]
