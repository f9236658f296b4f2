"""Encode images to latents and decode latents to images, with a frozen autoencoder of diffusers or none (pixels).

An autoencoder goes by Hugging Face name or local folder. It is never trained, never in a checkpoint, and loaded only
when something is to be encoded or decoded.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from nami_lightning.models.float32_model import Float32Model

PIXELS = "pixels"
"""The name of :class:`PixelCodec` where an autoencoder's is asked for."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Names the autoencoder that makes the latents.

    Args:
        name: Hugging Face name or folder of a diffusers ``AutoencoderKL``, or ``pixels`` for none.
        subfolder: where in it the autoencoder lies (``vae`` in a pipeline's repository); null for its root.
        factor: pixels a latent's side; 8 for FLUX's autoencoder, 1 for pixels.
        dtype: of its weights: ``float32``, ``bfloat16`` or ``float16``.
        scaling_factor: ``pixels`` alone: latents are ``(pixels - shift_factor) * scaling_factor``.
        shift_factor: ``pixels`` alone, see above.
    """

    name: str = PIXELS
    subfolder: str | None = None
    factor: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    scaling_factor: float = 1.0
    shift_factor: float = 0.0


class PixelCodec(Float32Model, ConfigMixin):
    """Takes pixels as latents: no autoencoder, with ``AutoencoderKL``'s interface.

    It stays float32 in half precision: bfloat16 has too few bits for a pixel.
    """

    _keep_in_fp32_modules = ["anchor"]

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0, shift_factor: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(()))

    def encode(self, images: Tensor) -> AutoencoderKLOutput:
        """Return images as a distribution without variance."""
        parameters = torch.cat([images, torch.zeros_like(images)], 1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters, deterministic=True))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Return latents as they are."""
        return DecoderOutput(sample=latents)


Autoencoder: TypeAlias = AutoencoderKL | PixelCodec


def load_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """Load the autoencoder that ``config`` names, frozen.

    Raises:
        FileNotFoundError: a name that can be neither found nor fetched.
        ValueError: it reduces by another factor than ``config`` says.
    """
    if config.name == PIXELS:
        return PixelCodec(config.scaling_factor, config.shift_factor)
    dtype = getattr(torch, config.dtype)
    try:
        vae = AutoencoderKL.from_pretrained(config.name, subfolder=config.subfolder, torch_dtype=dtype)
    except OSError as error:
        raise FileNotFoundError(f"autoencoder {config.name} can't be loaded: {str(error).splitlines()[0]}") from error
    if (factor := autoencoder_factor(vae)) != config.factor:
        raise ValueError(
            f"autoencoder {config.name} reduces by {factor}, but the recipe's autoencoder.factor is {config.factor}"
        )
    return vae.eval().requires_grad_(False)


def autoencoder_factor(vae: Autoencoder) -> int:
    """Return the pixels along the side of one latent."""
    return 1 if isinstance(vae, PixelCodec) else 2 ** (len(vae.config.block_out_channels) - 1)


class Posterior(NamedTuple):
    """The distribution of images' normalised latents: its ``mean`` and ``std``, ``(B, C, H, W)``.

    Attributes:
        mean: of the latents.
        std: of the latents; None: they have no variance (pixels).
    """

    mean: Tensor
    std: Tensor | None = None

    def sample(self, noise: Tensor | None) -> Tensor:
        """Return latents from standard normal ``noise`` of their shape; None: their mean."""
        return self.mean if self.std is None or noise is None else self.mean + self.std * noise


@torch.no_grad()
def encode_posterior(vae: Autoencoder, images: Tensor) -> Posterior:
    """Encode images ``(B, 3, H, W)`` in [-1, 1] to the distribution of their normalised latents, float32.

    The autoencoder computes in its own dtype, also under autocast.
    """
    with torch.autocast(images.device.type, enabled=False):
        posterior = vae.encode(images.to(vae.dtype)).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    std = None if isinstance(vae, PixelCodec) else posterior.std.float() * scale
    return Posterior((posterior.mean.float() - shift) * scale, std)


@torch.no_grad()
def decode_latents(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Decode normalised latents to images in [-1, 1], float32; infinite values become NaN.

    The autoencoder computes in its own dtype, also under autocast.
    """
    latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    with torch.autocast(latents.device.type, enabled=False):
        images = vae.decode(latents.to(vae.dtype)).sample.float()
    return images.clamp(-1, 1).where(images.isfinite(), torch.nan)
