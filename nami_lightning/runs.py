"""A run on disk: runs/NAME with its resolved recipe, checkpoints, TensorBoard events and samples.

runs/NAME/recipe.yaml                     the recipe as it was resolved
runs/NAME/checkpoints/step=0000900.ckpt   the newest few
runs/NAME/events.out.tfevents.*           TensorBoard
runs/NAME/samples/step=0000900.png        grids of drawn images
"""

import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch import nn

RECIPE_FILE = "recipe.yaml"


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
        return sorted(found, key=lambda path: int(path.stem.removeprefix("step=")))

    def load_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint and what it says of itself, a file's tensors left on disk until used; None if there
        is none.

        Raises:
            ValueError: it can't be read.
        """
        if not self.checkpoints:
            return None
        path = self.checkpoints[-1]
        try:
            return path, torch.load(about_file(path), map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} can't be read ({error}): remove it to resume from the one before") from error

    def set_aside(self) -> Path | None:
        """Give the folder another name, so that a new run can take its place; None if there was no run."""
        if not self.folder.exists():
            return None
        aside = self.folder.with_name(f"{self.folder.name}.{datetime.now():%Y-%m-%dT%H-%M-%S}")
        return self.folder.rename(aside)


def about_file(checkpoint: Path) -> Path:
    """The file with all that isn't sharded: the checkpoint itself, or its part if it is a folder of shards."""
    return checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a whole model on one device, from a file or a folder of shards."""
    if checkpoint.is_dir():
        state = {"state_dict": model.state_dict()}
        torch.distributed.checkpoint.load(state, checkpoint_id=checkpoint, no_dist=True)
        model.load_state_dict(state["state_dict"])
    else:
        model.load_state_dict(torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["state_dict"])


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, file or folder, if it is there."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def find_run(name: str) -> Run:
    """The run at the path ``name``, or of that name below ``runs``.

    Raises:
        FileNotFoundError: there is no run.
    """
    for folder in (Path(name), Path("runs") / name):
        if (folder / RECIPE_FILE).exists():
            return Run(folder)
    raise FileNotFoundError(f"{name} is not a run: neither {name} nor runs/{name} holds a {RECIPE_FILE}")
