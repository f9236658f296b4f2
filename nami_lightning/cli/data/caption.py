"""``lightning data caption``: more captions of each image, written by a model."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import parse_shard, positive_int
from nami_lightning.cli.data.part_options import MERGE, SHARD, default_device

DESCRIPTION = """\
Let a model write more captions of each image of a prepared data set. The result is a separate data set, in which each
image has its old captions and the new ones, with weights: training picks one of them at random.

Each answer of the model is written down at once. After an interruption, run the same command again to resume. On many
GPUs or machines, run the command with --shard I/N on each, and then with --merge on one of them."""

EPILOG = """\
A file of --kinds_file holds kinds by name, of which only the prompt must be there:
  plain: {prompt: "List what is in this image, in at most {max_length} characters.", min_length: 5, max_length: 200,
          max_tokens: 80}

examples:
  lightning data caption shards/ --output captioned/ --model Qwen/Qwen2.5-VL-7B-Instruct
  lightning data caption shards/ --output captioned/ --model HuggingFaceTB/SmolVLM-Instruct --kinds short long \\
      --weights old=1 short=1 long=3 --context
  lightning data caption shards/ --output captioned/ --model Qwen/Qwen2.5-VL-7B-Instruct --languages English German
  CUDA_VISIBLE_DEVICES=3 lightning data caption shards/ --output captioned/ --model ... --shard 3/8"""


def add_command(commands: Any) -> None:
    """Add ``data caption`` to the commands of ``data``."""
    parser = commands.add_parser(
        "caption",
        help="let a model write more captions of each image",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a prepared data set, or its URL")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the new data set")
    parser.add_argument(
        "--model", metavar="NAME", required=True, help="hub name or folder of a model that takes images and gives text"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=["short", "medium", "long"],
        metavar="KIND",
        help="kinds of captions: short, medium, long, or those of --kinds_file (default: all three)",
    )
    parser.add_argument("--kinds_file", metavar="FILE", help="YAML file with kinds of your own, or other prompts")
    parser.add_argument(
        "--languages", nargs="+", default=[], metavar="NAME", help="languages, as the prompt names them: German"
    )
    parser.add_argument("--context", action="store_true", help="tell the model the image's first caption")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="KIND=X",
        type=parse_weight,
        help="how often training uses each kind, and the captions that were there (old); default: all 1",
    )
    parser.add_argument(
        "--name", default="", help="beginning of the new kinds' names, if the data set has captions of another model"
    )
    parser.add_argument("--batch_size", type=positive_int, default=8, metavar="N", help="images at once (default 8)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the model's weights (default: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument("--device", help="device that captions (default: cuda if there is one)")
    parser.add_argument("--shard", metavar="I/N", help=SHARD)
    parser.add_argument("--merge", action="store_true", help=MERGE)
    parser.set_defaults(execute=caption)


def parse_weight(text: str) -> tuple[str, float]:
    """Return the name and the number of ``NAME=X``."""
    name, equals, number = text.rpartition("=")
    try:
        if equals and name:
            return name, float(number)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be KIND=X, for example long=3; got {text}")


def caption(options: Namespace) -> None:
    """Caption a data set, and print how many captions of each kind it has, and how long they are.

    Raises:
        ValueError: the options don't fit together.
    """
    from nami_lightning.datamodules.captioning.caption import caption_parts, merge
    from nami_lightning.datamodules.captioning.caption_kinds import choose_kinds
    from nami_lightning.datamodules.captioning.caption_task import CaptionSettings, CaptionTask
    from nami_lightning.datamodules.captioning.side_by_side import count_lines
    from nami_lightning.datamodules.storage.dataset import PreparedDataset
    from nami_lightning.datamodules.storage.inspect import caption_lines, list_buckets
    from nami_lightning.models.labelling.captioner import Captioner

    device = default_device(options.device)
    dtype = options.dtype or ("float32" if device == "cpu" else "bfloat16")
    kinds = choose_kinds(options.kinds, Path(options.kinds_file) if options.kinds_file else None)
    settings = CaptionSettings(
        options.model, kinds, options.languages, options.context, dict(options.weights), options.name, dtype
    )
    task = CaptionTask(PreparedDataset(options.folder), Path(options.output), settings)
    if task.is_complete():
        print(f"{task.output} is complete.")
    else:
        if not options.merge:
            shard = parse_shard(options.shard) if options.shard else (0, 1)
            caption_parts(task, lambda: Captioner(options.model, device, dtype), options.batch_size, shard)
        if options.shard:
            print(f"Shard {options.shard} is done. When all are done, run the command with --merge instead of --shard.")
            return
        merge(task)
    dataset = PreparedDataset(task.output)
    print("\n".join([*count_lines(dataset), "", *caption_lines(list_buckets(dataset))]))
    print(f"\nTo compare them: lightning data show {task.output}")
