"""Pictures and tables for Lightning's loggers, each in its own way; and loggers that may fail without ending a run."""

import json
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from PIL import Image

from nami_lightning.errors import explain, first_line
from nami_lightning.utils.atomic_write import write_text
from nami_lightning.utils.text_table import markdown_table

SERVICE_RUNS = "logger_runs.json"
"""The file in a run's folder that holds the id of its run in each service, by the logger's class."""

MOST_FAILURES = 3
"""A logger that fails so many times in a row gets nothing more: each call may wait long for a server."""


@rank_zero_only
def log_image(logger: Logger, name: str, image: Image.Image, step: int) -> None:
    """Give a picture to a logger, on rank 0; a logger that takes no pictures is left alone.

    Args:
        logger: TensorBoard's, MLflow's, Comet's, or one with a method ``log_image(key, images, step)``, as that of
            Weights & Biases.
        name: of the picture; the same at every step.
        image: in RGB.
        step: of the training.
    """
    if isinstance(logger, TensorBoardLogger):
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        logger.experiment.add_image(name, pixels.view(image.height, image.width, 3), step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, image, key=name, step=step)
    elif isinstance(logger, CometLogger):
        logger.experiment.log_image(image, name=name, step=step)
    elif hasattr(logger, "log_image"):
        logger.log_image(name, [image], step)


@rank_zero_only
def log_table(logger: Logger, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Give a table to a logger, on rank 0; a logger that takes no tables is left alone.

    Args:
        logger: as in :func:`log_image`; or one with a method ``log_table(key, columns, data)``.
        name: of the table.
        header: a title for each column.
        rows: rows of as many cells.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(name, markdown_table(header, rows))
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, markdown_table(header, rows), f"{name}.md")
    elif isinstance(logger, CometLogger):
        logger.experiment.log_table(f"{name}.csv", [list(row) for row in rows], headers=list(header))
    elif hasattr(logger, "log_table"):
        logger.log_table(name, list(header), [list(row) for row in rows])


@rank_zero_only
def start_loggers(loggers: Sequence[Logger], folder: Path, recipe: dict[str, Any], resumed: bool) -> None:
    """Give the resolved recipe to the loggers as hyperparameters, on rank 0, before a training starts.

    A resumed training goes on in its runs of Weights & Biases and MLflow; which those are is noted in its folder. An id
    that the recipe names is used in any case. Comet's logger has begun its experiment by then: only the recipe can name
    it.

    Args:
        loggers: of the training.
        folder: of the run.
        recipe: the resolved recipe's values.
        resumed: whether the training goes on from a checkpoint.

    Raises:
        RuntimeError: a logger fails; its service can't be reached, for example.
    """
    file, ids = folder / SERVICE_RUNS, {}
    known = json.loads(file.read_text(encoding="utf-8")) if resumed and file.is_file() else {}
    for logger in loggers:
        name = type(logger).__name__
        try:
            if (service_run := _open_service_run(logger, known.get(name))) is not None:
                ids[name] = service_run
            if not _has_parameters(logger):
                logger.log_hyperparams(recipe)
        except Exception as error:
            raise RuntimeError(
                f"trainer.logger: {name} can't start: {first_line(error)}; if its service can't be reached, let it "
                "write to a folder, or leave it out"
            ) from error
    if ids:
        write_text(file, json.dumps(ids))


def _open_service_run(logger: Logger, known: str | None) -> str | None:
    """Open a logger's run in its service, the known one unless the recipe names one, and return its id."""
    if isinstance(logger, WandbLogger):
        logger._wandb_init["id"] = logger._wandb_init["id"] or known
        return str(logger.experiment.id)
    if isinstance(logger, MLFlowLogger):
        logger._run_id = logger._run_id or known
        return logger.run_id
    return None


def _has_parameters(logger: Logger) -> bool:
    """Tell whether a run of MLflow has parameters already: it refuses other values, so a resumed run keeps them."""
    return isinstance(logger, MLFlowLogger) and bool(logger.experiment.get_run(logger.run_id).data.params)


def make_logger(text: str) -> Logger:
    """Make a logger from what a recipe says of it.

    Args:
        text: a class's name or path; YAML with ``class_path`` and ``init_args``; or a file of such YAML.

    Raises:
        ValueError: no such class, or arguments that it doesn't take.
    """
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf+")
    parser.add_subclass_arguments(Logger, "logger", required=True)
    try:
        logger = parser.instantiate(parser.parse_args(["--logger", text])).logger
    except ArgumentError as error:
        raise ValueError(f"--logger: {explain(error, [])}") from error
    assert isinstance(logger, Logger)
    return logger


class GuardedLogger:
    """Lets a logger fail without ending the training: a warning at once, and :meth:`describe` at the end.

    A logger that fails three times in a row gets nothing more in this training.

    Args:
        logger: its methods that a training calls are replaced by guarded ones.
    """

    METHODS = ("log_metrics", "save", "finalize")

    def __init__(self, logger: Logger) -> None:
        self.name = type(logger).__name__
        self.failures: list[str] = []
        self.in_row = 0
        for method in self.METHODS:
            setattr(logger, method, self._guarded(getattr(logger, method)))

    def _guarded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> None:
            if self.in_row >= MOST_FAILURES:
                return
            try:
                method(*args, **kwargs)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                self._failed(error)
            else:
                self.in_row = 0 if method.__name__ == "log_metrics" else self.in_row

        return call

    def _failed(self, error: Exception) -> None:
        self.failures.append(first_line(error))
        self.in_row += 1
        left = f" {self.name} gets nothing more." if self.in_row == MOST_FAILURES else ""
        rank_zero_warn(f"{self.name} failed: {self.failures[-1]}. The training goes on.{left}")

    def describe(self) -> str:
        """Return how often the logger failed, and why the first time; empty if it never did."""
        return f"{self.name} failed {len(self.failures)} time(s): {self.failures[0]}" if self.failures else ""


def report_failures(guarded: Sequence[GuardedLogger]) -> None:
    """Tell at the end of a training which loggers failed in it.

    Raises:
        RuntimeError: some did.
    """
    if failed := [text for text in (one.describe() for one in guarded) if text]:
        raise RuntimeError(f"the training is saved, but {'; '.join(failed)}")
