"""A run's model as files that diffusers loads: a whole pipeline, or a LoRA alone; and by them a run as a start."""

from dataclasses import dataclass
from pathlib import Path

from nami_lightning.models.lora import merge_adapter
from nami_lightning.pipelines.lora import save_lora
from nami_lightning.runs.load import load_module
from nami_lightning.runs.recipe import Recipe, read_layer
from nami_lightning.runs.run_dir import Run, find_run, is_run, read_metadata, remove, step_of

SHARD_SIZE = "2GB"
"""Largest size of a file of weights; writing needs this much memory in addition to the model."""


@dataclass(frozen=True)
class Export:
    """What is written of a run.

    Attributes:
        run: the run.
        step: of the checkpoint.
        ema: the EMA's weights if the checkpoint has them, not the trained ones.
        lora: the LoRA alone that the run trains; False: a pipeline, in which a LoRA is merged into the weights.
    """

    run: Run
    step: int
    ema: bool = True
    lora: bool = False

    @property
    def folder(self) -> Path:
        """The folder in the run that it has by default."""
        kind = "loras" if self.lora else "pipelines"
        return self.run.folder / kind / f"step={self.step:07d}{'' if self.ema else '_no_ema'}"

    def write(self, target: Path) -> None:
        """Write it under a temporary name, and rename that when it is complete.

        Raises:
            FileExistsError: there is something at its place.
        """
        if target.exists():
            raise FileExistsError(f"{target} exists: remove it, or give another --output")
        partial = target.with_name(f"{target.name}.partial")
        remove(partial)
        model = load_module(self.run, self.step, self.ema)
        if self.lora:
            save_lora(partial, model.transformer)
        else:
            if model.lora is not None:
                merge_adapter(model.transformer)
            model.pipeline().save_pretrained(partial, max_shard_size=SHARD_SIZE)
        partial.rename(target)


def trains_lora(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is of a run that trains a LoRA."""
    return read_metadata(checkpoint)["nami"]["model"].get("lora.rank") is not None


def find_start(recipe: Recipe, fresh: bool) -> Export | None:
    """Return the pipeline by which a recipe starts from another run; None if its ``model.pretrained`` names no run.

    It is of the run's newest checkpoint; of a recipe whose own run goes on it is the one that this was begun with.

    Args:
        recipe: its ``model.pretrained`` may be a run's folder, or the name of a run.
        fresh: begin the recipe's own run anew.
    """
    source = recipe.config.model.pretrained
    if source is None or Path(source, "model_index.json").is_file() or not is_run(source):
        return None
    run, begun = find_run(source), Run(recipe.folder)
    if not fresh and begun.recipe.exists():
        before = Path((read_layer(begun.recipe).get("model") or {}).get("pretrained") or "")
        if before.parent == run.folder / "pipelines":
            return Export(run, step_of(before))
    return Export(run, step_of(run.checkpoint()))
