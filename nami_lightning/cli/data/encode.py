"""``lightning data encode``: encode a data set to latents and text states, to train without the encoders."""

import argparse
import os
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import parse_shard
from nami_lightning.cli.data.part_options import add_part_options
from nami_lightning.cli.ray_engine import run_overrides_on_ray

DESCRIPTION = """\
Encode the images and captions of a recipe once, with its autoencoder and text encoder: the latents of every stage that
may use an image, and the token states of every caption, in bfloat16. Training on the result loads neither encoder until
a callback generates images, and has the same losses: same order, same captions, same noise. The result is a separate
data set. It records which encoders made it, in which revision, and can't be used for training with others.

After an interruption, run the same command again to resume. On many GPUs or machines, run the command with --shard I/N
on each, and then with --merge on one of them."""

EPILOG = """\
Any recipe key can follow: --data.init_args.folder shards/ --model.text_encoder.max_length 128

examples:
  lightning data encode recipes/openmoji.yaml
  lightning data encode recipes/nami_0.6b.yaml --data.init_args.folder shards/ --output latents/ --batch_size 32
  CUDA_VISIBLE_DEVICES=3 lightning data encode recipes/nami_0.6b.yaml --shard 3/8
  lightning run recipes/nami_0.6b.yaml --data.init_args.folder latents/"""


def add_command(commands: Any) -> None:
    """Add ``data encode`` to the command line; it has its own parser below, because it takes every recipe key."""
    parser = commands.add_parser(
        "encode", help="encode images and captions to latents and text states", add_help=False, allow_abbrev=False
    )
    parser.set_defaults(execute=encode, takes_keys=True)


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
    output: Path | str = settings.output or images.folder / ENCODINGS / "latents"
    encoding = EncodingTask(recipe.make_model().to(settings.device), images, output, settings.crops)
    if encoding.is_complete():
        print(f"{output} is complete.")
    elif settings.shard is not None:
        encode_parts(encoding, settings.batch_size, settings.workers, parse_shard(settings.shard))
        print(f"Shard {settings.shard} is done. When all are done, run the command with --merge instead of --shard.")
        return
    else:
        if settings.engine == "ray" and not settings.merge:
            run_overrides_on_ray(encode, options.overrides, settings)
        elif not settings.merge:
            encode_parts(encoding, settings.batch_size, settings.workers)
        merge(encoding)
    run = ["lightning", "run", settings.recipe, *overrides, "--data.init_args.folder", str(output)]
    print(f"To train on it: {shlex.join(run)}")


def _encode_parser() -> argparse.ArgumentParser:
    """Return the parser of the options of ``lightning data encode RECIPE`` that aren't recipe keys."""
    import torch

    parser = argparse.ArgumentParser(
        prog="lightning data encode",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="recipe that states the data set, the encoders and the resolutions"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the encodings, or its URL (default: encodings/latents in the data set's folder, if that isn't "
        "remote)",
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
    add_part_options(parser, workers, f"number of processes that decode images (default {workers})")
    return parser
