"""Checkpoints of a run: the newest few, and the last step's."""

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, set to keep the newest ``keep`` and to write one at the end of training.

    Lightning writes a file under a temporary name and renames it, so a named checkpoint is always whole.

    Args:
        every_n_steps: how often.
        keep: how many stay; older ones are removed after a newer one is written.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(
                f"RunCheckpoint needs every_n_steps and keep of at least 1; got {every_n_steps} and {keep}"
            )
        super().__init__(
            filename="step={step:07d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last step, if its turn had not come."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
