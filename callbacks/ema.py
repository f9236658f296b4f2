"""An exponential moving average of the weights, for sampling and validation."""

from typing import Any

import lightning as L
import torch

from nami_lightning.module import NamiModule


class EMA(L.Callback):
    """Keeps ``ema = decay * ema + (1 - decay) * weights`` as a second network of the module, in its checkpoint.

    Args:
        decay: in [0, 1); at step n the smaller of this and (1 + n) / (10 + n) is used, so that the start is
            forgotten quickly.
        every_n_steps: update after every so many optimizer steps (with the decay to that power).

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, decay: float = 0.9999, every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1 or every_n_steps < 1:
            raise ValueError(f"EMA needs 0 <= decay < 1 and every_n_steps >= 1; got {decay} and {every_n_steps}")
        self.decay, self.every_n_steps = decay, every_n_steps

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask the module for the second network, before it builds the first."""
        assert isinstance(pl_module, NamiModule)
        pl_module.use_ema = True

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update in place, on this rank's own shard of the weights."""
        assert isinstance(pl_module, NamiModule)
        step = pl_module.step
        if step % self.every_n_steps:
            return
        assert pl_module.ema is not None
        decay = min(self.decay, (1 + step) / (10 + step)) ** self.every_n_steps
        torch._foreach_lerp_(_local(pl_module.ema), _local(pl_module.transformer), 1 - decay)


def _local(model: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters' local tensors: their shards under FSDP2, themselves otherwise."""
    return [getattr(parameter, "_local_tensor", parameter.data) for parameter in model.parameters()]
