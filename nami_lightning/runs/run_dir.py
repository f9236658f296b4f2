"""The folder of a run: runs/NAME with its resolved recipe, checkpoints, TensorBoard events and samples.

runs/NAME/recipe.yaml                     the recipe as it was resolved
runs/NAME/checkpoints/step=0000900.ckpt   the newest few
runs/NAME/events.out.tfevents.*           TensorBoard
runs/NAME/samples/step=0000900.png        grids of generated images
runs/NAME/logger_runs.json                the run's ids at Weights & Biases and MLflow, if it is logged there
runs/NAME/lock                            which process trains it, or was the last to
"""

import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from nami_lightning.errors import one_line, why_unreadable
from nami_lightning.runs.lock import hold
from nami_lightning.runs.tensorboard import describe_curves
from nami_lightning.utils.atomic_write import replacing
from nami_lightning.utils.shard_index import check_shards

RECIPE_FILE = "recipe.yaml"

SHOWN_RUNS = 20
"""Most runs that a message lists, the newest first."""


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    folder: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.folder / RECIPE_FILE

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [path for path in self.folder.glob("checkpoints/*.ckpt") if re.fullmatch(r"step=\d+", path.stem)]
        return sorted(found, key=step_of)

    def checkpoint(self, step: int | None = None) -> Path:
        """Return the checkpoint of ``step``, or the newest.

        Raises:
            FileNotFoundError: there is none.
        """
        found = {step_of(path): path for path in self.checkpoints}
        if not found:
            raise FileNotFoundError(f"{self.folder} has no checkpoint yet")
        if step is not None and step not in found:
            raise FileNotFoundError(
                f"{self.folder} has no checkpoint of step {step}, but of {', '.join(map(str, found))}"
            )
        return found[max(found) if step is None else step]

    def write_recipe(self, text: str) -> None:
        """Write the resolved recipe, whole or not at all."""
        with replacing(self.recipe) as partial:
            partial.write_text(text)

    def load_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint and what :func:`read_metadata` reads of it; None if there is none."""
        return (self.checkpoints[-1], read_metadata(self.checkpoints[-1])) if self.checkpoints else None

    def describe_results(self) -> str:
        """Return where the run's samples are and how to see its curves, if it has any; its folder if it has neither."""
        samples, curves = self.folder / "samples", describe_curves([self.folder])
        lines = [f"Samples: {samples}"] if samples.is_dir() else []
        lines += [f"Curves: {curves}"] if curves else []
        return "  ".join(lines) or f"Files: {self.folder}"

    def set_aside(self) -> Path | None:
        """Give the folder another name, so that a new run can take its place; None if there was no run.

        Raises:
            RuntimeError: another process trains it.
        """
        if not self.folder.exists():
            return None
        aside = self.folder.with_name(f"{self.folder.name}.{datetime.now():%Y-%m-%dT%H-%M-%S}")
        with hold(self.folder):
            return self.folder.rename(aside)


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint without its tensors: they stay on disk until used, or in the shards.

    Raises:
        ValueError: it can't be read.
    """
    path = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{checkpoint} can't be read ({why_unreadable(error)}): remove it to resume from the one before"
        ) from error
    return content


def load_weights(checkpoint: Path, model: nn.Module, names: dict[str, str]) -> None:
    """Load some of a checkpoint's weights straight into an unsharded model; nothing else of it is read.

    Args:
        checkpoint: a file or a folder of shards.
        model: whose weights are replaced.
        names: a weight's name in the model to its name in the checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, lacks a weight, or has one of another shape.
    """
    weights = model.state_dict()
    state = {"state_dict": {there: weights[here] for here, there in names.items()}}
    try:
        if checkpoint.is_dir():
            check_shards(checkpoint)
            dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
            return
        saved = read_metadata(checkpoint)["state_dict"]
        for name, weight in state["state_dict"].items():
            if saved[name].shape != weight.shape:
                raise RuntimeError(f"{name} has the shape {list(saved[name].shape)} and not {list(weight.shape)}")
            weight.copy_(saved[name])
    except (CheckpointException, AttributeError, KeyError, RuntimeError, TypeError) as error:
        causes = getattr(error, "failures", {}).values()  # torch's error is one of all ranks
        reason = next((one_line(cause[0]) for cause in causes), f"{type(error).__name__} {one_line(error)}")
        raise ValueError(f"{checkpoint} does not hold this model's weights, or is damaged: {reason}") from error


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written, as its name says."""
    return int(checkpoint.stem.removeprefix("step="))


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, file or folder, if it is there."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def is_run(name: str) -> bool:
    """Tell whether ``name`` is a run's folder, or the name of one below ``runs``."""
    return any((folder / RECIPE_FILE).exists() for folder in _folders(name))


def find_run(name: str) -> Run:
    """Return the run at the path ``name``, or of that name below ``runs``.

    Raises:
        FileNotFoundError: there is no run.
    """
    for folder in _folders(name):
        if (folder / RECIPE_FILE).exists():
            return Run(folder)
    raise FileNotFoundError(
        f"{name} is not a run: neither {name} nor runs/{name} holds a {RECIPE_FILE}; {describe_runs(name)}"
    )


def describe_runs(name: str) -> str:
    """Return the runs that there are where ``name`` was looked for, the newest first, and the one nearest to it."""
    named = Path(name)
    folder = Path("runs") if str(named.parent) == "." else named.parent
    recipes = {path for pattern in (f"*/{RECIPE_FILE}", f"*/*/{RECIPE_FILE}") for path in folder.glob(pattern)}
    runs = [path.parent for path in sorted(recipes, key=lambda path: -path.stat().st_mtime)]
    if not runs:
        return f"there is no run in {folder}"
    nearest = get_close_matches(named.name, [run.name for run in runs], n=1)
    guess = [f"; did you mean {run}?" for run in runs if [run.name] == nearest][:1]
    more = f" and {len(runs) - SHOWN_RUNS} more" if len(runs) > SHOWN_RUNS else ""
    return (
        f"{folder} holds {', '.join(str(run.relative_to(folder)) for run in runs[:SHOWN_RUNS])}{more}{''.join(guess)}"
    )


def _folders(name: str) -> tuple[Path, Path]:
    return Path(name), Path("runs") / name
