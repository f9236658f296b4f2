"""``lightning data``: make a data set of images with captions, encode it, look at it, check it."""

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

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from nami_lightning.datamodules.preparation.prepare_parts import Preparation
    from nami_lightning.datamodules.sources.base import Source

EXAMPLES = """\
examples:
  lightning data prepare --source photos/ --output shards/ --resolutions 256 512 1024
  lightning data prepare --source 'laion/*.tar' --output shards/ --resolutions 256 512 --filters.min_aesthetic 5
  lightning data prepare recipes/openmoji.yaml             what the recipe's data: block says
  lightning data encode recipes/nami_0.6b.yaml             latents and text states: training without the encoders
  lightning data show shards/                              counts, captions, a contact sheet
  lightning data verify shards/                            read all, and report the damaged
"""

PREPARE = """\
Make a data set of a collection of images with captions. Run the same command again to go on after an interruption.
On many machines: the same command with --shard I/N on each, then with --merge on one.
`lightning data prepare RECIPE` does the same with the source and settings of a recipe's data: block."""


ENCODE = """\
Encode a recipe's images and captions once, with the recipe's autoencoder and text encoder: latents of every stage that
may draw an image, and token states of every caption, in bfloat16. Training on the result loads neither encoder, until a
callback draws pictures, and gives the same losses: same order, same captions, same noise. The result is a data set of
its own; it records which encoders made it, in which revision, and training with others is refused.

Run the same command again to go on after an interruption. On many GPUs or machines: the same command with --shard I/N
on each, then with --merge on one."""

ENCODE_EPILOG = """\
Any recipe key can follow: --data.init_args.folder shards/ --model.text_encoder.max_length 128

examples:
  lightning data encode recipes/openmoji.yaml
  lightning data encode recipes/nami_0.6b.yaml --data.init_args.folder shards/ --output latents/ --batch_size 32
  CUDA_VISIBLE_DEVICES=3 lightning data encode recipes/nami_0.6b.yaml --shard 3/8
  lightning run recipes/nami_0.6b.yaml --data.init_args.folder latents/"""

SOURCE = (
    "A folder of images, tars or Parquet files, a saved Hugging Face dataset; or the class of a source (ImageFolder, "
    "OpenMoji, yours by its class path), whose arguments follow as --source.NAME."
)
WORKERS = "Processes."
SHARD = "I/N: only the I-th of N shares of the work, I from 0."
MERGE = "Only join what the shards have made."


def add_command(commands: Any) -> None:
    """Add ``data`` and what it does to the command line."""
    parser = commands.add_parser(
        "data",
        help="image-caption collections to shards",
        description="Make a data set of any collection of images with captions, look at it, check it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    # These two have parsers of their own, below: they take every setting of a preparation, or every key of a recipe.
    for name, what, execute in (
        ("prepare", "images and captions to shards", prepare),
        ("encode", "images and captions to latents and text states", encode),
    ):
        own = commands.add_parser(name, help=what, add_help=False, allow_abbrev=False)
        own.set_defaults(execute=execute, takes_keys=True)

    shower = commands.add_parser("show", help="counts, captions, a contact sheet", description="Print what it is.")
    shower.add_argument("folder", metavar="DIR", help="a prepared data set, or its URL (s3://bucket/path)")
    shower.add_argument("--out", metavar="DIR", default=".", help="where contact_sheet.png goes (default: here)")
    shower.add_argument("--images", type=int, default=48, help="images on it (default 48)")
    shower.set_defaults(execute=show)

    verifier = commands.add_parser("verify", help="read all, and report the damaged", description="Read it whole.")
    verifier.add_argument("folder", metavar="DIR", help="a prepared data set")
    verifier.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    verifier.set_defaults(execute=verify)


def prepare(options: Namespace) -> None:
    """From a source, or from a recipe's, to a data set.

    Raises:
        ValueError: arguments that don't fit together.
    """
    from nami_lightning.datamodules.multi_resolution import MultiResolutionDataModule
    from nami_lightning.datamodules.preparation.prepare import is_complete, merge
    from nami_lightning.datamodules.preparation.prepare_parts import prepare_parts
    from nami_lightning.datamodules.storage.dataset import PreparedDataset
    from nami_lightning.datamodules.storage.inspect import outcome
    from nami_lightning.runs.recipe import Recipe

    arguments = list(options.overrides)
    if arguments and not arguments[0].startswith("-"):
        work, overrides = _work_parser().parse_known_args(arguments)
        data = Recipe(work.recipe, overrides).make_data()
        if not isinstance(data, MultiResolutionDataModule) or data.source is None:
            raise ValueError(f"{work.recipe} has no data.init_args.source to prepare from")
        source, output, preparation = data.source, data.dataset_folder, data.preparation
    else:
        work, source, preparation = _parse(arguments)
        output = Path(work.output)
    if is_complete(source, output, preparation):
        print(f"{output} is complete.")
    elif work.shard is not None:
        prepare_parts(source, output, preparation, work.workers, parse_shard(work.shard))
        print(f"Shard {work.shard} is done. When all are: the same command with --merge instead of --shard.")
        return
    else:
        if not work.merge:
            prepare_parts(source, output, preparation, work.workers)
        merge(source, output, preparation)
    print("\n".join(outcome(PreparedDataset(output))))


def _work_parser() -> argparse.ArgumentParser:
    """What ``lightning data prepare RECIPE`` takes besides recipe keys."""
    parser = argparse.ArgumentParser(prog="lightning data prepare", description=PREPARE, allow_abbrev=False)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=WORKERS)
    parser.add_argument("--shard", metavar="I/N", help=SHARD)
    parser.add_argument("--merge", action="store_true", help=MERGE)
    return parser


