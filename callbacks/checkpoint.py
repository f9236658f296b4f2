"""Checkpoints of a run: the newest few, and the last step's."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from nami_lightning.module import NamiModule
from nami_lightning.runs import Run, remove


class RunCheckpoint(Checkpoint):
    """Writes ``checkpoints/step=NNNNNNN.ckpt`` every so often and at the end, and keeps the newest ``keep``.

    A file, or a folder of every rank's shards under FSDP2. It is written under a temporary name and renamed, so a named
    checkpoint is always whole; an older one is removed only after a newer one has its name.

    Args:
        every_n_steps: how often.
        keep: how many stay.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(
                f"RunCheckpoint needs every_n_steps and keep of at least 1; got {every_n_steps} and {keep}"
            )
        self.every_n_steps, self.keep = every_n_steps, keep

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write when it is time."""
        assert isinstance(pl_module, NamiModule)
        step = pl_module.step
        if step % self.every_n_steps == 0 or step == pl_module.curriculum.total_steps:
            self.save(trainer, step)

    def save(self, trainer: L.Trainer, step: int) -> None:
        """Write a checkpoint of ``step`` (all ranks take part), then remove the oldest."""
        run = Run(Path(trainer.default_root_dir))
        target = run.folder / "checkpoints" / f"step={step:07d}.ckpt"
        partial = target.with_suffix(".partial")
        if trainer.is_global_zero:
            remove(partial)
        trainer.strategy.barrier()
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            partial.rename(target)
            for old in run.checkpoints[: -self.keep]:
                remove(old)
