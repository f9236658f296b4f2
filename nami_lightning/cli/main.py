"""The command ``lightning`` (also ``nami``): the parser of all commands, and errors as one clear message."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence

from nami_lightning.cli import (
    bench,
    compare,
    convert,
    distill,
    evaluate,
    export,
    launch,
    plan,
    run,
    sample,
    serve,
    show,
    sweep,
    tune,
)
from nami_lightning.cli.argument_types import CommandParser
from nami_lightning.cli.data import command as data

COMMANDS = (
    run,
    distill,
    sample,
    serve,
    show,
    plan,
    data,
    convert,
    export,
    launch,
    evaluate,
    compare,
    sweep,
    tune,
    bench,
)
"""The commands in the order of ``lightning --help``."""

EXAMPLES = """\
examples:
  lightning run recipes/openmoji.yaml                      train the demo; run it again to resume
  lightning run recipes/openmoji.yaml --curriculum.unit 8  change the value of any recipe key
  lightning distill openmoji --steps 1 1 1                 train a student that samples in few steps
  lightning tune steps openmoji --export my_model          find the solver steps that pay, and make them its default
  lightning sample openmoji --prompt "red apple"           sample with the run's newest checkpoint
  lightning serve openmoji                                 draw on a page in the browser
  lightning show openmoji                                  show its progress and where its files are
  lightning export openmoji                                write its newest checkpoint as a diffusers pipeline
  lightning convert weights/ --output nami-t2i             make a pipeline of the authors' release, or of a FLUX
  lightning launch slurm recipes/nami_2b.yaml --nodes 8 --gpus 8 --output nami_2b.sh
  lightning plan nami_2b --devices 64 --device a100-80gb   print the memory, operations and GPU-hours it needs
  lightning data prepare --source photos/ --output shards/ --resolutions 256 512 1024
  lightning compare nami flux_base --by flops              write tables, plots and grids on one page
  lightning sweep openmoji_components                      train a list of recipes, then compare
"""

NOISE = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers which may be a bottleneck.*",
    r".*Starting from v1.9.0, `tensorboardX` has been removed.*",
    r".*FSDP2-wrapped module .* returned a view tensor.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*`local_dir_use_symlinks` argument is deprecated.*",
    r".*Consider setting `persistent_workers=True`.*",  # each loader is read once
    r".*This DataLoader will create .* worker processes in total.*",  # the run reports how long it waits for data
    r".*Already found a `peft_config` attribute in the model.*",  # several LoRAs are meant to be several
    r".*your dataloader is not resumable.*",  # the number of the step is the position in the data
)
"""Warnings of libraries about their own inner workings, which users can't act on."""

ADVERTISEMENTS = ("Tip:", "`max_epochs=1` reached", "TPU available: False", "HPU available: False")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. Set NAMI_TRACEBACK=1 to see where an error came from."""
    options, rest = make_parser().parse_known_args(arguments)
    if options.takes_keys:
        options.overrides = rest
    elif rest:
        print(f"error: unknown option {rest[0]}; see: lightning {options.command} --help", file=sys.stderr)
        return 2
    quieten_libraries()
    say_loading(os.environ)
    from nami_lightning.errors import explain, is_user_error

    try:
        options.execute(options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("NAMI_TRACEBACK") or not is_user_error(error):
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Commands with ``takes_keys`` accept any recipe key in addition to their options.
    """
    parser = CommandParser(
        prog="lightning",
        description="Train text-to-image models in stages of rising resolution (NAMI).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(takes_keys=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    return parser


def say_loading(environment: Mapping[str, str]) -> None:
    """Say on rank 0 that the command loads, before it imports for up to twenty seconds; not if that is done already.

    Args:
        environment: the process's environment variables.
    """
    rank = next((environment[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in environment), "0")
    if "torch" not in sys.modules and rank == "0":
        print("Loading PyTorch and Lightning ...", file=sys.stderr, flush=True)


def quieten_libraries() -> None:
    """Hide warnings of libraries about their own inner workings, and their advertisements."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(words in record.getMessage() for words in ADVERTISEMENTS)
    )