def _prepare_parser() -> ArgumentParser:
    """What ``lightning data prepare --source ...`` takes: every setting of a preparation."""
    from jsonargparse import ArgumentParser

    from nami_lightning.datamodules.preparation.prepare_parts import Preparation
    from nami_lightning.datamodules.sources.base import Source

    parser = ArgumentParser(prog="lightning data prepare", description=PREPARE, exit_on_error=False)
    parser.add_argument("--source", type=Source, required=True, help=SOURCE)
    parser.add_argument("--output", type=str, required=True, help="The data set's folder.")
    parser.add_class_arguments(Preparation, as_group=False)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=WORKERS)
    parser.add_argument("--shard", type=str, help=SHARD)
    parser.add_argument("--merge", action="store_true", help=MERGE)
    return parser


def _parse(arguments: Sequence[str]) -> tuple[Any, Source, Preparation]:
    from jsonargparse import ArgumentError

    from nami_lightning.datamodules.preparation.prepare_parts import Preparation
    from nami_lightning.errors import explain
    from nami_lightning.runs.recipe import keys

    parser = _prepare_parser()
    try:
        config = parser.parse_args(_expand(arguments))
        objects = parser.instantiate(config)
    except ArgumentError as error:
        raise ValueError(f"lightning data prepare: {explain(error, keys(parser))}") from error
    preparation = Preparation(**{field.name: objects[field.name] for field in fields(Preparation)})
    if not preparation.resolutions:
        raise ValueError("lightning data prepare: give --resolutions, 256 512 1024 say")
    return config, objects.source, preparation


def _expand(arguments: Sequence[str]) -> list[str]:
    """``--resolutions 256 512`` as a list, and a path given as ``--source`` as the class that reads what lies there."""
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
            raise FileNotFoundError(f"nothing lies at {value}, nor is it one of the sources {', '.join(known)}")
        return ["--source", value if "." in value else f"nami_lightning.datamodules.sources.{value}"]
    kind = type(find_source(value))
    return ["--source", f"{kind.__module__}.{kind.__name__}", "--source.path", value]


def parse_shard(text: str) -> tuple[int, int]:
    """``I/N`` as two numbers.

    Raises:
        ValueError: it is not that, or I is not one of 0..N-1.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"--shard must be I/N with I from 0 to N-1, 0/4 say; got {text}")
    return int(match[1]), int(match[2])


def encode(options: Namespace) -> None:
    """From a recipe's data set of images to one of latents and text states.

    Raises:
        ValueError: arguments that don't fit together.
    """
    from nami_lightning.datamodules.multi_resolution import MultiResolutionDataModule
    from nami_lightning.datamodules.precomputed.encode import Encoding, encode_parts, merge
    from nami_lightning.datamodules.storage.dataset import ENCODINGS
    from nami_lightning.runs.recipe import Recipe

    work, overrides = _encode_parser().parse_known_args(list(options.overrides))
    recipe = Recipe(work.recipe, overrides)
    data = recipe.make_data()
    if not isinstance(data, MultiResolutionDataModule):
        raise ValueError(f"{work.recipe}: data.class_path must be a MultiResolutionDataModule to be encoded")
    images = data.dataset
    if images.cache and not work.output:
        raise ValueError(f"{images.location} is remote: say with --output where its encodings go")
    output = Path(work.output) if work.output else images.folder / ENCODINGS / "latents"
    encoding = Encoding(recipe.make_model().to(work.device), images, output, work.crops)
    if encoding.is_complete():
        print(f"{output} is complete.")
    elif work.shard is not None:
        encode_parts(encoding, work.batch_size, work.workers, parse_shard(work.shard))
        print(f"Shard {work.shard} is done. When all are: the same command with --merge instead of --shard.")
        return
    else:
        if not work.merge:
            encode_parts(encoding, work.batch_size, work.workers)
        merge(encoding)
    run = ["lightning", "run", work.recipe, *overrides, "--data.init_args.folder", str(output)]
    print(f"To train on it: {shlex.join(run)}")


def _encode_parser() -> argparse.ArgumentParser:
    """What ``lightning data encode RECIPE`` takes besides recipe keys."""
    import torch

    parser = argparse.ArgumentParser(
        prog="lightning data encode",
        description=ENCODE,
        epilog=ENCODE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="names the data set, the encoders and the resolutions")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="default: encodings/latents in the data set's own folder, if it isn't remote",
    )
    parser.add_argument(
        "--crops",
        type=int,
        default=1,
        metavar="N",
        help="crops stored of each training image, of which training draws one each time; for data prepared with "
        "crop: random (default 1)",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="images, or captions, encoded at once (default 8)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one"
    )
    workers = min(4, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=workers, help=f"processes that decode (default {workers})")
    parser.add_argument("--shard", metavar="I/N", help=SHARD)
    parser.add_argument("--merge", action="store_true", help=MERGE)
    return parser


def show(options: Namespace) -> None:
    """Print what a data set is, and draw a contact sheet."""
    from nami_lightning.datamodules.storage.inspect import show as show_dataset

    show_dataset(options.folder, Path(options.out), options.images)


def verify(options: Namespace) -> None:
    """Read a data set whole; exit status 1 if anything is damaged.

    Raises:
        ValueError: it is remote.
    """
    from nami_lightning.datamodules.storage.remote import is_remote
    from nami_lightning.datamodules.storage.verify import report

    if is_remote(options.folder):
        raise ValueError(
            f"{options.folder} is remote: copy it to a disk, and verify the copy. Training checks each chunk that it "
            "fetches against its checksum"
        )
    sys.exit(report(Path(options.folder), options.workers))
