"""How fast a run goes: images and tokens a second by stage, step time, and the share spent waiting for data."""

from time import perf_counter
from typing import Any

import lightning as L

from nami_lightning.batch import MicroBatch
from nami_lightning.module import NamiModule


class Throughput(L.Callback):
    """Rates over the steps since the last log, all ranks together; pauses for validation and drawing left out.

    Args:
        every_n_steps: how often to log; a rate is a mean over so many steps.

    Raises:
        ValueError: ``every_n_steps`` below 1.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Throughput.every_n_steps must be at least 1; got {every_n_steps}")
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting."""
        assert isinstance(pl_module, NamiModule)
        self.total_waited = self.total_worked = self.waited_before = 0.0
        self._reset(pl_module.num_stages)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of a step."""
        self.begin = perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: list[MicroBatch], batch_idx: int
    ) -> None:
        """Count the step; log when it is time."""
        assert isinstance(pl_module, NamiModule)
        self.worked += perf_counter() - self.begin
        self.steps += 1
        for micro in batch:
            images = len(micro) * trainer.world_size
            self.images[micro.stage] += images
            self.tokens[micro.stage] += images * pl_module.tokens(micro.stage)
        if pl_module.step % self.every_n_steps == 0:
            waited_in_all = trainer.train_dataloader.seconds_waited  # type: ignore[union-attr]
            self._log(pl_module, waited_in_all - self.waited_before)
            self.waited_before = waited_in_all

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what was measured."""
        total = self.total_waited + self.total_worked
        if total and trainer.is_global_zero:
            print(f"Time waiting for data: {self.total_waited / total:.1%} of {total:.0f} s of training.")

    def _log(self, module: NamiModule, waited: float) -> None:
        elapsed = waited + self.worked
        self.total_waited += waited
        self.total_worked += self.worked
        module.log("throughput/seconds_per_step", elapsed / self.steps)
        module.log("throughput/share_waiting_for_data", waited / elapsed)
        module.log("throughput/images_per_second", sum(self.images) / elapsed)
        module.log("throughput/tokens_per_second", sum(self.tokens) / elapsed)
        for stage, (images, tokens) in enumerate(zip(self.images, self.tokens, strict=True)):
            module.log(f"throughput/images_per_second_stage{stage + 1}", images / elapsed)
            module.log(f"throughput/tokens_per_second_stage{stage + 1}", tokens / elapsed)
        self._reset(module.num_stages)

    def _reset(self, stages: int) -> None:
        self.worked = 0.0
        self.steps = 0
        self.images, self.tokens = [0] * stages, [0] * stages
