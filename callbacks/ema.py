"""An exponential moving average of the weights, for sampling and validation."""

from typing import Any, Literal

import lightning as L

from nami_lightning.training.ema import update_ema
from nami_lightning.training.module import NamiModule


class EMA(L.Callback):
    """Keeps ``ema = decay * ema + (1 - decay) * weights`` as a second network of the module, in its checkpoint.

    Args:
        decay: in [0, 1); at step n the smaller of this and (1 + n) / (10 + n) is used, so that the start is
            forgotten quickly.
        every_n_steps: update after every so many optimizer steps (with the decay to that power).
        device: where it is kept: beside the weights, or on the host, which every update then waits for.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self, decay: float = 0.9999, every_n_steps: int = 1, device: Literal["device", "host"] = "device"
    ) -> None:
        if not 0 <= decay < 1 or every_n_steps < 1:
            raise ValueError(f"EMA needs 0 <= decay < 1 and every_n_steps >= 1; got {decay} and {every_n_steps}")
        self.decay, self.every_n_steps, self.device = decay, every_n_steps, device

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask the module for a second network before it builds the first."""
        assert isinstance(pl_module, NamiModule)
        pl_module.use_ema, pl_module.ema_on_host = True, self.device == "host"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update in place, on this rank's own shard of the weights; a skipped step changes nothing."""
        assert isinstance(pl_module, NamiModule)
        step = pl_module.step
        if step % self.every_n_steps or pl_module.skipped.in_row:
            return
        assert pl_module.ema is not None
        decay = min(self.decay, (1 + step) / (10 + step)) ** self.every_n_steps
        update_ema(pl_module.ema, pl_module.transformer, decay)
