"""``lightning data``: prepare a data set of images with captions, encode it, show it, or verify it."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nami_lightning.cli.argument_types import parse_shard

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from nami_lightning.datamodules.preparation.prepare_parts import Preparation
    from nami_lightning.datamodules.sources.base import Source

EXAMPLES = """\
examples:
  lightning data prepare --source photos/ --output shards/ --resolutions 256 512 1024
  lightning data prepare --source 'laion/*.tar' --output shards/ --resolutions 256 512 --filters.min_aesthetic 5
  lightning data prepare recipes/openmoji.yaml             the settings of the recipe's data: block
  lightning data encode recipes/nami_0.6b.yaml             latents and text states, to train without the encoders
  lightning data show shards/                              print counts and captions, write a contact sheet
  lightning data verify shards/                            read everything, and report what is damaged
"""

PREPARE = """\
Prepare a data set from a collection of images with captions. After an interruption, run the same command again to
resume. On many machines, run the command with --shard I/N on each, and then with --merge on one of them.
If the source has changed after that, the same command prepares what changed.
`lightning data prepare RECIPE` takes the source and the settings from the data: block of a recipe."""


ENCODE = """\
Encode the images and captions of a recipe once, with its autoencoder and text encoder: the latents of every stage that
may use an image, and the token states of every caption, in bfloat16. Training on the result loads neither encoder until
a callback generates images, and has the same losses: same order, same captions, same noise. The result is a separate
data set. It records which encoders made it, in which revision, and can't be used for training with others.

After an interruption, run the same command again to resume. On many GPUs or machines, run the command with --shard I/N
on each, and then with --merge on one of them."""

ENCODE_EPILOG = """\
Any recipe key can follow: --data.init_args.folder shards/ --model.text_encoder.max_length 128

examples:
  lightning data encode recipes/openmoji.yaml
  lightning data encode recipes/nami_0.6b.yaml --data.init_args.folder shards/ --output latents/ --batch_size 32
  CUDA_VISIBLE_DEVICES=3 lightning data encode recipes/nami_0.6b.yaml --shard 3/8
  lightning run recipes/nami_0.6b.yaml --data.init_args.folder latents/"""

SOURCE = (
    "A folder of images, tars or Parquet files, or a saved Hugging Face dataset; or the class of a source "
    "(ImageFolder, OpenMoji, or your own by its class path), whose arguments follow as --source.NAME."
)
WORKERS = "Number of processes."
SHARD = "I/N: do only part I of N of the work, I from 0 to N-1."
MERGE = "Only merge what the parts have written."
RESCAN = (
    "Read all of the source again. Without it, a part is read again if the name, the size or the time of modification "
    "of one of its files changed."
)


def add_command(commands: Any) -> None:
    """Add ``data`` and its subcommands to the command line."""
    parser = commands.add_parser(
        "data",
        help="prepare, encode, show or verify a data set",
        description="Prepare a data set from any collection of images with captions, encode it, show it, or verify it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    # These two have their own parsers, below: they take every setting of a preparation, or every key of a recipe.
    for name, what, execute in (
        ("prepare", "prepare shards from images with captions", prepare),
        ("encode", "encode images and captions to latents and text states", encode),
    ):
        parser_of_command = commands.add_parser(name, help=what, add_help=False, allow_abbrev=False)
        parser_of_command.set_defaults(execute=execute, takes_keys=True)

    show_parser = commands.add_parser(
        "show", help="print counts and captions, write a contact sheet", description="Print what a data set contains."
    )
    show_parser.add_argument(
        "folder", metavar="DIR", help="folder of a prepared data set, or its URL (s3://bucket/path)"
    )
    show_parser.add_argument(
        "--output", metavar="DIR", default=".", help="folder of contact_sheet.png (default: the current folder)"
    )
    show_parser.add_argument(
        "--images", type=int, default=48, help="number of images on the contact sheet (default 48)"
    )
    show_parser.set_defaults(execute=show)

    verify_parser = commands.add_parser(
        "verify",
        help="read everything, and report what is damaged",
        description="Read a whole data set, and report what is damaged.",
    )
    verify_parser.add_argument("folder", metavar="DIR", help="folder of a prepared data set")
    verify_parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="number of processes (default: all cores)"
    )
    verify_parser.set_defaults(execute=verify)


def prepare(options: Namespace) -> None:
    """Prepare a data set from a source, or from the source of a recipe.

    Raises:
        ValueError: the arguments don't fit together.
    """
    from nami_lightning.datamodules.multi_resolution import MultiResolutionDataModule
    from nami_lightning.datamodules.preparation.prepare import is_complete, merge
    from nami_lightning.datamodules.preparation.prepare_parts import prepare_parts
    from nami_lightning.datamodules.storage.dataset import PreparedDataset
    from nami_lightning.datamodules.storage.inspect import outcome
    from nami_lightning.runs.recipe import Recipe

    arguments = list(options.overrides)
    if arguments and not arguments[0].startswith("-"):
        settings, overrides = _prepare_recipe_parser().parse_known_args(arguments)
        data = Recipe(settings.recipe, overrides).make_data()
        if not isinstance(data, MultiResolutionDataModule) or data.source is None:
            raise ValueError(f"{settings.recipe} has no data.init_args.source to prepare from")
        source, output, preparation = data.source, data.dataset_folder, data.preparation
    else:
        settings, source, preparation = _parse_source_arguments(arguments)
        output = Path(settings.output)
    if is_complete(source, output, preparation, settings.rescan):
        print(f"{output} is complete.")
    elif settings.shard is not None:
        prepare_parts(source, output, preparation, settings.workers, parse_shard(settings.shard), settings.rescan)
        print(f"Shard {settings.shard} is done. When all are done, run the command with --merge instead of --shard.")
        return
    else:
        if not settings.merge:
            prepare_parts(source, output, preparation, settings.workers, rescan=settings.rescan)
        merge(source, output, preparation)
    print("\n".join(outcome(PreparedDataset(output))))


def _prepare_recipe_parser() -> argparse.ArgumentParser:
    """Return the parser of the options of ``lightning data prepare RECIPE`` that aren't recipe keys."""
    parser = argparse.ArgumentParser(prog="lightning data prepare", description=PREPARE, allow_abbrev=False)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=WORKERS)
    parser.add_argument("--shard", metavar="I/N", help=SHARD)
    parser.add_argument("--merge", action="store_true", help=MERGE)
    parser.add_argument("--rescan", action="store_true", help=RESCAN)
    return parser


