"""What the data reads from the module that is trained.

The DataModule needs no base class of its module: any LightningModule that has the attributes of a protocol below is
accepted where that protocol is asked for.
"""

from typing import Any, Protocol, runtime_checkable

import torch

from nami_lightning.models.autoencoder import Autoencoder, AutoencoderConfig
from nami_lightning.models.text_encoder import PromptEncoder, PromptTokenizer, TextEncoderConfig


@runtime_checkable
class CountsSteps(Protocol):
    """A module that counts its training steps; training reads its next batch by this number.

    Attributes:
        step: the number of global batches that the module has consumed, skipped ones included. It is in the checkpoint.
    """

    step: int


@runtime_checkable
class TokenizesPrompts(Protocol):
    """A module that encodes captions in its steps, and lets the processes that read the data tokenize them before.

    Attributes:
        prompt_tokenizer: does so; None where it is not needed.
    """

    @property
    def prompt_tokenizer(self) -> PromptTokenizer | None: ...


@runtime_checkable
class ShowsConfigs(Protocol):
    """A module that shows the configs of its models, so that the data can be checked against them.

    Attributes:
        transformer_config: the network's config, with ``patch_size``, ``in_channels``, ``joint_attention_dim`` and
            ``pooled_projection_dim``.
        text_encoder_config: which models encode prompts.
        autoencoder_config: which model makes latents.
    """

    transformer_config: dict[str, Any]
    text_encoder_config: TextEncoderConfig
    autoencoder_config: AutoencoderConfig


class HasEncoders(ShowsConfigs, Protocol):
    """A module whose frozen encoders can encode a data set beforehand.

    Attributes:
        resolutions: side in px of each stage's images, coarsest first.
        latent_pyramid: ``encode`` the image at each stage's resolution, or ``pool`` the finest latents.
        device: the device on which the encoders compute.
        text_encoder: encodes prompts; loaded at its first use.
        vae: makes latents; loaded at its first use.
    """

    resolutions: list[int]

    @property
    def latent_pyramid(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def text_encoder(self) -> PromptEncoder: ...

    @property
    def vae(self) -> Autoencoder: ...
