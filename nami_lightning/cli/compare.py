"""``lightning compare``: runs side by side."""

import argparse
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import resamples


def add_command(commands: Any) -> None:
    """Add ``compare`` to the command line."""
    parser = commands.add_parser(
        "compare",
        help="runs side by side: tables, plots, grids",
        description="Put runs side by side: final values, values at an equal budget, what one needs to reach another's "
        "best, and which differences are more than the metric's noise. Their recipes need the callback Metrics.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run (folder, or name below runs/)")
    parser.add_argument(
        "--by",
        choices=["steps", "samples", "flops", "time"],
        default="flops",
        help="what budget is counted in: the x-axis of the plots too (default flops)",
    )
    add_output_options(parser)
    parser.set_defaults(execute=compare)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``compare`` and ``sweep`` share."""
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="where index.html, comparison.md, plots and grid.png go (default: comparison, "
        "or for a sweep its output_dir/comparisons/FILE)",
    )
    parser.add_argument(
        "--resamples", type=resamples, default=200, help="of the bootstrap; 0 leaves it out (default 200)"
    )


def compare(options: Namespace) -> None:
    """Put runs side by side."""
    from nami_lightning.runs.run_dir import find_run

    folders = [find_run(name).folder for name in options.runs]
    write_comparison(folders, options.by, options.resamples, Path(options.output or "comparison"))


def write_comparison(folders: Sequence[Path], by: str, resamples: int, output: Path) -> None:
    """Compare the runs in ``folders``, print the tables, and say where the rest is."""
    from nami_lightning.comparison.compare import differences, load_records
    from nami_lightning.comparison.page import write

    output.mkdir(parents=True, exist_ok=True)
    records = load_records(folders)
    tables = write(records, by, output, differences(records, resamples) if resamples else [])
    print("\n\n".join(table.text() for table in tables))
    print(f"\nPage: {output / 'index.html'}  Overlay: tensorboard --logdir {output / 'tensorboard'}")
