"""Micro-batches: what the data hands to the model. One step is a list of them, each of one stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nami_lightning.models.autoencoder import Posterior
from nami_lightning.models.text_encoder import PromptTokens, TextStates


class Encodings(NamedTuple):
    """Precomputed latents and text states of n samples.

    Attributes:
        latents: of the micro-batch's images; None where latents are pixels, which are the images themselves.
        coarse_latents: of those images at half their resolution, if the stage and the latent pyramid need them.
        text: of the captions, padded to the length that the text encoder gives.
        empty_prompt: one row, likewise padded.
    """

    latents: Posterior | None
    coarse_latents: Posterior | None
    text: TextStates
    empty_prompt: TextStates

    def map(self, change: Callable[[Tensor], Tensor]) -> "Encodings":
        """Return the encodings with every tensor replaced by ``change`` of it."""

        def posterior(of: Posterior | None) -> Posterior | None:
            return None if of is None else Posterior(change(of.mean), None if of.std is None else change(of.std))

        return Encodings(
            posterior(self.latents),
            posterior(self.coarse_latents),
            TextStates(*map(change, self.text)),
            TextStates(*map(change, self.empty_prompt)),
        )

    @classmethod
    def joined(cls, parts: "Sequence[Encodings]") -> "Encodings":
        """Join the encodings of several micro-batches into one, in order."""

        def posterior(of: Sequence[Posterior | None]) -> Posterior | None:
            held = [part for part in of if part is not None]
            if not held:
                return None
            stds = [part.std for part in held if part.std is not None]
            return Posterior(torch.cat([part.mean for part in held]), torch.cat(stds) if stds else None)

        latents, coarse_latents, text, empty_prompt = zip(*parts, strict=True)
        states = TextStates(*(torch.cat(of) for of in zip(*text, strict=True)))
        return cls(posterior(latents), posterior(coarse_latents), states, empty_prompt[0])


@dataclass(frozen=True)
class MicroBatch:
    """n samples of one stage, this rank's slice.

    Attributes:
        step: number of the global batch, from 0.
        stage: 0..K-1.
        images: uint8 ``(n, 3, H, W)`` at the stage's resolution (at the finest one for a pooled latent pyramid);
            without pixels, ``(n, 3, 0, 0)``, where latents are stored and images are not.
        captions: n prompts.
        ids: n names of the samples, for messages and tests.
        global_indices: n indices of the samples in the global batch; each fixes its sample's random numbers.
        damaged: one message for each sample that was damaged and replaced by another one.
        encodings: precomputed latents and text states, if the data set has them.
        padding: number of samples at the end that count in no result: in a validation they repeat others, so that all
            ranks run micro-batches of the same stages.
        tokens: of the captions, where the processes that read the data tokenize.
    """

    step: int
    stage: int
    images: Tensor
    captions: list[str]
    ids: list[str]
    global_indices: list[int]
    damaged: list[str] = field(default_factory=list)
    encodings: Encodings | None = None
    padding: int = 0
    tokens: PromptTokens | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MicroBatch":
        """Return the micro-batch with its tensors on ``device``; the host does not wait for page-locked ones."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking or tensor.is_pinned()))

    def pin_memory(self) -> "MicroBatch":
        """Return the micro-batch with its tensors in page-locked memory, for the DataLoader."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        encodings = self.encodings and self.encodings.map(change)
        tokens = self.tokens and self.tokens.map(change)
        return replace(self, images=change(self.images), encodings=encodings, tokens=tokens)


def pixels(images: Tensor) -> Tensor:
    """Convert images from uint8 in [0, 255] to float in [-1, 1]."""
    return images.float() / 127.5 - 1
