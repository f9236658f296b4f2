"""What the pipeline checks: its inputs before anything runs, and whether its images are finite."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from nami_lightning.models.flow import SolverKind
from nami_lightning.utils.text_files import is_text

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DECODING = "decoding"
SHOWN = 3


class NonFiniteImages(RuntimeError):
    """An error for generated images that are NaN or infinite.

    All stages have run for all images when it is raised, so that ranks that share a network stay in step.

    Args:
        images: all images of the call, by its ``output_type``; those in ``origins`` are of no use.
        origins: what first gave values that are not finite, by the image's number: ``stage 1``, ``decoding``.
        prompts: the prompt of each image; None if they are not known.
        seeds: the seed of each image; None if they are not known.
    """

    def __init__(
        self,
        images: Any,
        origins: Mapping[int, str],
        prompts: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.images, self.origins = images, dict(origins)
        shown = []
        for number, origin in list(self.origins.items())[:SHOWN]:
            facts = [] if prompts is None else [f"prompt {prompts[number]!r}"]
            facts += [] if seeds is None else [f"seed {seeds[number]}"]
            shown.append(f"image {number} ({', '.join([*facts, f'since {origin}'])})")
        more = len(self.origins) - len(shown)
        super().__init__(
            f"NaN or infinite values in {', '.join(shown)}{f' and {more} more' if more else ''}. If the network gives "
            "them, the checkpoint's weights may be damaged; if only half precision gives them, use float32 or bfloat16"
        )


def find_non_finite(finite: Sequence[tuple[str, Tensor]]) -> dict[int, str]:
    """Return what first gave values that are not finite, by the image's number.

    Args:
        finite: in the order of the work, what was done, and whether each image was finite after it, bool ``(B,)``.
    """
    flags = torch.stack([flag for _, flag in finite]).cpu()
    return {
        image: finite[int(flags[:, image].int().argmin())][0]
        for image in range(flags.shape[1])
        if not flags[:, image].all()
    }


def finite_rows(tensor: Tensor) -> Tensor:
    """Tell for each row of a batch whether all its values are finite, bool ``(B,)``."""
    return tensor.isfinite().flatten(1).all(1)


# --- inputs --------------------------------------------------------------------------------------


CHECKED = (
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "solver",
    "num_images_per_prompt",
    "generator",
    "latents",
    "prompt_embeds",
    "pooled_prompt_embeds",
    "negative_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "image",
    "strength",
    "entry_stage",
    "keep_detail",
    "output_type",
    "callback_on_step_end_tensor_inputs",
    "max_sequence_length",
)
"""The arguments of a call that are checked."""


def check_call(pipeline: Any, **inputs: Any) -> None:
    """Check the arguments of a NamiPipeline's call: those of :data:`CHECKED`.

    Raises:
        ValueError: one is wrong, or two don't fit together; the message names them.
    """
    if not pipeline.bridge.fitted:
        raise ValueError(
            "the bridges of this model were never fitted: lightning run RECIPE --model.pretrained FOLDER fits them "
            "on its data, and trains on"
        )
    stages, height, width = pipeline.bridge.num_stages, inputs["height"], inputs["width"]
    check_guidance(inputs["guidance_scale"], stages)
    rows = check_texts(pipeline, **inputs)
    for name in ("num_images_per_prompt", "max_sequence_length"):
        if name != "max_sequence_length" or inputs[name] is not None:
            check_count(name, inputs[name])
    batch = rows * inputs["num_images_per_prompt"]
    check_generator(inputs["generator"], batch)
    check_size(height, width, pipeline._multiple)
    check_steps(inputs["num_inference_steps"], stages)
    check_choices(inputs["solver"], inputs["output_type"])
    check_latents(inputs["latents"], pipeline._latent_shapes(batch, height, width))
    check_image(inputs["image"], batch, inputs["strength"], inputs["entry_stage"], inputs["keep_detail"], stages)
    unknown = set(inputs["callback_on_step_end_tensor_inputs"]) - set(pipeline._callback_tensor_inputs)
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs {sorted(unknown)} are none of {pipeline._callback_tensor_inputs}"
        )
    for stage in range(1, stages):
        pipeline.bridge.check_size(stage, *pipeline._latent_shapes(1, height, width)[stage][2:])


def check_texts(pipeline: Any, **inputs: Any) -> int:
    """Check prompts and encoded prompts; return the number of prompts.

    Raises:
        ValueError: one is missing, given twice, or of another shape.
    """
    prompt, prompt_embeds = inputs["prompt"], inputs["prompt_embeds"]
    if prompt is None and prompt_embeds is None:
        raise ValueError("give either a prompt or prompt_embeds")
    guided = max(per_stage(inputs["guidance_scale"], pipeline.bridge.num_stages)) > 1
    to_encode = prompt is not None or (guided and inputs["negative_prompt_embeds"] is None)
    if to_encode and pipeline.text_encoder_2 is None:
        raise ValueError(
            "this pipeline has no text encoder: give prompt_embeds and pooled_prompt_embeds, and with a "
            "guidance_scale above 1 negative_prompt_embeds and negative_pooled_prompt_embeds"
        )
    config = pipeline.transformer.config
    prompts = {}
    for name, pooled_name in (
        ("prompt", "pooled_prompt_embeds"),
        ("negative_prompt", "negative_pooled_prompt_embeds"),
    ):
        texts, embeds, pooled = inputs[name], inputs[f"{name}_embeds"], inputs[pooled_name]
        if embeds is not None or pooled is not None:
            if texts is not None:
                raise ValueError(f"give either a {name} or {name}_embeds, not both")
            check_embeds(name, embeds, pooled, config.joint_attention_dim, config.pooled_projection_dim)
            prompts[name] = len(embeds)
        elif texts is not None:
            check_prompts(name, texts)
            prompts[name] = 1 if isinstance(texts, str) else len(texts)
    rows = prompts["prompt"]
    if prompts.get("negative_prompt", 1) not in (1, rows):
        raise ValueError(f"{prompts['negative_prompt']} negative prompts for {rows} prompts: give one, or one a prompt")
    return rows


def check_image(image: Any, batch: int, strength: Any, entry_stage: Any, keep_detail: bool, stages: int) -> None:
    """Check the image, or images, to be drawn anew, and how.

    Raises:
        ValueError: a share or a stage that there isn't, settings without an image, or another number of images.
    """
    several = isinstance(image, list | tuple) or getattr(image, "ndim", 0) == 4
    if several and len(image) not in (1, batch):
        raise ValueError(f"{len(image)} images for a batch of {batch}: give one image, or one an image")
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not number or not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1; got {strength!r}")
    if isinstance(entry_stage, bool) or not isinstance(entry_stage, int) or not 0 <= entry_stage < stages:
        raise ValueError(f"entry_stage must be a stage, 0 to {stages - 1}; got {entry_stage!r}")
    if image is None and (strength != 1 or entry_stage or keep_detail):
        raise ValueError("strength, entry_stage and keep_detail say how an image is drawn anew: give an image")
    if keep_detail and stages == 1:
        raise ValueError("keep_detail takes the detail of the stages after the first: this model has one stage")


def check_prompts(name: str, prompts: Any) -> None:
    """Check that prompts are a text or a list of texts.

    Raises:
        ValueError: they are something else, the list is empty, or a text has characters that can't be written.
    """
    if isinstance(prompts, str):
        _check_text(name, prompts)
        return
    if not isinstance(prompts, list | tuple):
        raise ValueError(f"{name} must be a string or a list of strings; got {type(prompts).__name__}")
    if not prompts:
        raise ValueError(f"{name} is an empty list: give at least one prompt")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"{name}[{i}] must be a string; got {type(prompt).__name__}")
        _check_text(f"{name}[{i}]", prompt)


def _check_text(name: str, text: str) -> None:
    if not is_text(text):
        raise ValueError(f"{name} has a NUL or half of a surrogate pair, which no text can hold: got {text[:80]!a}")


def check_embeds(name: str, embeds: Any, pooled: Any, sequence_dim: int, pooled_dim: int) -> None:
    """Check that encoded prompts are of the text encoders that the network was trained with.

    Raises:
        ValueError: one of the two is missing, or they have other shapes.
    """
    names = f"{name}_embeds and pooled_{name}_embeds".replace("pooled_negative", "negative_pooled")
    if not isinstance(embeds, Tensor) or not isinstance(pooled, Tensor):
        kinds = " and ".join(type(value).__name__ for value in (embeds, pooled))
        raise ValueError(f"{names} must both be given, as tensors; got {kinds}")
    shapes = [tuple(embeds.shape), tuple(pooled.shape)]
    fits = [len(shape) for shape in shapes] == [3, 2] and [shape[-1] for shape in shapes] == [sequence_dim, pooled_dim]
    if not fits or shapes[0][0] != shapes[1][0] or not shapes[0][0]:
        raise ValueError(
            f"{names} must have the shapes (prompts, tokens, {sequence_dim}) and (prompts, {pooled_dim}); "
            f"got {shapes[0]} and {shapes[1]}"
        )


def check_latents(latents: Any, shapes: Sequence[tuple[int, ...]]) -> None:
    """Check that the noise that was given is of the coarsest stage, or of all stages.

    Args:
        latents: a tensor, a list of tensors, or None.
        shapes: of each stage's latents, coarsest first.

    Raises:
        ValueError: it has other shapes.
    """
    if latents is None:
        return
    given = [latents] if isinstance(latents, Tensor) else list(latents)
    found = [tuple(getattr(tensor, "shape", ())) for tensor in given]
    if found not in ([shapes[0]], list(shapes)):
        raise ValueError(
            f"latents must be the noise of the coarsest stage, of shape {shapes[0]}, or a list of the noise of all "
            f"stages, of shapes {', '.join(map(str, shapes))}; got {', '.join(map(str, found)) or 'an empty list'}"
        )


def check_count(name: str, value: Any) -> None:
    """Check that a number is whole and at least 1.

    Raises:
        ValueError: it isn't.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")


