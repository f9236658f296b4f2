"""``lightning compare``: compare runs by tables, plots and images."""

import argparse
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import RUN_HELP, resample_count


def add_command(commands: Any) -> None:
    """Add ``compare`` to the command line."""
    parser = commands.add_parser(
        "compare",
        help="compare runs by tables, plots and images",
        description="Compare runs: final values, values at an equal budget, the budget that one needs to reach the "
        "best value of another, and which differences are more than the metric's noise. These need the callback "
        "Metrics in the runs' recipes; validation losses and the differences of the recipes are shown without it.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--by",
        choices=["steps", "samples", "flops", "time"],
        default="flops",
        help="budget that runs are compared by, also the x-axis of the plots (default flops)",
    )
    add_output_options(parser)
    parser.set_defaults(execute=compare)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``compare`` and ``sweep`` share."""
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder of index.html, comparison.md, the plots and grid.png (default: comparison; "
        "for a sweep, comparisons/FILE in its output_dir)",
    )
    parser.add_argument(
        "--resamples",
        type=resample_count,
        default=200,
        help="number of bootstrap resamples; 0 leaves the bootstrap out (default 200)",
    )
    parser.add_argument(
        "--logger",
        metavar="LOGGER",
        help="logger that gets the tables and the grid too, as a recipe names one: a class, or YAML with class_path "
        "and init_args, or a file of such YAML",
    )


def compare(options: Namespace) -> None:
    """Compare runs, and write the comparison."""
    from nami_lightning.runs.run_dir import find_run

    folders = [find_run(name).folder for name in options.runs]
    write_comparison(folders, options.by, options.resamples, Path(options.output or "comparison"), options.logger)


def write_comparison(folders: Sequence[Path], by: str, resamples: int, output: Path, logger: str | None = None) -> None:
    """Compare the runs in ``folders``, write the comparison, print its tables and its path, and give it to a logger."""
    from nami_lightning.comparison.compare import differences, load_records
    from nami_lightning.comparison.page import log_comparison, write_page
    from nami_lightning.runs.loggers import make_logger

    watched = make_logger(logger) if logger else None
    output.mkdir(parents=True, exist_ok=True)
    records = load_records(folders)
    tables = write_page(records, by, output, differences(records, resamples) if resamples else [])
    print("\n\n".join(table.text() for table in tables))
    events = output / "tensorboard"
    print(f"\nPage: {output / 'index.html'}" + (f"  TensorBoard: tensorboard --logdir {events}" * events.is_dir()))
    if watched is not None:
        log_comparison(watched, tables, output)