def _prepare_source_parser() -> ArgumentParser:
    """Return the parser of ``lightning data prepare --source ...``, with every setting of a preparation."""
    from jsonargparse import ArgumentParser

    from nami_lightning.datamodules.preparation.prepare_parts import Preparation
    from nami_lightning.datamodules.sources.base import Source

    parser = ArgumentParser(prog="lightning data prepare", description=PREPARE, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--source", type=Source, required=True, help=SOURCE)
    parser.add_argument("--output", type=str, required=True, help="Folder of the data set.")
    parser.add_class_arguments(Preparation, as_group=False)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=WORKERS)
    parser.add_argument("--shard", type=str, help=SHARD)
    parser.add_argument("--merge", action="store_true", help=MERGE)
    parser.add_argument("--rescan", action="store_true", help=RESCAN)
    return parser


def _parse_source_arguments(arguments: Sequence[str]) -> tuple[Any, Source, Preparation]:
    from jsonargparse import ArgumentError

    from nami_lightning.datamodules.preparation.prepare_parts import Preparation
    from nami_lightning.errors import explain
    from nami_lightning.runs.recipe import keys

    parser = _prepare_source_parser()
    try:
        config = parser.parse_args(_expand_arguments(arguments))
        objects = parser.instantiate(config)
    except ArgumentError as error:
        raise ValueError(f"lightning data prepare: {explain(error, keys(parser))}") from error
    preparation = Preparation(**{field.name: objects[field.name] for field in fields(Preparation)})
    if not preparation.resolutions:
        raise ValueError("lightning data prepare: give --resolutions, 256 512 1024 for example")
    return config, objects.source, preparation


