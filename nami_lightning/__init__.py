"""nami_lightning: train, resume, compare, sample and ship NAMI text-to-image models.

Names are imported on first use, so that ``import nami_lightning`` and ``nami --help`` stay quick.
"""

from nami_lightning.utils.lazy_import import lazy

__version__ = "0.1.0"

_HOMES = {
    "BridgeFlow": "models.bridge",
    "ContrastiveFlow": "training.techniques.contrastive_flow",
    "Curriculum": "training.curriculum",
    "FSDP2Strategy": "training.strategies",
    "MuonAdamW": "training.optimizers",
    "NamiModule": "training.module",
    "NamiPipeline": "pipelines.nami_pipeline",
    "NamiTransformer2DModel": "models.transformer",
    "PerceptualLoss": "training.techniques.perceptual",
    "Phase": "training.curriculum",
    "PixelCodec": "models.autoencoder",
    "RepresentationAlignment": "training.techniques.representation_alignment",
    "RunTensorBoard": "runs.tensorboard",
    "TokenRouting": "training.techniques.token_routing",
}

__all__, __getattr__, __dir__ = lazy(__name__, _HOMES)
