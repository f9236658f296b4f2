"""``lightning data``: prepare a data set of images with captions, improve it, encode it, show it, or verify it."""

import argparse
from typing import Any

from nami_lightning.cli.data import caption, encode, filter, prepare, score, show, verify

COMMANDS = (prepare, score, filter, caption, encode, show, verify)
"""The commands in the order of ``lightning data --help``."""

EXAMPLES = """\
examples:
  lightning data prepare --source photos/ --output shards/ --resolutions 256 512 1024
  lightning data prepare --source 'laion/*.tar' --output shards/ --resolutions 256 512 --filters.min_aesthetic 5
  lightning data prepare recipes/openmoji.yaml             the settings of the recipe's data: block
  lightning data score shards/ --clip openai/clip-vit-large-patch14
  lightning data filter shards/ --filters.min_similarity 0.22 --output kept/
  lightning data caption shards/ --output captioned/ --model Qwen/Qwen2.5-VL-7B-Instruct
  lightning data encode recipes/nami_0.6b.yaml             latents and text states, to train without the encoders
  lightning data show shards/                              print counts and captions, write a contact sheet
  lightning data verify shards/                            read everything, and report what is damaged
"""


def add_command(commands: Any) -> None:
    """Add ``data`` and its subcommands to the command line."""
    parser = commands.add_parser(
        "data",
        help="prepare, score, filter, caption, encode, show or verify a data set",
        description="Prepare a data set from any collection of images with captions, score, filter and "
        "caption it, encode it, show it, or verify it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subcommands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(subcommands)
