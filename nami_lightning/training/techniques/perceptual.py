"""A perceptual loss: the predicted clean image should have the features of the true one, for a frozen image encoder.

The distance is LPIPS's without its learnt weights ("The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", Zhang and others, 2018, eq. 1): features of unit length at each place, the squared distance of the two images',
averaged over places and over the encoder's maps. A sample counts ``1 - tau``: not at the stage's start, where its image
is not yet determined, and in full at its end.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nami_lightning.models import flow
from nami_lightning.models.autoencoder import PIXELS, AutoencoderConfig
from nami_lightning.models.image_features import ImageEncoder
from nami_lightning.training.techniques.technique import ForwardPass, Technique


class PerceptualLoss(Technique):
    """Adds ``weight`` times the distance of the features of the predicted and of the true image.

    It needs a model of pixels: latents would have to be decoded, with the decoder's gradient.

    Args:
        encoder: gives maps of features: see :mod:`nami_lightning.models.image_features`.
        weight: of the added loss.
        stages: numbers of the stages that have it, 1 being the coarsest; null: the finest, which ends in clean images.
            A stage before it compares the clean images that its velocities point to.
        end_step: it is off from this step on; null: never.

    Raises:
        ValueError: the weight is not above 0.
    """

    def __init__(
        self, encoder: ImageEncoder, weight: float = 0.1, stages: list[int] | None = None, end_step: int | None = None
    ) -> None:
        super().__init__(end_step)
        if not weight > 0:
            raise ValueError(f"PerceptualLoss needs a weight above 0; got {weight}")
        self.encoder = (encoder,)  # in a tuple it is no submodule: frozen, and in no checkpoint
        self.weight, self.stages = weight, stages
        self.flops: dict[int, int] = {}

    def prepare(self, config: Mapping[str, Any], autoencoder: AutoencoderConfig) -> None:
        """Refuse latents, and stages that do not exist."""
        super().prepare(config, autoencoder)
        if autoencoder.name != PIXELS:
            raise ValueError(
                f"PerceptualLoss compares images, and this model has latents of the autoencoder {autoencoder.name}: "
                f"leave it out of model.techniques, or set model.autoencoder.name to {PIXELS}"
            )
        self.stages = self.chosen_stages(self.stages)

    def loss(self, forward: ForwardPass) -> Tensor | None:
        """Return the weighted distance of a pass's images."""
        assert forward.velocity is not None
        assert self.stages is not None
        if forward.micro.stage + 1 not in self.stages:
            return None
        encoder = self.encoder[0].to(forward.x.device)
        predicted = encoder.maps(self._images(forward, forward.velocity))
        with torch.no_grad():
            true = encoder.maps(self._images(forward, forward.target))
        distances = [_distance(*pair) for pair in zip(predicted, true, strict=True)]
        return self.weight * ((1 - forward.tau) * torch.stack(distances).mean(0)).mean()

    def _images(self, forward: ForwardPass, velocity: Tensor) -> Tensor:
        """Return the clean images, from 0 to 1, that velocities point to."""
        latents = flow.clean_estimate(forward.x, velocity, forward.tau, forward.window)
        pixels = latents / self.autoencoder.scaling_factor + self.autoencoder.shift_factor
        return (pixels + 1) / 2

    def extra_flops(self, stage: int, tokens: int) -> tuple[int, int]:
        """Return the operations of the encoder: of two images forward, and of one backward to the image."""
        assert self.stages is not None
        if stage + 1 not in self.stages:
            return 0, 0
        side = round(tokens**0.5) * self.config["patch_size"]
        if side not in self.flops:
            self.flops[side] = self.encoder[0].count_flops(side)
        return 2 * self.flops[side], self.flops[side]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared distance ``(n,)`` of two maps' features of unit length."""
    return (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean((1, 2))
