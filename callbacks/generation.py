"""How the callbacks generate images of a model that is being trained."""

from collections.abc import Sequence
from typing import Any

import torch

from nami_lightning.models.pipeline_checks import NonFiniteImages
from nami_lightning.models.sampler_settings import SamplerSettings
from nami_lightning.training.module import NamiModule


def generate(
    module: NamiModule,
    sampler: SamplerSettings,
    prompts: list[str],
    seeds: Sequence[int],
    output_type: str = "pil",
    height: int | None = None,
    width: int | None = None,
) -> Any:
    """Generate an image of each prompt with the EMA's weights, if there are any.

    Args:
        module: the model.
        sampler: how.
        prompts: one an image. They and the negative prompt are encoded by the module, which may remember encodings.
        seeds: of the images' noise, one an image.
        output_type: ``pil``, or another of diffusers'.
        height: of the images in px; None: as the settings say.
        width: of the images in px; likewise.

    Raises:
        NonFiniteImages: images that are NaN or infinite; the message names their prompts and seeds. All ranks have run
            the whole network by then.
    """
    arguments = sampler.arguments()
    negative_prompt = arguments.pop("negative_prompt", "")
    size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    try:
        states, negative = module.encode_prompts(prompts), module.encode_prompts([negative_prompt])
        with module.ema_weights:
            output = module.pipeline()(
                prompt_embeds=states.sequence,
                pooled_prompt_embeds=states.pooled,
                negative_prompt_embeds=negative.sequence,
                negative_pooled_prompt_embeds=negative.pooled,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type=output_type,
                **(arguments | size),
            )
    except NonFiniteImages as error:
        raise NonFiniteImages(error.images, error.origins, prompts, seeds) from None
    return output.images
