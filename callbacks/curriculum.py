"""Applies the curriculum: sets the learning rate of each step, and logs what the phases do."""

from typing import Any

import lightning as L
import torch

from nami_lightning.training.module import NamiModule


class CurriculumCallback(L.Callback):
    """Sets each step's learning rate from the curriculum; logs the phase, the ratio and the learning rate.

    The rate is a pure function of the step, so a recipe edited before a resume takes effect. The data reads its
    ratios from the same curriculum by itself.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set this step's learning rate, and say when a phase begins."""
        assert isinstance(pl_module, NamiModule)
        curriculum, step = pl_module.curriculum, pl_module.step
        phase, rate = curriculum.phase(step), curriculum.learning_rate(step)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        # As tensors of the host: Lightning sends a float to the device, for which the host waits.
        pl_module.log("curriculum/phase", torch.tensor(curriculum.phase_index(step) + 1.0), prog_bar=True)
        pl_module.log("curriculum/learning_rate", torch.tensor(rate))
        total = sum(phase.ratio)
        for stage, parts in enumerate(phase.ratio):
            pl_module.log(f"curriculum/share_stage{stage + 1}", torch.tensor(parts / total))
