"""Metrics of generated images: distances from real images, agreement with captions, and the record of a run's metrics.

- ``features``: networks whose features the distances compare.
- ``distances``: Frechet distance, KID, CMMD, precision and recall, from any features.
- ``caption_agreement``: how well an image agrees with its caption, by CLIP or by a probe that is fitted to real images.
- ``record``: the evaluations of a run, as they are written into its folder and read back.
- ``budget``: the operations of training on one sample.
"""

from nami_lightning.utils.lazy_import import lazy

_HOMES = {"EfficientNetLite0": "features", "EfficientNetLite2": "features", "Inception": "features"}

__all__, __getattr__, __dir__ = lazy(__name__, _HOMES)
