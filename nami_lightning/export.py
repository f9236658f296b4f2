"""``lightning export``: a checkpoint, one file or every rank's shards, as a folder for NamiPipeline.from_pretrained."""

from argparse import Namespace
from pathlib import Path

from nami_lightning.runs.load import load_module
from nami_lightning.runs.run_dir import find_run, remove, step_of

SHARD_SIZE = "2GB"
"""Largest file of weights, which is what writing needs besides the model itself."""


def export(options: Namespace) -> Path:
    """Write the pipeline folder under a temporary name, and rename it when it is complete.

    Args:
        options: ``run``, ``step`` (or None for the newest), ``output`` (or None: below the run), ``ema``.

    Raises:
        FileNotFoundError: no such run, or no such checkpoint.
        FileExistsError: the output is there already.
    """
    this = find_run(options.run)
    step = step_of(this.checkpoint(options.step))
    target = Path(options.output or this.folder / "pipelines" / f"step={step:07d}{'' if options.ema else '_no_ema'}")
    if target.exists():
        raise FileExistsError(f"{target} exists: remove it, or give another --output")
    partial = target.with_name(f"{target.name}.partial")
    remove(partial)
    module = load_module(this, step, options.ema)
    module.pipeline().save_pretrained(partial, max_shard_size=SHARD_SIZE)
    partial.rename(target)
    return target
