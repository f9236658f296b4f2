"""Logs the curriculum: the phase, the ratio and the learning rate of each step."""

from typing import Any

import lightning as L
import torch

from nami_lightning.training.module import NamiModule


class CurriculumCallback(L.Callback):
    """Logs the phase, the ratio and the learning rate of each step.

    It only watches: the module sets the learning rate, and the data reads its ratios from the same curriculum.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log where in the curriculum this step is."""
        assert isinstance(pl_module, NamiModule)
        curriculum, step = pl_module.curriculum, pl_module.step
        phase, rate = curriculum.phase(step), curriculum.learning_rate(step)
        # As tensors of the host: Lightning sends a float to the device, for which the host waits.
        pl_module.log("curriculum/phase", torch.tensor(curriculum.phase_index(step) + 1.0), prog_bar=True)
        pl_module.log("curriculum/learning_rate", torch.tensor(rate))
        total = sum(phase.ratio)
        for stage, parts in enumerate(phase.ratio):
            pl_module.log(f"curriculum/share_stage{stage + 1}", torch.tensor(parts / total))
