"""The frozen encoders of a model in training: they make latents and text states of a step's samples."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from nami_lightning.models import flow
from nami_lightning.models.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Posterior,
    decode_latents,
    encode_posterior,
    load_autoencoder,
)
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.text_encoder import (
    PromptEncoder,
    PromptTokenizer,
    PromptTokens,
    TextEncoderConfig,
    TextStates,
)
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.training import rng
from nami_lightning.training.batch import MicroBatch, pixels
from nami_lightning.training.strategies import shard_text_encoder

LatentPyramid = Literal["encode", "pool"]
T = TypeVar("T")


class EncodingModule(L.LightningModule):
    """A LightningModule with frozen encoders. They are not submodules, so neither trained nor in the checkpoint.

    Args:
        text_encoder: which models encode prompts.
        autoencoder: which model makes latents.
        text_dims: widths of the text states and of the pooled state that the network takes.
        latent_pyramid: ``encode`` the image at each stage's resolution, or ``pool`` the finest latents.
        num_stages: K.
        seed: of the latents that are sampled from the autoencoder's posterior.
    """

    def __init__(
        self,
        text_encoder: TextEncoderConfig,
        autoencoder: AutoencoderConfig,
        text_dims: tuple[int, int],
        latent_pyramid: LatentPyramid,
        num_stages: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.text_encoder_config, self.autoencoder_config = text_encoder, autoencoder
        self.text_dims, self.latent_pyramid = text_dims, latent_pyramid
        self.num_stages, self.seed = num_stages, seed

    @property
    def _strategy(self) -> Strategy | None:
        """Lightning's strategy, in a run; otherwise None."""
        return None if self._trainer is None else self._trainer.strategy

    @cached_property
    def text_encoder(self) -> PromptEncoder:
        """The text encoder, loaded at its first use; see :meth:`load_text_encoder`."""
        return _without_attribute_errors(self.load_text_encoder)

    def load_text_encoder(self) -> PromptEncoder:
        """Load the text encoder.

        Raises:
            FileNotFoundError: it can be neither found nor fetched.
            ValueError: its widths are not those that the transformer takes, or the strategy can't shard it.
        """
        encoder = PromptEncoder.load(self.text_encoder_config)
        shard_text_encoder(encoder, self._strategy)
        encoder.to(self.device)
        if encoder.dims != self.text_dims:
            raise ValueError(
                f"model.text_encoder gives states {encoder.dims[0]} wide and pooled states {encoder.dims[1]} wide, but "
                f"model.transformer's joint_attention_dim and pooled_projection_dim are {self.text_dims[0]} and "
                f"{self.text_dims[1]}"
            )
        return encoder

    @property
    def prompt_tokenizer(self) -> PromptTokenizer | None:
        """Tokenizes captions for processes that read data; None where encodings of prompts are remembered."""
        return None if self.text_encoder_config.cache else PromptTokenizer(self.text_encoder_config)

    @cached_property
    def _empty_prompt(self) -> TextStates:
        return self.text_encoder([""])

    @cached_property
    def vae(self) -> Autoencoder:
        """The autoencoder, loaded at its first use."""
        return _without_attribute_errors(lambda: load_autoencoder(self.autoencoder_config).to(self.device))

    def latents(self, micro: MicroBatch, seed_key: int | str) -> tuple[Tensor, Tensor]:
        """Return clean latents of the micro-batch at its stage and at the one before it (which stage 0 does not use).

        Args:
            micro: n samples of one stage.
            seed_key: number of the global batch, or a word: see :func:`nami_lightning.training.rng.sample`.
        """
        fine, coarse = self._posteriors(micro)
        latents = self._sample(fine, micro, seed_key, "latents")
        if self.latent_pyramid == "pool":
            levels = flow.pyramid(latents, self.num_stages)
            return levels[micro.stage], levels[max(micro.stage - 1, 0)]
        return latents, latents if coarse is None else self._sample(coarse, micro, seed_key, "coarse latents")

    @torch.no_grad()
    def images(self, micro: MicroBatch) -> Tensor:
        """Return the micro-batch's images, uint8 ``(n, 3, H, W)``; decoded latents where no images are stored."""
        if micro.encodings is None or micro.encodings.latents is None or micro.images.numel():
            return micro.images
        decoded = decode_latents(self.vae, micro.encodings.latents.mean.float())
        return ((decoded + 1) * 127.5).round().byte()

    def _posteriors(self, micro: MicroBatch) -> tuple[Posterior, Posterior | None]:
        """Return the posterior of the stage's images, and of those at half their resolution if it is needed."""
        if micro.encodings is not None and micro.encodings.latents is not None:
            return micro.encodings.latents, micro.encodings.coarse_latents
        images = pixels(micro.images)
        alone = self.latent_pyramid == "pool" or micro.stage == 0
        return encode_posterior(self.vae, images), None if alone else encode_posterior(self.vae, flow.pool(images))

    def _sample(self, posterior: Posterior, micro: MicroBatch, seed_key: int | str, purpose: str) -> Tensor:
        mean, std = posterior
        if std is None:
            return mean.float()
        noise = rng.sample_normal(self.seed, seed_key, micro.global_indices, purpose, mean.shape[1:], self.device)
        return Posterior(mean.float(), std.float()).sample(noise)

    def text_states(self, micro: MicroBatch, drop: Tensor) -> TextStates:
        """Return text states of the captions; where ``drop`` (bool, ``(n,)``) is set, those of the empty prompt."""
        if micro.encodings is None:
            return self.encode_prompts(micro.captions, drop, micro.tokens)
        text, empty = (TextStates(*map(Tensor.float, states)) for states in micro.encodings[2:])
        return text.replaced(drop, empty)

    def empty_prompt_states(self, micro: MicroBatch) -> TextStates:
        """Return one row, the text states of the empty prompt, padded as those of the micro-batch."""
        if micro.encodings is None:
            return self._empty_prompt
        return TextStates(*map(Tensor.float, micro.encodings.empty_prompt))

    def encode_prompts(
        self, prompts: list[str], drop: Tensor | None = None, tokens: PromptTokens | None = None
    ) -> TextStates:
        """Return text states of ``prompts``; where ``drop`` (bool, ``(n,)``) is set, those of the empty prompt.

        ``tokens`` are those of the prompts, if they are tokenized already.
        """
        states = self.text_encoder(prompts) if tokens is None else self.text_encoder.encode(tokens)
        return states if drop is None else states.replaced(drop, self._empty_prompt)

    def assemble_pipeline(
        self, transformer: NamiTransformer2DModel, bridge: BridgeFlow, resolution: int, sampler: dict[str, Any]
    ) -> NamiPipeline:
        """Return a pipeline of a network, its bridges and the frozen encoders; all are shared, not copied.

        Args:
            transformer: the network.
            bridge: its bridges.
            resolution: px of the finest stage.
            sampler: the pipeline's defaults of how it samples, by the names of its arguments.
        """
        text = self.text_encoder
        pipeline = NamiPipeline(
            transformer=transformer,
            bridge=bridge,
            vae=self.vae,
            text_encoder_2=text.sequence,
            tokenizer_2=text.sequence_tokenizer,
            text_encoder=text.pooled,
            tokenizer=text.pooled_tokenizer,
            resolution=resolution,
            max_sequence_length=text.settings.max_length,
            pooled_max_length=text.settings.pooled_max_length,
            attention_mask=text.settings.attention_mask,
            zero_padding=text.settings.zero_padding,
            pooling=text.settings.pooling,
            **sampler,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _without_attribute_errors(load: Callable[[], T]) -> T:
    """Load what a property holds, with an AttributeError turned into another error.

    torch takes an AttributeError inside a module's property for a missing property, and hides its message.
    """
    try:
        return load()
    except AttributeError as error:
        raise RuntimeError(f"a frozen encoder can't be loaded: {error}") from error
