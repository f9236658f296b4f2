"""``lightning show``: print a run's progress, its last losses, and where its files are."""

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import RUN_HELP


def add_command(commands: Any) -> None:
    """Add ``show`` to the command line."""
    parser = commands.add_parser(
        "show", help="print the state of a run", description="Print a run's progress, its last losses, and its files."
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.set_defaults(execute=show)


def show(options: Namespace) -> None:
    """Print a run's progress, last losses and files."""
    from nami_lightning.runs.recipe import Recipe
    from nami_lightning.runs.run_dir import find_run
    from nami_lightning.runs.tensorboard import describe_curves

    run = find_run(options.run)
    recipe = Recipe(run.recipe)
    newest = run.load_newest()
    curriculum = recipe.parser.instantiate(recipe.config).curriculum
    rows = {"run": str(run.folder), "model": recipe.config.model.transformer.class_path}
    rows["progress"] = curriculum.describe(newest[1]["nami"]["step"] if newest else 0)
    rows |= {tag: f"{value:.4f} (step {step})" for tag, (step, value) in last_scalars(run.folder).items()}
    rows["checkpoints"] = ", ".join(path.name for path in run.checkpoints) or "none yet"
    samples = sorted((run.folder / "samples").glob("*.png"))
    rows["newest samples"] = str(samples[-1]) if samples else "none yet"
    rows["recipe"] = str(run.recipe)
    rows["curves"] = describe_curves([run.folder]) or "none in the run's folder"
    width = min(max(map(len, rows)), shutil.get_terminal_size().columns // 2)
    for key, value in rows.items():
        print(f"{key:{width}}  {value}")


def last_scalars(folder: Path) -> dict[str, tuple[int, float]]:
    """Return the newest value of each loss and metric in a run's TensorBoard events, as (step, value) by name."""
    from nami_lightning.runs.tensorboard import read_scalars

    kinds = ("train/loss", "val/", "metrics/", "probe/")
    found = read_scalars(folder, lambda tag: tag.startswith(kinds) and "_tau_" not in tag)
    return {tag: values[-1] for tag, values in found.items()}
