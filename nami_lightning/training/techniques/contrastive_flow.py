"""Contrastive flow matching: the velocity is pushed away from that of another sample.

"Contrastive Flow Matching" (Stoica and others, 2025): the loss is

    |v - target|^2 - weight * |v - target of another sample|^2

so that the flows of different prompts become more distinct.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nami_lightning.training.techniques.technique import ForwardPass, Technique


class ContrastiveFlow(Technique):
    """Adds minus ``weight`` times the squared distance of the velocity to the target of another sample.

    The other sample is a neighbour in the micro-batch: 1 and 2, 3 and 4, and so on, which stay together on any number
    of ranks that divides the micro-batches evenly. A micro-batch of one sample has no other one, and adds nothing.

    Args:
        weight: of the added loss, in (0, 1); the paper's is 0.05.
        end_step: it is off from this step on; null: never.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, weight: float = 0.05, end_step: int | None = None) -> None:
        super().__init__(end_step)
        if not 0 < weight < 1:  # from 1 on the loss has no minimum
            raise ValueError(f"ContrastiveFlow needs a weight between 0 and 1; got {weight}")
        self.weight = weight

    def loss(self, forward: ForwardPass) -> Tensor | None:
        """Return minus the weighted distance to the others' targets; see the top of this file."""
        assert forward.velocity is not None
        count = len(forward.target)
        if count < 2:
            return None
        others = (torch.arange(count, device=forward.target.device) ^ 1) % count  # the last of an odd number takes 0
        return -self.weight * forward.loss_scale * F.mse_loss(forward.velocity, forward.target[others])
