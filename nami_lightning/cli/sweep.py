"""``lightning sweep``: train a list of recipes one after the other, then compare the runs."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.compare import add_output_options, write_comparison


def add_command(commands: Any) -> None:
    """Add ``sweep`` to the command line."""
    parser = commands.add_parser(
        "sweep",
        help="train a list of recipes, then compare the runs",
        description="Train the runs that FILE lists, one after the other, then compare them; recipes/experiments/ "
        "has examples. If it is interrupted, run it again: finished runs are left alone, the others resume.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a sweep file (output_dir, runs: [{recipe, name, overrides}]), or the name of a packaged sweep",
    )
    add_output_options(parser)
    parser.set_defaults(execute=sweep)


def sweep(options: Namespace) -> None:
    """Train a list of recipes, then compare those that have a run.

    Raises:
        RuntimeError: a run failed; the message names all that did.
    """
    from nami_lightning.comparison.sweep import find_sweep, train_all
    from nami_lightning.runs.run_dir import Run

    path = find_sweep(options.file)
    file, failed = train_all(path)
    folders = [Path(file.output_dir) / run.name for run in file.runs]
    trained = [folder for folder in folders if Run(folder).recipe.exists()]
    if trained:
        output = Path(options.output or Path(file.output_dir) / "comparisons" / path.stem)
        write_comparison(trained, file.by, options.resamples, output, options.logger)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}; run the same command again to resume what isn't finished")
