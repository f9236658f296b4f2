"""``lightning data filter``: leave samples out by their scores, and show which."""

import argparse
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import whole_number
from nami_lightning.cli.data.part_options import default_device

DESCRIPTION = """\
Leave samples out of a prepared data set by their scores (lightning data score). Without --output, only print what each
filter would remove, and write a page with a histogram of each score and the pictures around each limit. With --output,
also write the data set of the samples that stay; chunks that stay whole are linked, not copied.

Of near-duplicates one stays: an image of --against first, then a held-out one, then the largest."""

EPILOG = """\
examples:
  lightning data filter shards/                                       look at the scores, to choose limits
  lightning data filter shards/ --filters.min_similarity 0.22 --filters.near_duplicates 6
  lightning data filter shards/ --filters.min_similarity 0.22 --filters.near_duplicates 6 --output kept/
  lightning data filter shards/ --against other/ --filters.near_duplicates 6 --output kept/"""

FILTERS: dict[str, tuple[Any, str, str]] = {
    "min_similarity": (float, "X", "lowest similarity; captions below it are dropped, and samples without any left"),
    "min_aesthetic": (float, "X", "lowest aesthetic score"),
    "min_resolution": (int, "PX", "shortest side in px that the stored image may have"),
    "min_entropy": (float, "BITS", "lowest entropy of the brightness, 0 (flat) to 8"),
    "max_text_area": (float, "SHARE", "largest share of the image that is text, 0 to 1"),
    "near_duplicates": (int, "BITS", "remove images whose hashes differ in at most this number of bits (6 is usual)"),
    "near_duplicate_cosine": (float, "X", "remove images whose features have at least this cosine (score --features)"),
}


def add_command(commands: Any) -> None:
    """Add ``data filter`` to the commands of ``data``."""
    parser = commands.add_parser(
        "filter",
        help="leave samples out by their scores, and show which",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a prepared and scored data set, or its URL")
    for name, (kind, metavar, text) in FILTERS.items():
        parser.add_argument(f"--filters.{name}", type=kind, metavar=metavar, help=text)
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="DIR", help="scored data sets: what is nearly in them is removed"
    )
    parser.add_argument(
        "--scores", nargs="+", metavar="DIR", help="folders of the scores (default: scores in the data set's folder)"
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the new data set; without it, nothing is written")
    parser.add_argument(
        "--page", metavar="FILE", default="filter.html", help="the page (default: filter.html here, numbered)"
    )
    parser.add_argument(
        "--images", type=whole_number, default=12, metavar="N", help="pictures on each side of a limit (default 12)"
    )
    parser.add_argument("--device", help="device that compares features (default: cuda if there is one)")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that write (default: all cores)",
    )
    parser.set_defaults(execute=filter_samples)


def filter_samples(options: Namespace) -> None:
    """Print and show what filters remove, and write the data set of the samples that stay.

    Raises:
        ValueError: the options don't fit together.
    """
    from nami_lightning.datamodules.preparation.parts_folder import check_unused
    from nami_lightning.datamodules.scoring.filter import ScoreFilters, decide, write_filtered
    from nami_lightning.datamodules.scoring.filter_page import write_filter_page
    from nami_lightning.datamodules.scoring.score_files import read_scores, scores_folder
    from nami_lightning.datamodules.storage.dataset import PreparedDataset
    from nami_lightning.datamodules.storage.inspect import unused

    filters = ScoreFilters(**{name: getattr(options, f"filters.{name}") for name in FILTERS})
    dataset = PreparedDataset(options.folder)
    folders = [Path(folder) for folder in options.scores or [scores_folder(dataset, None)]]
    features = filters.near_duplicate_cosine is not None
    if options.against and filters.near_duplicates is None and not features:
        raise ValueError("--against needs --filters.near_duplicates or --filters.near_duplicate_cosine")
    if options.output:
        check_unused(Path(options.output), "is not empty")
    scores = read_scores(dataset, folders, features)
    others = [PreparedDataset(folder) for folder in options.against]
    other_scores = [read_scores(other, [scores_folder(other, None)], features) for other in others]
    decision = decide(scores, filters, other_scores, default_device(options.device))
    print("\n".join(decision.lines()))
    page = unused(Path(options.page))
    write_filter_page(decision, page, options.images)
    print(f"\nHistograms and pictures: {page}")
    if options.output:
        write_filtered(decision, Path(options.output), options.workers)
        print(f"The samples that stay: {options.output}")
