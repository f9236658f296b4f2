"""``lightning data score``: score the samples of a data set, and write the scores beside them."""

import argparse
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import parse_shard, positive_int, whole_number
from nami_lightning.cli.data.part_options import SHARD, default_device

DESCRIPTION = """\
Score the samples of a prepared data set, and write the scores beside them: the similarity of each caption and its image
by a CLIP or SigLIP, the aesthetic score, the share of text, and without any network resolution, entropy and what
near-duplicates share. The samples stay as they are: lightning data filter uses the scores.

After an interruption, run the same command again to resume. On many GPUs or machines, run it with --shard I/N on each;
nothing has to be merged."""

EPILOG = """\
examples:
  lightning data score shards/                                        what needs no network
  lightning data score shards/ --clip openai/clip-vit-large-patch14 --aesthetic sac+logos+ava1-l14-linearMSE.pth
  lightning data score shards/ --clip google/siglip2-so400m-patch14-384 --features --scores scores_siglip/
  CUDA_VISIBLE_DEVICES=3 lightning data score shards/ --clip openai/clip-vit-large-patch14 --shard 3/8"""


def add_command(commands: Any) -> None:
    """Add ``data score`` to the commands of ``data``."""
    parser = commands.add_parser(
        "score",
        help="score samples: similarity, aesthetic quality, near-duplicates",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a prepared data set, or its URL")
    parser.add_argument("--clip", metavar="NAME", help="hub name or folder of a CLIP or SigLIP: similarity")
    parser.add_argument(
        "--aesthetic", metavar="NAME", help="file, folder or hub name of a predictor on the features of --clip"
    )
    parser.add_argument(
        "--text_detector", metavar="NAME", help="hub name or folder of a detector of text: share of the image"
    )
    parser.add_argument(
        "--features", action="store_true", help="store the features of --clip too, to find near-duplicates by them"
    )
    parser.add_argument(
        "--scores", metavar="DIR", help="folder of the scores (default: scores in the data set's folder)"
    )
    parser.add_argument("--batch_size", type=positive_int, default=64, metavar="N", help="images at once (default 64)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of --clip (default float32)"
    )
    parser.add_argument("--device", help="device that scores (default: cuda if there is one)")
    workers = min(4, os.cpu_count() or 1)
    parser.add_argument(
        "--workers",
        type=whole_number,
        default=workers,
        metavar="N",
        help=f"processes that decode images (default {workers})",
    )
    parser.add_argument("--shard", metavar="I/N", help=SHARD)
    parser.set_defaults(execute=score)


def score(options: Namespace) -> None:
    """Score a data set, and print the quantiles of its scores.

    Raises:
        ValueError: the options don't fit together.
    """
    from nami_lightning.datamodules.scoring.score import ScoreModels, score
    from nami_lightning.datamodules.scoring.score_files import scores_folder
    from nami_lightning.datamodules.storage.dataset import PreparedDataset

    models = ScoreModels(options.clip, options.aesthetic, options.text_detector, options.features, options.dtype)
    dataset = PreparedDataset(options.folder)
    folder = scores_folder(dataset, options.scores)
    shard = parse_shard(options.shard) if options.shard else (0, 1)
    score(dataset, folder, models, options.batch_size, options.workers, default_device(options.device), shard)
    print(f"The scores are in {folder}." if shard[1] == 1 else f"Shard {options.shard} is done.")
    if shard[1] == 1:
        print("\n".join(_quantiles(dataset, folder)))


def _quantiles(dataset: Any, folder: Path) -> list[str]:
    """Return the table of the quantiles of a data set's scores."""
    from nami_lightning.datamodules.scoring.score_files import quantile_lines, read_scores

    return quantile_lines(read_scores(dataset, [folder]))
