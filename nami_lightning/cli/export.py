"""``lightning export``: write a checkpoint as a folder for NamiPipeline.from_pretrained."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import RUN_HELP, add_checkpoint_options

SHARD_SIZE = "2GB"
"""Largest size of a file of weights; writing needs this much memory in addition to the model."""


def add_command(commands: Any) -> None:
    """Add ``export`` to the command line."""
    parser = commands.add_parser(
        "export",
        help="write a checkpoint as a diffusers pipeline",
        description="Write a checkpoint, of one process or of many, as a folder for NamiPipeline.from_pretrained. "
        "This needs no GPU, and only as much memory as the model itself.",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    add_checkpoint_options(parser)
    parser.add_argument("--output", metavar="DIR", help="folder to create (default: RUN/pipelines/step=NNNNNNN)")
    parser.set_defaults(execute=export)


def export(options: Namespace) -> None:
    """Write the pipeline's folder under a temporary name, and rename it when it is complete.

    Args:
        options: ``run``; ``step``, or None for the newest checkpoint; ``output``, or None for a folder in the run;
            ``ema``: False for the trained weights in place of the EMA's.

    Raises:
        FileNotFoundError: the run or the checkpoint does not exist.
        FileExistsError: the output already exists.
    """
    from nami_lightning.runs.load import load_module
    from nami_lightning.runs.run_dir import find_run, remove, step_of

    run = find_run(options.run)
    ema = options.ema is not False
    step = step_of(run.checkpoint(options.step))
    target = Path(options.output or run.folder / "pipelines" / f"step={step:07d}{'' if ema else '_no_ema'}")
    if target.exists():
        raise FileExistsError(f"{target} exists: remove it, or give another --output")
    partial = target.with_name(f"{target.name}.partial")
    remove(partial)
    load_module(run, step, ema).pipeline().save_pretrained(partial, max_shard_size=SHARD_SIZE)
    partial.rename(target)
    print(f"{target}: load it with NamiPipeline.from_pretrained, or use: lightning sample {target} --prompt '...'")
