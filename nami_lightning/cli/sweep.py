"""``lightning sweep``: train a list of recipes, each in turn, then compare them."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.compare import add_output_options, write_comparison


def add_command(commands: Any) -> None:
    """Add ``sweep`` to the command line."""
    parser = commands.add_parser(
        "sweep",
        help="train a list of recipes, then compare",
        description="Train the runs that FILE lists (recipes/experiments/ has examples), each in turn, then compare "
        "them. Run again to go on: finished runs are left alone, half-done ones resume.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a YAML file (output_dir, runs: [{recipe, name, overrides}]), or the name of a packaged one",
    )
    add_output_options(parser)
    parser.set_defaults(execute=sweep)


def sweep(options: Namespace) -> None:
    """Train a list of recipes, then compare those that left a run.

    Raises:
        RuntimeError: naming the runs that failed.
    """
    from nami_lightning.comparison.sweep import find_sweep, train_all
    from nami_lightning.runs.run_dir import Run

    path = find_sweep(options.file)
    file, failed = train_all(path)
    folders = [Path(file.output_dir) / run.name for run in file.runs]
    there = [folder for folder in folders if Run(folder).recipe.exists()]
    if there:
        output = Path(options.output or Path(file.output_dir) / "comparisons" / path.stem)
        write_comparison(there, file.by, options.resamples, output)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}; the same command goes on with what isn't finished")
