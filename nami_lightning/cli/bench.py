"""``lightning bench``: how fast it is, beside something that it should be as fast as."""

import argparse
from argparse import Namespace
from typing import Any

from nami_lightning.cli.argument_types import positive

RECIPE_HELP = "a YAML file, or the name of a packaged one (default openmoji); keys may follow"


def add_command(commands: Any) -> None:
    """Add ``bench`` and what it measures to the command line."""
    parser = commands.add_parser(
        "bench",
        help="how fast it is, next to what it should be as fast as",
        description="Time it, and what it should be as fast as, in turns within one run: medians and quotients. "
        "Nothing is written but the data set, if it isn't there.",
    )
    benchmarks = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    step = _add(benchmarks, "step", "a recipe's step time in each phase, beside a bare PyTorch loop", RECIPE_HELP)
    step.add_argument("--steps", type=positive, default=20, help="steps of each phase that count (default 20)")
    step.add_argument("--strategy", choices=["ddp", "fsdp"], help="default: as the recipe says")
    step.add_argument("--devices", type=positive, help="processes, or GPUs (default: as the recipe says)")

    sample = _add(benchmarks, "sample", "seconds an image, beside FLUX-base and flow-only", RECIPE_HELP)
    sample.add_argument("--steps", type=positive, default=10, help="the solver's in each stage (10, as in Table 2)")
    sample.add_argument("--batch_size", type=positive, default=1, help="images at once (default 1)")
    sample.add_argument("--rounds", type=positive, default=5, help="of which medians are taken (default 5)")

    data = _add(benchmarks, "data", "images read a second, beside litdata and ImageFolder", "a data set, or a recipe")
    data.add_argument("--images", metavar="DIR", help="the same images as torchvision's ImageFolder takes them")
    data.add_argument("--workers", type=int, default=2, help="processes of each loader (default 2)")
    data.add_argument("--batch_size", type=positive, default=32, help="images a batch (default 32)")
    data.add_argument("--samples", type=positive, default=1024, help="images that each reads in a round (1024)")
    data.add_argument("--rounds", type=positive, default=5, help="of which medians are taken (default 5)")


def _add(benchmarks: Any, name: str, what: str, recipe: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = benchmarks.add_parser(
        name, help=what, description=f"Measure {what}.", allow_abbrev=False
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help=recipe)
    parser.set_defaults(execute=bench, takes_keys=True)
    return parser


def bench(options: Namespace) -> None:
    """Measure one of the three."""
    if options.recipe is None and options.overrides and not options.overrides[0].startswith("-"):
        options.recipe = options.overrides.pop(0)  # argparse takes an optional one only before any option
    if options.what == "step":
        from nami_lightning.benchmarks.train_step import step

        step(options)
    elif options.what == "sample":
        from nami_lightning.benchmarks.sampling import sample

        sample(options)
    else:
        from nami_lightning.benchmarks.data_loading import data

        data(options)
