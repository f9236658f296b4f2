"""What the data hands to the model: one step is a list of micro-batches, each of one stage."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """n samples of one stage, this rank's slice.

    Attributes:
        step: number of the global batch, from 0.
        stage: 0..K-1.
        images: uint8 ``(n, 3, H, W)`` at the stage's resolution (at the finest one for a pooled latent pyramid).
        captions: n prompts.
        ids: n names, for messages and tests.
        places: n positions in the global batch, which fix each sample's chance.
        damaged: what was wrong with the samples that others stand in for, one message each.
    """

    step: int
    stage: int
    images: Tensor
    captions: list[str]
    ids: list[str]
    places: list[int]
    damaged: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MicroBatch":
        """The same with its images on ``device``."""
        return replace(self, images=self.images.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "MicroBatch":
        """The same with its images in page-locked memory, for the DataLoader."""
        return replace(self, images=self.images.pin_memory())


def pixels(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float [-1, 1]."""
    return images.float() / 127.5 - 1