def _expand_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments in the form that the parser takes.

    ``--resolutions 256 512`` becomes a list, and a path given as ``--source`` becomes the class that reads it.
    """
    expanded: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, _, value = argument.partition("=")
        if name == "--resolutions":
            values = [value] if value else []
            while rest and not rest[0].startswith("-"):
                values.append(rest.pop(0))
            listed = values[0] if values[:1] and values[0].startswith("[") else f"[{', '.join(values)}]"
            expanded += ["--resolutions", listed]
        elif name == "--source":
            value = value or (rest.pop(0) if rest else "")
            expanded += _source_arguments(value)
        else:
            expanded.append(argument)
    return expanded


def _source_arguments(value: str) -> list[str]:
    from nami_lightning.datamodules.sources import find_source
    from nami_lightning.datamodules.sources.base import Source

    if re.fullmatch(r"[A-Za-z_][\w.]*", value) and not Path(value).exists():
        known = [kind.__name__ for kind in Source.__subclasses__()]
        if "." not in value and value not in known:
            raise FileNotFoundError(f"{value} is neither an existing path nor one of the sources {', '.join(known)}")
        return ["--source", value if "." in value else f"nami_lightning.datamodules.sources.{value}"]
    kind = type(find_source(value))
    return ["--source", f"{kind.__module__}.{kind.__name__}", "--source.path", value]


def encode(options: Namespace) -> None:
    """Encode a recipe's data set of images to a data set of latents and text states.

    Raises:
        ValueError: the arguments don't fit together.
    """
    from nami_lightning.datamodules.multi_resolution import MultiResolutionDataModule
    from nami_lightning.datamodules.precomputed.encode import encode_parts, merge
    from nami_lightning.datamodules.precomputed.encoding_task import EncodingTask
    from nami_lightning.datamodules.storage.dataset import ENCODINGS
    from nami_lightning.runs.recipe import Recipe

    settings, overrides = _encode_parser().parse_known_args(list(options.overrides))
    recipe = Recipe(settings.recipe, overrides)
    data = recipe.make_data()
    if not isinstance(data, MultiResolutionDataModule):
        raise ValueError(f"{settings.recipe}: data.class_path must be a MultiResolutionDataModule to be encoded")
    images = data.dataset
    if images.cache and not settings.output:
        raise ValueError(f"{images.location} is remote: give the folder of its encodings with --output")
    output = Path(settings.output) if settings.output else images.folder / ENCODINGS / "latents"
    encoding = EncodingTask(recipe.make_model().to(settings.device), images, output, settings.crops)
    if encoding.is_complete():
        print(f"{output} is complete.")
    elif settings.shard is not None:
        encode_parts(encoding, settings.batch_size, settings.workers, parse_shard(settings.shard))
        print(f"Shard {settings.shard} is done. When all are done, run the command with --merge instead of --shard.")
        return
    else:
        if not settings.merge:
            encode_parts(encoding, settings.batch_size, settings.workers)
        merge(encoding)
    run = ["lightning", "run", settings.recipe, *overrides, "--data.init_args.folder", str(output)]
    print(f"To train on it: {shlex.join(run)}")


def _encode_parser() -> argparse.ArgumentParser:
    """Return the parser of the options of ``lightning data encode RECIPE`` that aren't recipe keys."""
    import torch

    parser = argparse.ArgumentParser(
        prog="lightning data encode",
        description=ENCODE,
        epilog=ENCODE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="recipe that states the data set, the encoders and the resolutions"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the encodings (default: encodings/latents in the data set's folder, if that isn't remote)",
    )
    parser.add_argument(
        "--crops",
        type=int,
        default=1,
        metavar="N",
        help="number of crops stored of each training image, of which training uses one at random each time; for data "
        "prepared with crop: random (default 1)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=8, help="number of images, or of captions, encoded at once (default 8)"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device that encodes (default: cuda if there is one)",
    )
    workers = min(4, os.cpu_count() or 1)
    parser.add_argument(
        "--workers", type=int, default=workers, help=f"number of processes that decode images (default {workers})"
    )
    parser.add_argument("--shard", metavar="I/N", help=SHARD)
    parser.add_argument("--merge", action="store_true", help=MERGE)
    return parser


def show(options: Namespace) -> None:
    """Print what a data set contains, and write a contact sheet."""
    from nami_lightning.datamodules.storage.inspect import show as show_dataset

    show_dataset(options.folder, Path(options.output), options.images)


def verify(options: Namespace) -> None:
    """Read a whole data set; the exit status is 1 if anything is damaged.

    Raises:
        ValueError: the data set is remote.
    """
    from nami_lightning.datamodules.storage.remote import is_remote
    from nami_lightning.datamodules.storage.verify import report

    if is_remote(options.folder):
        raise ValueError(
            f"{options.folder} is remote: copy it to a disk, and verify the copy. Training compares each chunk that it "
            "downloads with its checksum"
        )
    sys.exit(report(Path(options.folder), options.workers))
