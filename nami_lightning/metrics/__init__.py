"""Numbers about generated images: distances from real ones, agreement with captions, and their record in a run.

- ``features``: networks whose features images are compared by.
- ``distances``: Frechet distance, KID, CMMD, precision and recall, from any features.
- ``caption_agreement``: how well an image agrees with its caption, by a probe that is trained on real images.
- ``record``: the numbers of a run's evaluations, as they are written into its folder and read back.
- ``budget``: the samples and operations that a run has used at a step.
"""

from nami_lightning.utils.lazy_import import lazy

_HOMES = {"EfficientNetLite0": "features", "Inception": "features"}

__all__, __getattr__, __dir__ = lazy(__name__, _HOMES)
