"""Representation alignment: tokens inside the network learn to predict the features of a frozen image encoder.

"Representation Alignment for Generation" (REPA; Yu and others, 2025): the loss is minus the mean cosine similarity of
projected tokens and the encoder's patches. iREPA (Singh and others, 2025) projects by a convolution and takes a share
of each image's mean off its patches.

A NAMI's coarse stages run few blocks, so the tokens are those after a block that every stage runs.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nami_lightning.models.autoencoder import AutoencoderConfig
from nami_lightning.models.image_features import ImageEncoder
from nami_lightning.models.transformer import BlockHook, Rotary
from nami_lightning.training.techniques.technique import ForwardPass, Technique

Projector = Literal["convolution", "perceptron"]


class RepresentationAlignment(Technique):
    """Adds ``weight * (1 - cosine similarity)`` of projected tokens and the features of a frozen image encoder.

    The encoder sees the images at the resolution of their stage, scaled up to its own; it needs images, which data sets
    of latents alone lack. Its features are averaged to the stage's tokens, or interpolated where these are more.

    Args:
        encoder: gives a map of features: see :mod:`nami_lightning.models.image_features`.
        weight: of the added loss.
        depth: number of blocks before the tokens that are projected; null: all blocks of the coarsest stage.
        projector: a 3x3 ``convolution`` (iREPA), or REPA's ``perceptron`` of three layers on each token.
        centring: share of its mean that is taken off each image's features, in [0, 1]; iREPA's 1, REPA's 0.
        cache: remember the features of each image in the host's memory: for small data sets, whose images are always
            cropped alike and never mirrored.
        end_step: alignment is off from this step on; null: never.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        weight: float = 0.5,
        depth: int | None = None,
        projector: Projector = "convolution",
        centring: float = 0.8,
        cache: bool = False,
        end_step: int | None = None,
    ) -> None:
        super().__init__(end_step)
        if not weight > 0 or not 0 <= centring <= 1 or projector not in ("convolution", "perceptron"):
            raise ValueError(
                "RepresentationAlignment needs a weight above 0, a centring in [0, 1], and convolution or perceptron "
                f"as projector; got {weight}, {centring} and {projector}"
            )
        self.encoder = (encoder,)  # in a tuple it is no submodule: frozen, and in no checkpoint
        self.weight, self.depth, self.projector_kind, self.centring = weight, depth, projector, centring
        self.known: dict[tuple[str, int], Tensor] | None = {} if cache else None

    def prepare(self, config: Mapping[str, Any], autoencoder: AutoencoderConfig) -> None:
        """Refuse a depth that the coarsest stage does not reach."""
        super().prepare(config, autoencoder)
        deepest = self.blocks(0)
        self.depth = deepest if self.depth is None else self.depth
        if not 1 <= self.depth <= deepest:
            raise ValueError(
                f"RepresentationAlignment.depth must be 1 to {deepest}, the blocks of every stage; got {self.depth}"
            )
        self.reads_after = self.depth

    def build(self) -> None:
        """Make the projector."""
        width, features = self._width, self.encoder[0].num_features
        self.projector: nn.Module
        if self.projector_kind == "convolution":
            self.projector = nn.Conv2d(width, features, 3, padding=1)
        else:
            sizes = (width, width, width, features)
            layers: list[nn.Module] = [nn.Conv2d(*pair, 1) for pair in pairwise(sizes)]
            self.projector = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])

    @property
    def _width(self) -> int:
        return int(self.config["num_attention_heads"] * self.config["attention_head_dim"])

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Project tokens ``(n, N, width)`` on a grid to features ``(n, D, rows, columns)``."""
        projected: Tensor = self.projector(tokens.transpose(1, 2).unflatten(2, grid))
        return projected

    def block_hook(self, forward: ForwardPass) -> BlockHook:
        """Return the hook that notes the tokens."""

        def note(block: int, tokens: Tensor, rotary: Rotary) -> tuple[Tensor, Rotary]:
            if block == self.depth:
                forward.tokens[block] = tokens
            return tokens, rotary

        return note

    def loss(self, forward: ForwardPass) -> Tensor:
        """Return the weighted distance of projected tokens and features; see the top of this file."""
        assert self.depth is not None
        grid = self.grid(forward)
        target = _resized(self._features(forward), grid)
        target = target - self.centring * target.mean((2, 3), keepdim=True)
        projected = self(forward.tokens[self.depth], grid).float()
        return self.weight * (1 - F.cosine_similarity(projected, target, dim=1).mean())

    def _features(self, forward: ForwardPass) -> Tensor:
        """Return the encoder's features ``(n, D, h, w)`` of a pass's images, computed or remembered."""
        micro = forward.micro
        if not micro.images.numel():
            raise ValueError(
                "RepresentationAlignment needs images, and this data set holds latents alone: prepare it with images"
            )
        if self.known is None:
            return self._encode(micro.images)
        missing = [i for i, name in enumerate(micro.ids) if (name, micro.stage) not in self.known]
        if missing:
            for i, features in zip(missing, self._encode(micro.images[missing]).half().cpu(), strict=True):
                self.known[micro.ids[i], micro.stage] = features
        rows = [self.known[name, micro.stage] for name in micro.ids]
        return torch.stack(rows).to(forward.x.device).float()

    def _encode(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder[0].to(images.device)(images)
        return features.float()

    def extra_flops(self, stage: int, tokens: int) -> tuple[int, int]:
        """Return the operations of the projector; those of the frozen encoder are encoding, and not counted here."""
        width, features = self._width, self.encoder[0].num_features
        weights = 9 * width * features if self.projector_kind == "convolution" else width * (2 * width + features)
        forward = 2 * tokens * weights
        return forward, 2 * forward


def _resized(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average a map of features to a smaller grid, or interpolate it to a larger one."""
    if grid[0] <= features.shape[2] and grid[1] <= features.shape[3]:
        return F.adaptive_avg_pool2d(features, grid)
    return F.interpolate(features, size=grid, mode="bilinear")
