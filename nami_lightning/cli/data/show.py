"""``lightning data show``: print counts and captions, write a contact sheet."""

from argparse import Namespace
from pathlib import Path
from typing import Any


def add_command(commands: Any) -> None:
    """Add ``data show`` to the command line."""
    parser = commands.add_parser(
        "show", help="print counts and captions, write a contact sheet", description="Print what a data set contains."
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a prepared data set, or its URL (s3://bucket/path)")
    parser.add_argument(
        "--output", metavar="DIR", default=".", help="folder of contact_sheet.png (default: the current folder)"
    )
    parser.add_argument("--images", type=int, default=48, help="number of images on the contact sheet (default 48)")
    parser.set_defaults(execute=show)


def show(options: Namespace) -> None:
    """Print what a data set contains, and write a contact sheet; of captions of a model also a page."""
    from nami_lightning.datamodules.captioning.side_by_side import has_new_captions, write_side_by_side
    from nami_lightning.datamodules.storage.dataset import PreparedDataset
    from nami_lightning.datamodules.storage.inspect import show as show_dataset
    from nami_lightning.datamodules.storage.inspect import unused

    show_dataset(options.folder, Path(options.output), options.images)
    dataset = PreparedDataset(options.folder)
    if options.images and has_new_captions(dataset) and dataset.cache is None:
        page = unused(Path(options.output) / "captions.html")
        write_side_by_side(dataset, page, options.images)
        print(f"Its captions side by side: {page}")
