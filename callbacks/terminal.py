"""What a run shows on the terminal: its progress, with the total and the rate right after a resume, and its model."""

import sys
from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info

from nami_lightning.training.module import NamiModule
from nami_lightning.utils.text_table import table


class ProgressBar(TQDMProgressBar):
    """Shows the steps of a run out of all steps of its curriculum.

    Lightning's bars know no total after a resume within an epoch, and count the steps of earlier sessions into the
    rate. This one starts at the step that the run goes on from. Its time and rate are those of this session, without
    the pauses in which the model is validated, generates, or is measured.

    Args:
        refresh_rate: number of steps between two updates of the bar; 0 turns it off.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate)
        self.first_step = True
        self.seconds_paused = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the bar at the step that training goes on from."""
        assert isinstance(pl_module, NamiModule)
        self.first_step = True
        self.train_progress_bar = Tqdm(
            desc=self.train_description,
            initial=pl_module.step,
            total=pl_module.curriculum.total_steps,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, *_: Any) -> None:
        """Leave the bar as it is: a run is one epoch, and Lightning would set the bar back to 0."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock at the first step, since fitting the bridges is none; put it forward after a pause."""
        bar = self.train_progress_bar
        assert isinstance(pl_module, NamiModule)
        if not bar.disable:
            bar.start_t = (
                bar._time() if self.first_step else bar.start_t + pl_module.seconds_paused - self.seconds_paused
            )
        self.seconds_paused = pl_module.seconds_paused
        self.first_step = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar to the step that is done."""
        assert isinstance(pl_module, NamiModule)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, pl_module.step - 1)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the values beside the bar, without Lightning's number of a version: a run has a name."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class Summary(ModelSummary):
    """Prints the parts of the model with their parameters, without Lightning's count of operations.

    Lightning can't count them here and prints 0; ``lightning plan`` tells how many there are.
    """

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        *_: Any,
        **__: Any,
    ) -> None:
        """Print the summary as a table."""
        columns = [(name, cells) for name, cells in summary_data if name != "FLOPs"]
        rows = [[name for name, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]
        lines = table(rows, "<" * len(columns))
        counts = f"{total_parameters:,} parameters, {trainable_parameters:,} of them trained, {model_size:,.1f} MB"
        rank_zero_info("\n".join([*lines, counts]))


def bring_terminal_output(trainer: L.Trainer, named: Iterable[str]) -> None:
    """Put :class:`ProgressBar` and :class:`Summary` in the place of Lightning's; those that a recipe names stay.

    Lightning's ``TQDMProgressBar`` is replaced even if it is named: ours is the same, and right after a resume.

    Args:
        trainer: whose callbacks are searched.
        named: the class paths that the recipe names.
    """
    kept = {path.rpartition(".")[2] for path in named} - {"TQDMProgressBar"}
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for number, callback in enumerate(callbacks):
        kind = type(callback)
        if kind.__name__ in kept:
            continue
        if kind in (TQDMProgressBar, RichProgressBar):
            callbacks[number] = ProgressBar(callback.refresh_rate)  # type: ignore[attr-defined]
        elif kind in (ModelSummary, RichModelSummary):
            callbacks[number] = Summary()