def check_size(height: Any, width: Any, multiple: int) -> None:
    """Check that an image's sides are multiples of the coarsest stage's token.

    Raises:
        ValueError: one isn't.
    """
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, int) or side < 1 or side % multiple:
            raise ValueError(f"height {height} and width {width} must be multiples of {multiple} px for this model")


def check_steps(steps: Any, stages: int) -> None:
    """Check that the solver steps are a total that gives each stage one, or one number a stage.

    Raises:
        ValueError: they aren't, or one is below 1.
    """
    listed = list(steps) if isinstance(steps, list | tuple) else [steps]
    whole = all(isinstance(number, int) and not isinstance(number, bool) and number >= 1 for number in listed)
    if not whole or sum(listed) < stages or (isinstance(steps, list | tuple) and len(listed) != stages):
        raise ValueError(
            f"num_inference_steps {steps!r} must be the number of all stages' steps together, at least {stages}, or a "
            f"list of {stages} (one a stage), all >= 1"
        )


def check_guidance(scale: Any, stages: int) -> None:
    """Check that a guidance scale is a finite number, or one a stage.

    Raises:
        ValueError: it isn't.
    """
    listed = list(scale) if isinstance(scale, list | tuple) else [scale] * stages
    for one in listed:
        if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one):
            raise ValueError(f"guidance_scale must be a number, or one a stage; got {scale!r}")
    if len(listed) != stages:
        raise ValueError(f"guidance_scale {scale!r} must be one number, or {stages} (one a stage)")


