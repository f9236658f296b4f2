"""What is trained and sampled with: the network, the bridges, the flow, the frozen encoders. No trainer, no run.

- ``flow``: the mathematics: windows, pyramids, interpolation, time, loss weights, solvers.
- ``bridge``: the windows of the stages, and the linear maps from one stage to the next.
- ``transformer``: the nested network, made of diffusers' FLUX blocks.
- ``flux_weights``: a network's way from and to FLUX.
- ``lora``: adapters beside a network's weights.
- ``pretrained``: start from a network that was trained or converted before.
- ``text_encoder``: prompts to text states, by frozen models of transformers.
- ``autoencoder``: images to latents and back, by a frozen model of diffusers, or pixels.
- ``image_features``: frozen image encoders, with whose features training may compare.
- ``float32_model``: a model that stays float32 in a pipeline of half precision.
- ``labelling/``: networks that judge or describe the images of a data set.
- ``encoder_revisions``: which encoders made a data set's encodings, and whether they are a recipe's.
"""

from nami_lightning.utils.lazy_import import lazy

_HOMES = {
    "BridgeFlow": "bridge",
    "EfficientNetLite1Map": "image_features",
    "ModelMixin": "transformer",  # diffusers' own: it looks for a part's base class beside the part
    "NamiTransformer2DModel": "transformer",
    "PixelCodec": "autoencoder",
    "VisionTransformer": "image_features",
}

__all__, __getattr__, __dir__ = lazy(__name__, _HOMES)
