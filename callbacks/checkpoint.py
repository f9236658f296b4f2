"""Checkpoints of a run: the newest few, some for good, the last step's, and one when the run is asked to stop."""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from nami_lightning.runs.preemption import StopRequest, preempted
from nami_lightning.runs.run_dir import Run, remove, step_of
from nami_lightning.training.module import NamiModule
from nami_lightning.training.strategies import FSDP2Strategy
from nami_lightning.utils.atomic_write import publish


class RunCheckpoint(Checkpoint):
    """Writes ``checkpoints/step=NNNNNNN.ckpt`` every so often and at the end, and keeps the newest ``keep``.

    A file, or a folder of every rank's shards under FSDP2. It is written under a temporary name and renamed, so a named
    checkpoint is always whole; an older one is removed only after a newer one has its name. None is written after a
    step that was skipped, so that a run which ends for too many of these leaves one from before them.

    On SIGTERM or SIGUSR1 it writes one after the running step, and ends the run with status 75; on Ctrl-C with 130.

    Args:
        every_n_steps: how often.
        keep: how many stay.
        keep_every: every so-many-th checkpoint is kept for good as well; 0 for none.
        asynchronous: copy the state to host memory, and write it while training goes on; the run's end waits for it.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self, every_n_steps: int = 1000, keep: int = 2, keep_every: int = 0, asynchronous: bool = False
    ) -> None:
        if every_n_steps < 1 or keep < 1 or keep_every < 0:
            raise ValueError(
                "RunCheckpoint needs every_n_steps and keep of at least 1 and keep_every of at least 0; got "
                f"{every_n_steps}, {keep} and {keep_every}"
            )
        self.every_n_steps, self.keep, self.keep_every = every_n_steps, keep, keep_every
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self.stop = StopRequest()
        self._writing: Future[None] | None = None
        self._saved_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen for signals, and write checkpoint files directly."""
        self.stop.listen(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DirectCheckpointIO()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step that the run resumes from: it has its checkpoint."""
        assert isinstance(pl_module, NamiModule)
        self._saved_step = pl_module.step

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the former signal handlers back."""
        self.stop.forget()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell the step whether this rank was asked to stop, so that all ranks learn it."""
        assert isinstance(pl_module, NamiModule)
        pl_module.stop_requested = self.stop.signal is not None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint when it is time, or when any rank was asked to stop.

        Raises:
            Preempted: after a checkpoint of a run that was asked to stop.
        """
        assert isinstance(pl_module, NamiModule)
        step = pl_module.step
        last = step == pl_module.curriculum.total_steps
        due = step % self.every_n_steps == 0 and not pl_module.skipped.in_row
        if due or last or pl_module.stop_agreed:
            pl_module.heartbeat.beat("writing a checkpoint")
            self.save(trainer, step)
        if pl_module.stop_agreed and not last:
            self.finish(trainer)
            status = self.stop.status
            rank_zero_info(
                f"Told to stop: saved step {step} of {pl_module.curriculum.total_steps}. The same command goes on; "
                f"exit status {status}."
            )
            raise preempted(trainer, status)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a checkpoint of the last step, whatever ended the training, and wait until it is written."""
        assert isinstance(pl_module, NamiModule)
        if pl_module.step != self._saved_step and not pl_module.skipped.in_row:
            pl_module.heartbeat.beat("writing a checkpoint")
            self.save(trainer, pl_module.step)
        self.finish(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write a checkpoint of the last whole step before an error, in a process that is alone.

        Of several ranks the others may not have failed, and all must take part: then the last checkpoint is the one
        before the error. So it is after an error in an update, which may have changed a part of the weights.
        """
        assert isinstance(pl_module, NamiModule)
        untouched = pl_module.heartbeat.activity not in ("the update", "writing a checkpoint")
        new = pl_module.step != self._saved_step and not pl_module.skipped.in_row
        if isinstance(exception, Exception) and trainer.world_size == 1 and untouched and new:
            self.save(trainer, pl_module.step)
            self.finish(trainer)
            print(f"Saved step {pl_module.step} before the error.", file=sys.stderr)

    def save(self, trainer: L.Trainer, step: int) -> None:
        """Write a checkpoint of ``step`` (all ranks take part), then remove the oldest."""
        self.finish(trainer)
        self._saved_step = step
        folder = Run(Path(trainer.default_root_dir)).folder / "checkpoints"
        partial = folder / f"step={step:07d}.partial"
        if trainer.is_global_zero:
            for left in folder.glob("*.partial"):
                remove(left)
        trainer.strategy.barrier()
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if self._writer is None:
            self._write(trainer, checkpoint, partial)
            trainer.strategy.barrier()
            return
        if trainer.is_global_zero or isinstance(trainer.strategy, FSDP2Strategy):
            checkpoint = apply_to_collection(checkpoint, Tensor, copy_to_host)
        self._writing = self._writer.submit(self._write, trainer, checkpoint, partial)

    def finish(self, trainer: L.Trainer) -> None:
        """Wait until the checkpoint that is being written has its name; an error of the writing is raised here."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None
            trainer.strategy.barrier()

    def _write(self, trainer: L.Trainer, checkpoint: dict[str, Any], partial: Path) -> None:
        trainer.strategy.save_checkpoint(checkpoint, partial)
        if not trainer.is_global_zero:
            return
        publish(partial, partial.with_suffix(".ckpt"))
        for old in Run(Path(trainer.default_root_dir)).checkpoints[: -self.keep]:
            if not self.keep_every or step_of(old) % (self.keep_every * self.every_n_steps):
                remove(old)


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its file, and leaves it there when it is read.

    Lightning's own makes a second copy of it in memory and a third in the system's folder for temporary files, which
    may be too small, and where a kill leaves it. Nobody sees a half-written file here: it has a temporary name.

    Every rank of a resumed run reads the whole file, and Lightning's own holds it in memory once a rank. Here it is
    mapped: the ranks of a node share the pages that the system keeps of it, and may drop.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint to ``path``; its folder is made if it isn't there."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return what a checkpoint's file holds; a change of its tensors is not written to it."""
        checkpoint: dict[str, Any] = torch.load(path, map_location, mmap=True, weights_only=weights_only)
        return checkpoint


def copy_to_host(tensor: Tensor) -> Tensor:
    """Return a copy that the next step does not change."""
    return tensor.detach().to("cpu", copy=True)
