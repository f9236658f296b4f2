"""Images from prompts: the diffusers pipeline of a NAMI, and what belongs to calling it.

- ``nami_pipeline``: the pipeline: encode, draw stage by stage, decode.
- ``stages``: its loop: solve a stage, cross the bridge to the next, from noise or from an image.
- ``lora``: its loader of LoRAs, and several LoRAs by one list.
- ``checks``: what it checks: its inputs, and whether its images are finite.
- ``cuda_graphs``: the network's passes as CUDA graphs, for coarse stages on fast GPUs.
- ``batch``: a batch of images from any text-to-image pipeline of diffusers.
- ``image_rows``: images to draw, a row each, from text, JSON lines or CSV.
- ``png_settings``: the settings of an image in its PNG.
- ``sampler_settings``: the settings of a call, as a recipe, a callback and a benchmark state them.
"""

from nami_lightning.utils.lazy_import import lazy

_HOMES = {
    "CudaGraphs": "cuda_graphs",
    "NamiPipeline": "nami_pipeline",
    "NonFiniteImages": "checks",
    "SamplerSettings": "sampler_settings",
}

__all__, __getattr__, __dir__ = lazy(__name__, _HOMES)
