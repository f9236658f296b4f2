"""NamiPipeline: images from prompts, as a diffusers pipeline that saves and loads with all its parts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from nami_lightning.models.autoencoder import Autoencoder, autoencoder_factor, decode_latents, encode_posterior
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.flow import SolverKind
from nami_lightning.models.text_encoder import PromptEncoder, TextSettings, TextStates
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.checks import (
    CHECKED,
    DECODING,
    NonFiniteImages,
    check_call,
    check_prompts,
    find_non_finite,
    finite_rows,
    per_stage,
    seeds_of,
)
from nami_lightning.pipelines.lora import NamiLoraLoaderMixin
from nami_lightning.pipelines.stages import Reference, StageSampler, StepCallback, share_steps


@dataclass
class NamiPipelineOutput(BaseOutput):
    """What a call returns.

    Attributes:
        images: PIL images, an array ``(B, H, W, 3)`` in [0, 1], or a tensor, by ``output_type``.
        stages: the same for each stage that ran, coarsest first, if ``output_stages`` asked for them.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    stages: list[Any] | None = None


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
        num_inference_steps: solver steps of each stage, the default of calls; None: 10 a stage.
        guidance_scale: one number, or one a stage, the default of calls.
        solver: the default of calls.

    Raises:
        ValueError: parts of different numbers of stages.
    """

    _callback_tensor_inputs = ["latents", "clean_latents", "prompt_embeds", "pooled_prompt_embeds"]
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
        num_inference_steps: list[int] | None = None,
        guidance_scale: float | list[float] = 3.5,
        solver: str = "euler",
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
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            solver=solver,
        )
        self.stage, self.interrupt = 0, False
        self.current_timestep: Tensor | None = None
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

    def encode_prompt(self, prompt: str | Sequence[str], max_sequence_length: int | None = None) -> TextStates:
        """Return the token states and pooled states of one or several prompts, one row a prompt.

        Args:
            prompt: one or several.
            max_sequence_length: tokens a prompt; None: as the model was trained.

        Raises:
            ValueError: no prompt, or one that is not a string.
        """
        check_prompts("prompt", prompt)
        settings = self.text_settings
        if max_sequence_length is not None:
            settings = replace(settings, max_length=max_sequence_length)
        encoder = PromptEncoder(
            self.text_encoder_2,
            self.tokenizer_2,
            self.text_encoder,
            self.tokenizer,
            settings,
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
        num_inference_steps: int | Sequence[int] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        solver: SolverKind | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 1.0,
        entry_stage: int = 0,
        keep_detail: bool = False,
        output_type: str = "pil",
        output_stages: bool = False,
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
    ) -> Any:
        """Generate images; return a :class:`NamiPipelineOutput`, or a tuple of its fields.

        Args:
            prompt: one or several; or give ``prompt_embeds`` and ``pooled_prompt_embeds``.
            negative_prompt: what guidance leads away from; one for all or one a prompt. None: the empty prompt.
            height: px, a multiple of the coarsest stage's token; the model's resolution if None.
            width: likewise.
            num_inference_steps: solver steps: their total, shared out over the stages as the model's own default
                says, or a list with one number a stage, coarsest first. None: the model's default.
            guidance_scale: classifier-free guidance, one number or one a stage; 1 or less is off, and halves the work.
                None: the model's default.
            solver: ``euler``, ``heun`` (two calls a step) or ``multistep`` (second order at Euler's cost). None: the
                model's default.
            num_images_per_prompt: images of each prompt.
            generator: one, or one an image. With one an image, an image does not depend on the others of its batch,
                but for the rounding of floating-point sums: at most 1 of 255 levels of a pixel in float32.
            latents: unit noise ``(B, C, H, W)`` of the coarsest stage instead of the generator's; or a list of all
                stages' noise, coarsest first.
            prompt_embeds: token states ``(prompts, tokens, width)`` instead of ``prompt``.
            pooled_prompt_embeds: pooled states ``(prompts, width)``, with ``prompt_embeds``.
            negative_prompt_embeds: the same for ``negative_prompt``; one row for all, or one a prompt.
            negative_pooled_prompt_embeds: likewise.
            image: an image to draw anew, as diffusers' image processor takes it, or one an image of the batch; it is
                resized to ``height`` and ``width``. None: all is drawn from noise.
            strength: of drawing ``image`` anew: the share of the solver steps from ``entry_stage`` on that run.
            entry_stage: the first stage that runs on ``image``: 0 may change its layout, a finer one keeps the layout
                and draws the detail anew.
            keep_detail: the reverse: the layout of ``image`` is drawn anew, the finer stages take its detail.
            output_type: ``pil``, ``np``, ``pt`` (``(B, 3, H, W)`` in [0, 1]) or ``latent``.
            output_stages: return each stage's images too: its estimate of the clean image at its resolution.
            return_dict: False gives a plain tuple.
            joint_attention_kwargs: for the attention of every block; of these ``scale`` multiplies the LoRAs.
            callback_on_step_end: called after each step as ``callback(pipeline, step, timestep, tensors)``, timestep
                being 1000 at noise; what it returns of ``latents``, ``prompt_embeds`` and ``pooled_prompt_embeds``
                replaces the current ones. :attr:`stage` tells the stage. Setting :attr:`interrupt` ends the loop: the
                images are then those latents, at that stage's resolution.
            callback_on_step_end_tensor_inputs: names of the tensors that it gets, of ``latents``, ``clean_latents``
                (the current estimate of the end), ``prompt_embeds`` and ``pooled_prompt_embeds``.
            max_sequence_length: tokens a prompt; None: as the model was trained.

        Raises:
            ValueError: inputs that don't fit the model or each other, or bridges that were never fitted; nothing has
                run then.
            NonFiniteImages: images that are NaN or infinite.
        """
        # 1. What is to be drawn
        stages = self.bridge.num_stages
        height = self.config.resolution if height is None else height
        width = self.config.resolution if width is None else width
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        solver = self.config.solver if solver is None else solver
        default_steps = self.config.num_inference_steps or [10] * stages
        num_inference_steps = default_steps if num_inference_steps is None else num_inference_steps
        self.check_inputs(**{name: value for name, value in locals().items() if name in CHECKED})
        guidance = per_stage(guidance_scale, stages)
        steps = share_steps(num_inference_steps, default_steps)
        self._guidance_scale, self._joint_attention_kwargs = guidance_scale, joint_attention_kwargs
        self.interrupt, self._num_timesteps = False, sum(steps)

        # 2. Encode the prompts
        device = self._execution_device
        if prompt_embeds is None or pooled_prompt_embeds is None:
            assert prompt is not None
            prompt_embeds, pooled_prompt_embeds = self.encode_prompt(prompt, max_sequence_length)
        states = _repeat(TextStates(prompt_embeds.to(device), pooled_prompt_embeds.to(device)), num_images_per_prompt)
        batch = len(states.pooled)
        negative = None
        if self.do_classifier_free_guidance:
            if negative_prompt_embeds is None or negative_pooled_prompt_embeds is None:
                negative_prompt_embeds, negative_pooled_prompt_embeds = self.encode_prompt(
                    negative_prompt or "", max_sequence_length
                )
            negative = TextStates(negative_prompt_embeds.to(device), negative_pooled_prompt_embeds.to(device))
            negative = _repeat(negative, batch // len(negative.pooled))

        # 3. Noise of the stages, and the image to start from
        shapes = self._latent_shapes(batch, height, width)
        given = [latents] if isinstance(latents, Tensor) else list(latents or ())
        generator = list(generator) if isinstance(generator, tuple) else generator

        @cache
        def noise_of(stage: int) -> Tensor:
            if stage < len(given):
                return given[stage].to(device, torch.float32)
            return randn_tensor(shapes[stage], generator, device, torch.float32)

        reference = None
        if image is not None:
            reference = Reference(self.encode_image(image, height, width, batch), entry_stage, strength, keep_detail)

        # 4. Stage by stage: solve the window, then cross the bridge with fresh residual noise
        sampler = StageSampler(
            self,
            states,
            negative,
            steps,
            guidance,
            solver,
            noise_of,
            reference,
            joint_attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            output_stages,
        )
        x = sampler()

        # 5. Decode
        images, finite = self._decode(x, output_type)
        all_stages = [self._decode(latents, output_type)[0] for latents in sampler.stages] if output_stages else None
        self.maybe_free_model_hooks()

        # 6. Never return what is not an image
        if origins := find_non_finite([*sampler.finite, (DECODING, finite)]):
            prompts = None if prompt is None else [prompt] if isinstance(prompt, str) else prompt
            names = prompts and [one for one in prompts for _ in range(num_images_per_prompt)]
            raise NonFiniteImages(images, origins, names, seeds_of(generator, batch))
        if not return_dict:
            return (images, all_stages) if output_stages else (images,)
        return NamiPipelineOutput(images=images, stages=all_stages)

    # --- around the loop -----------------------------------------------------------------------

    check_inputs = check_call

    @property
    def guidance_scale(self) -> float | Sequence[float]:
        """The guidance of the current call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current call is guided at any stage."""
        return max(per_stage(self._guidance_scale, self.bridge.num_stages)) > 1

    @property
    def joint_attention_kwargs(self) -> dict[str, Any] | None:
        """What the current call gives to the attention."""
        return self._joint_attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Solver steps of the current call, of all stages."""
        return self._num_timesteps

    def decode(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Decode latents ``(B, C, H, W)``, of any stage, to images; what is not finite becomes black."""
        return self._decode(latents, output_type)[0]

    def _decode(self, latents: Tensor, output_type: str) -> tuple[Any, Tensor]:
        """Return the images, and whether each is finite, ``(B,)``."""
        if output_type == "latent":
            return latents, finite_rows(latents)
        decoded = decode_latents(self.vae, latents)
        return self.image_processor.postprocess(decoded.nan_to_num(), output_type), finite_rows(decoded)

    def encode_image(self, image: PipelineImageInput, height: int, width: int, batch: int) -> list[Tensor]:
        """Return an image's clean latents at each stage's resolution, coarsest first, ``batch`` rows each."""
        pixels = self.image_processor.preprocess(image, height, width).to(self._execution_device, torch.float32)
        sizes = [(height >> below, width >> below) for below in reversed(range(self.bridge.num_stages))]
        resized = [F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1) for size in sizes]
        return [encode_posterior(self.vae, one).mean.expand(batch, -1, -1, -1) for one in resized]

    def _latent_shapes(self, batch: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Return the shape of each stage's latents, coarsest first, of ``batch`` images of that size in px."""
        channels, factor = self.transformer.config.in_channels, autoencoder_factor(self.vae)
        return [
            (batch, channels, height // factor >> below, width // factor >> below)
            for below in reversed(range(self.bridge.num_stages))
        ]


def _repeat(states: TextStates, times: int) -> TextStates:
    """Repeat each row ``times`` times."""
    return TextStates(*(field.repeat_interleave(times, 0) for field in states))


def _by_package(config: dict[str, Any]) -> dict[str, Any]:
    """Return a pipeline's config that names a package as the home of our parts, not a file in it, which may move."""

    def is_ours(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) == 2 and str(value[0]).startswith("nami_lightning.")

    return {name: ("nami_lightning.models", value[1]) if is_ours(value) else value for name, value in config.items()}