def per_stage(value: Any, stages: int) -> list[float]:
    """Return one number a stage of one for all, or of a list."""
    return list(value) if isinstance(value, list | tuple) else [value] * stages


def check_generator(generator: Any, images: int) -> None:
    """Check that there is one generator for all images, one an image, or none.

    Raises:
        ValueError: there are more or fewer, or one is something else.
    """
    several = isinstance(generator, list | tuple)
    for one in generator if several else [generator]:
        if not isinstance(one, torch.Generator) and (several or one is not None):
            raise ValueError(f"generator must be a torch.Generator or a list of them; got {type(one).__name__}")
    if several and len(generator) != images:
        raise ValueError(f"{len(generator)} generators for {images} images: give one for all, or one an image")


def check_choices(solver: Any, output_type: Any) -> None:
    """Check the settings of which there are a few.

    Raises:
        ValueError: one is none of its choices.
    """
    for name, value, choices in (("solver", solver, get_args(SolverKind)), ("output_type", output_type, OUTPUT_TYPES)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def seeds_of(generator: Any, images: int) -> list[int] | None:
    """Return the seed of each image's generator; None without generators."""
    if generator is None:
        return None
    generators = list(generator) if isinstance(generator, list | tuple) else [generator] * images
    return [one.initial_seed() for one in generators]
