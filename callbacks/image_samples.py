"""Generates images of the same prompts from the same noise every so often, for the loggers and as PNG grids."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from nami_lightning.callbacks.generation import Attempts, generate, report_failures
from nami_lightning.pipelines.checks import NonFiniteImages
from nami_lightning.pipelines.sampler_settings import SamplerSettings
from nami_lightning.runs.loggers import log_image
from nami_lightning.training.module import NamiModule
from nami_lightning.training.strategies import FSDP2Strategy
from nami_lightning.utils.image_grid import caption_grid, save_image


class ImageSamples(L.Callback):
    """Writes a grid of generated images every ``every_n_steps`` steps and at the end, with the EMA's weights if any.

    The grid is a PNG in the run's folder, and goes to every logger that takes pictures, under the name ``samples``.

    If an image is not finite, there is a warning and no grid, and the training goes on. So it does if generating or
    writing fails (unless memory runs out); when the training is saved, the run then ends with an error.

    Args:
        prompts: one an image.
        every_n_steps: how often.
        sampler: how images are generated.
        seed: of the noise; image i uses ``seed + i``.
        columns: images in a row of the grid.
        batch_size: images generated at once.

    Raises:
        ValueError: no prompts, or a number below 1.
    """

    def __init__(
        self,
        prompts: list[str],
        every_n_steps: int = 1000,
        sampler: SamplerSettings = SamplerSettings(),
        seed: int = 0,
        columns: int = 8,
        batch_size: int = 16,
    ) -> None:
        if not prompts or min(every_n_steps, columns, batch_size) < 1:
            raise ValueError(
                "ImageSamples needs at least one prompt, and every_n_steps, columns and batch_size of at least 1"
            )
        self.prompts, self.every_n_steps, self.sampler = prompts, every_n_steps, sampler
        self.seed, self.columns, self.batch_size = seed, columns, batch_size
        self.attempts = Attempts("ImageSamples")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Generate when it is time."""
        assert isinstance(pl_module, NamiModule)
        step = pl_module.step
        if step % self.every_n_steps == 0 or step == pl_module.curriculum.total_steps:
            self.attempts.count += 1
            self.generate(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """End the program with an error if generating failed, now that the training is saved.

        Raises:
            RuntimeError: naming the steps.
        """
        if stage == "fit":
            report_failures(trainer, self.attempts)

    @torch.no_grad()
    def generate(self, trainer: L.Trainer, module: NamiModule) -> None:
        """Generate on every rank (a sharded network needs them all), and write on the first."""
        images: list[Any] = []
        with self.attempts.attempt(trainer, module, together=isinstance(trainer.strategy, FSDP2Strategy)):
            images = self._generate(module)
        if images and trainer.is_global_zero:
            grid: Image.Image | None = None
            with self.attempts.attempt(trainer, module):
                grid = self._write(trainer, module.step, images)
            for logger in trainer.loggers if grid else ():
                with self.attempts.attempt(trainer, module):  # a logger that fails keeps nothing from the others
                    log_image(logger, "samples", grid, module.step)

    def _generate(self, module: NamiModule) -> list[Any]:
        """Return an image of each prompt; none if one is not finite."""
        seeds = range(self.seed, self.seed + len(self.prompts))
        images: list[Any] = []
        failures = []
        for first in range(0, len(self.prompts), self.batch_size):
            some = slice(first, first + self.batch_size)
            try:
                images += generate(module, self.sampler, self.prompts[some], seeds[some])
            except NonFiniteImages as error:  # the other batches run all the same: a sharded network needs all ranks
                failures.append(str(error))
        if failures:
            self.attempts.without_result += 1
            rank_zero_warn(f"No grid of samples at step {module.step}: {failures[0]}.")
            return []
        return images

    def _write(self, trainer: L.Trainer, step: int, images: list[Any]) -> Image.Image:
        """Write the grid as a PNG, and return it."""
        grid = caption_grid(images, self.prompts, self.columns)
        save_image(grid, Path(trainer.default_root_dir) / "samples" / f"step={step:07d}.png")
        return grid
