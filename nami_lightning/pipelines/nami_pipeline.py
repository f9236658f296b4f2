"""NamiPipeline: images from prompts, as a diffusers pipeline that saves and loads with all its parts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from nami_lightning.models import flow
from nami_lightning.models.autoencoder import Autoencoder, autoencoder_factor, decode_latents
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.flow import SolverKind
from nami_lightning.models.text_encoder import PromptEncoder, TextSettings, TextStates
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.checks import (
    DECODING,
    NonFiniteImages,
    check_choices,
    check_count,
    check_embeds,
    check_generator,
    check_guidance,
    check_latents,
    check_prompts,
    check_size,
    check_steps,
    find_non_finite,
    finite_rows,
    seeds_of,
)
from nami_lightning.pipelines.lora import NamiLoraLoaderMixin

StepCallback = Callable[["NamiPipeline", int, float, dict[str, Any]], dict[str, Any] | None]


@dataclass
class NamiPipelineOutput(BaseOutput):
    """Holds ``images``: PIL images, an array ``(B, H, W, 3)`` in [0, 1], or a tensor, by ``output_type``."""

    images: list[Image.Image] | np.ndarray | Tensor


class NamiPipeline(DiffusionPipeline, NamiLoraLoaderMixin):
    """Generates images from text, in stages of rising resolution.

    Args:
        transformer: the velocity field of all stages.
        bridge: the windows and the fitted bridges.
        vae: ``AutoencoderKL``, or ``PixelCodec`` for a model of pixels.
        text_encoder_2: encoder of the token sequence (FLUX's names: T5 is the second encoder); None: calls give
            ``prompt_embeds``.
        tokenizer_2: its tokenizer.
        text_encoder: encoder of the pooled state, a CLIP say; None: it is made of the token states.
        tokenizer: its tokenizer.
        resolution: px of the finest stage, the default size of images.
        max_sequence_length: tokens a prompt; this and the following are :class:`TextSettings`.
        pooled_max_length: tokens a prompt for the pooled state.
        attention_mask: hide the padding from the encoder of the sequence.
        zero_padding: set the states of padding to zero.
        pooling: how the pooled state is made.

    Raises:
        ValueError: parts of different numbers of stages.
    """

    # The order of use. The bridge is small, and runs between calls of the transformer: it stays where they compute.
    model_cpu_offload_seq = "text_encoder_2->text_encoder->transformer->vae"
    _exclude_from_cpu_offload = ["bridge"]
    _optional_components = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]

    def __init__(
        self,
        transformer: NamiTransformer2DModel,
        bridge: BridgeFlow,
        vae: Autoencoder,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        resolution: int = 1024,
        max_sequence_length: int = 256,
        pooled_max_length: int | None = None,
        attention_mask: bool = True,
        zero_padding: bool = True,
        pooling: str | None = None,  # diffusers can't check a Literal
    ) -> None:
        super().__init__()
        if transformer.num_stages != bridge.num_stages:
            raise ValueError(f"transformer has {transformer.num_stages} stages, bridge {bridge.num_stages}")
        self.register_modules(
            transformer=transformer,
            bridge=bridge,
            vae=vae,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            resolution=resolution,
            max_sequence_length=max_sequence_length,
            pooled_max_length=pooled_max_length,
            attention_mask=attention_mask,
            zero_padding=zero_padding,
            pooling=pooling,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self._multiple)

    def register_to_config(self, **kwargs: Any) -> None:
        """Note settings and parts for ``model_index.json``, as diffusers does; see :func:`_by_package`."""
        super().register_to_config(**_by_package(kwargs))

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read ``model_index.json``, as diffusers does; see :func:`_by_package`."""
        config = super().load_config(*args, **kwargs)
        return (_by_package(config[0]), *config[1:]) if isinstance(config, tuple) else _by_package(config)

    @property
    def text_settings(self) -> TextSettings:
        """How text states are made of the encoders' outputs."""
        config = self.config
        return TextSettings(
            max_length=config.max_sequence_length,
            pooled_max_length=config.pooled_max_length,
            attention_mask=config.attention_mask,
            zero_padding=config.zero_padding,
            pooling=config.pooling,
        )

    @property
    def _multiple(self) -> int:
        """The pixels of one token of the coarsest stage: image sides must be multiples of it."""
        coarsest = 2 ** (self.bridge.num_stages - 1)
        return autoencoder_factor(self.vae) * self.transformer.config.patch_size * coarsest

    def encode_prompt(self, prompt: str | Sequence[str]) -> TextStates:
        """Return the token states and pooled states of one or several prompts, one row a prompt.

        Raises:
            ValueError: no prompt, or one that is not a string.
        """
        check_prompts("prompt", prompt)
        encoder = PromptEncoder(
            self.text_encoder_2,
            self.tokenizer_2,
            self.text_encoder,
            self.tokenizer,
            self.text_settings,
            device=self._execution_device,
        )
        return encoder([prompt] if isinstance(prompt, str) else prompt)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | Sequence[int] = 10,
        guidance_scale: float = 3.5,
        solver: SolverKind = "euler",
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> Any:
        """Generate images; return a :class:`NamiPipelineOutput`, or a tuple of the images.

        Args:
            prompt: one or several; or give ``prompt_embeds`` and ``pooled_prompt_embeds``.
            negative_prompt: what guidance leads away from; one for all or one a prompt. None: the empty prompt.
            height: px, a multiple of the coarsest stage's token; the model's resolution if None.
            width: likewise.
            num_inference_steps: steps a stage: one number for all stages, or one a stage, coarsest first.
            guidance_scale: classifier-free guidance; 1 or less is off, and halves the work.
            solver: ``euler``, ``heun`` (two calls a step) or ``multistep`` (second order at Euler's cost).
            num_images_per_prompt: images of each prompt.
            generator: one, or one an image. With one an image, an image does not depend on the others of its batch,
                but for the rounding of floating-point sums: at most 1 of 255 levels of a pixel in float32.
            latents: unit noise ``(B, C, H, W)`` of the coarsest stage instead of the generator's; or a list of all
                stages' noise, coarsest first.
            prompt_embeds: token states ``(prompts, tokens, width)`` instead of ``prompt``.
            pooled_prompt_embeds: pooled states ``(prompts, width)``, with ``prompt_embeds``.
            negative_prompt_embeds: the same for ``negative_prompt``; one row for all, or one a prompt.
            negative_pooled_prompt_embeds: likewise.
            output_type: ``pil``, ``np``, ``pt`` (``(B, 3, H, W)`` in [0, 1]) or ``latent``.
            return_dict: False gives a plain tuple.
            callback_on_step_end: called after each step as ``callback(pipeline, step, t, {"latents", "stage"})``;
                latents in the dictionary that it returns replace the current ones.

        Raises:
            ValueError: inputs that don't fit the model or each other, or bridges that were never fitted; nothing has
                run then.
            NonFiniteImages: images that are NaN or infinite.
        """
        # 1. What is to be drawn
        height = self.config.resolution if height is None else height
        width = self.config.resolution if width is None else width
        self.check_inputs(
            prompt,
            negative_prompt,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            solver,
            num_images_per_prompt,
            generator,
            latents,
            prompt_embeds,
            pooled_prompt_embeds,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
            output_type,
        )
        stages = self.bridge.num_stages
        steps = [num_inference_steps] * stages if isinstance(num_inference_steps, int) else list(num_inference_steps)
        generator = list(generator) if isinstance(generator, tuple) else generator

        # 2. Encode the prompts
        device = self._execution_device
        if prompt_embeds is None or pooled_prompt_embeds is None:
            assert prompt is not None
            prompt_embeds, pooled_prompt_embeds = self.encode_prompt(prompt)
        states = _repeat(TextStates(prompt_embeds.to(device), pooled_prompt_embeds.to(device)), num_images_per_prompt)
        batch = len(states.pooled)
        guided = guidance_scale > 1
        if guided:
            if negative_prompt_embeds is None or negative_pooled_prompt_embeds is None:
                negative_prompt_embeds, negative_pooled_prompt_embeds = self.encode_prompt(negative_prompt or "")
            negative = TextStates(negative_prompt_embeds.to(device), negative_pooled_prompt_embeds.to(device))
            negative = _repeat(negative, batch // len(negative.pooled))
            states = TextStates(*map(torch.cat, zip(negative, states, strict=True)))

        # 3. Noise of the coarsest stage
        dtype = self.transformer.dtype
        shapes = self._latent_shapes(batch, height, width)
        given = [latents] if isinstance(latents, Tensor) else list(latents or ())
        noises = [*given, *[None] * (stages - len(given))]

        def noise_of(stage: int) -> Tensor:
            noise = noises[stage]
            if noise is None:
                return randn_tensor(shapes[stage], generator, device, torch.float32)
            return noise.to(device, torch.float32)

        x = noise_of(0)

        # 4. Stage by stage: solve the window, then cross the bridge with fresh residual noise
        done, finite = 0, []
        with self.progress_bar(total=sum(steps)) as progress:
            for stage, window in enumerate(self.bridge.windows):
                if stage > 0:
                    x = self.bridge.start(stage, x, noise_of(stage))

                def velocity(x: Tensor, tau: float, stage: int = stage, window: flow.Window = window) -> Tensor:
                    x = torch.cat([x, x]) if guided else x
                    time = torch.full((len(x),), window.timestep(tau), device=device)
                    v = self.transformer(
                        x.to(dtype), states.sequence.to(dtype), states.pooled.to(dtype), time, stage
                    ).float()
                    if not guided:
                        return v
                    v_negative, v_positive = v.chunk(2)
                    return v_negative + guidance_scale * (v_positive - v_negative)

                tokens = x.shape[-2] * x.shape[-1] // self.transformer.config.patch_size**2
                state = None
                for tau, tau_next in pairwise(self.bridge.local_times(stage, steps[stage], tokens)):
                    state = flow.solver_step(solver, velocity, x, tau, tau_next, window.duration, state)
                    x = state.x
                    if callback_on_step_end is not None:
                        t = window.timestep(tau)
                        changed = callback_on_step_end(self, done, t, {"latents": x, "stage": stage})
                        x = (changed or {}).get("latents", x)
                    done += 1
                    progress.update()
                finite.append((f"stage {stage + 1}", finite_rows(x)))

        # 5. Decode
        images: Any = x
        if output_type != "latent":
            decoded = decode_latents(self.vae, x)
            finite.append((DECODING, finite_rows(decoded)))
            images = self.image_processor.postprocess(decoded.nan_to_num(), output_type)
        self.maybe_free_model_hooks()

        # 6. Never return what is not an image
        if origins := find_non_finite(finite):
            prompts = None if prompt is None else [prompt] if isinstance(prompt, str) else prompt
            names = prompts and [one for one in prompts for _ in range(num_images_per_prompt)]
            raise NonFiniteImages(images, origins, names, seeds_of(generator, batch))
        return NamiPipelineOutput(images=images) if return_dict else (images,)

    def _latent_shapes(self, batch: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Return the shape of each stage's latents, coarsest first, of ``batch`` images of that size in px."""
        channels, factor = self.transformer.config.in_channels, autoencoder_factor(self.vae)
        return [
            (batch, channels, height // factor >> below, width // factor >> below)
            for below in reversed(range(self.bridge.num_stages))
        ]

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        height: int,
        width: int,
        num_inference_steps: int | Sequence[int],
        guidance_scale: float,
        solver: SolverKind,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | Sequence[Tensor] | None,
        prompt_embeds: Tensor | None,
        pooled_prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        negative_pooled_prompt_embeds: Tensor | None,
        output_type: str,
    ) -> None:
        """Check the arguments of a call, before anything runs.

        Raises:
            ValueError: one is wrong, or two don't fit together; the message names them.
        """
        if not self.bridge.fitted:
            raise ValueError(
                "the bridges of this model were never fitted: lightning run RECIPE --model.pretrained FOLDER fits them "
                "on its data, and trains on"
            )
        if prompt is None and prompt_embeds is None:
            raise ValueError("give either a prompt or prompt_embeds")
        check_guidance(guidance_scale)
        to_encode = prompt is not None or (guidance_scale > 1 and negative_prompt_embeds is None)
        if to_encode and self.text_encoder_2 is None:
            raise ValueError(
                "this pipeline has no text encoder: give prompt_embeds and pooled_prompt_embeds, and with a "
                "guidance_scale above 1 negative_prompt_embeds and negative_pooled_prompt_embeds"
            )
        config = self.transformer.config
        prompts = {}
        for name, texts, embeds, pooled in (
            ("prompt", prompt, prompt_embeds, pooled_prompt_embeds),
            ("negative_prompt", negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds),
        ):
            if embeds is not None or pooled is not None:
                if texts is not None:
                    raise ValueError(f"give either a {name} or {name}_embeds, not both")
                check_embeds(name, embeds, pooled, config.joint_attention_dim, config.pooled_projection_dim)
                prompts[name] = len(embeds)  # type: ignore[arg-type]
            elif texts is not None:
                check_prompts(name, texts)
                prompts[name] = 1 if isinstance(texts, str) else len(texts)
        rows = prompts["prompt"]
        if prompts.get("negative_prompt", 1) not in (1, rows):
            raise ValueError(
                f"{prompts['negative_prompt']} negative prompts for {rows} prompts: give one, or one a prompt"
            )
        check_count("num_images_per_prompt", num_images_per_prompt)
        check_generator(generator, rows * num_images_per_prompt)
        check_size(height, width, self._multiple)
        check_steps(num_inference_steps, self.bridge.num_stages)
        check_choices(solver, output_type)
        check_latents(latents, self._latent_shapes(rows * num_images_per_prompt, height, width))
        for stage in range(1, self.bridge.num_stages):
            self.bridge.check_size(stage, *self._latent_shapes(1, height, width)[stage][2:])


def _repeat(states: TextStates, times: int) -> TextStates:
    """Repeat each row ``times`` times."""
    return TextStates(*(field.repeat_interleave(times, 0) for field in states))


def _by_package(config: dict[str, Any]) -> dict[str, Any]:
    """Return a pipeline's config that names a package as the home of our parts, not a file in it, which may move."""

    def is_ours(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) == 2 and str(value[0]).startswith("nami_lightning.")

    return {name: ("nami_lightning.models", value[1]) if is_ours(value) else value for name, value in config.items()}
