"""``lightning bench``: measure the speed of training, sampling or data loading, next to something comparable."""

import argparse
from argparse import Namespace
from typing import Any

from nami_lightning.cli.argument_types import positive_float, positive_int, whole_number

RECIPE_HELP = "a recipe file, or the name of a packaged recipe (default openmoji); any recipe key may follow"


def add_command(commands: Any) -> None:
    """Add ``bench`` and its benchmarks to the command line."""
    parser = commands.add_parser(
        "bench",
        help="measure the speed of training, sampling or data loading",
        description="Measure the speed of this project and of something comparable, in turns within one run, and print "
        "medians and quotients. Nothing is written, except for the data set if it isn't prepared yet, and what "
        "--output asks for.",
    )
    benchmarks = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    step = _add(benchmarks, "step", "the step time of a recipe in each phase, next to a bare PyTorch loop", RECIPE_HELP)
    step.add_argument(
        "--steps", type=positive_int, default=20, help="number of measured steps of each phase (default 20)"
    )
    step.add_argument("--strategy", choices=["ddp", "fsdp"], help="sharding strategy (default: the recipe's)")
    step.add_argument(
        "--devices", type=positive_int, help="number of GPUs, or of CPU processes (default: the recipe's)"
    )

    what = "the seconds and operations to sample images, next to FLUX-base and flow-only"
    sample = _add(benchmarks, "sample", what, RECIPE_HELP)
    sample.add_argument(
        "--resolutions",
        type=positive_int,
        nargs="+",
        metavar="PX",
        help="side of the finest stage; every other stage has half of the next one's (default: the recipe's)",
    )
    sample.add_argument(
        "--steps", type=positive_int, default=10, help="solver steps of each stage (default 10, as in Table 2)"
    )
    sample.add_argument(
        "--batch_size", type=positive_int, default=1, help="number of images sampled at once (default 1)"
    )
    sample.add_argument(
        "--rounds", type=positive_int, default=5, help="number of rounds; medians over them are printed (default 5)"
    )
    sample.add_argument(
        "--warm_up", type=whole_number, default=1, help="number of rounds before them that don't count (default 1)"
    )
    sample.add_argument(
        "--with_encoders", action="store_true", help="measure the recipe's text encoders and its decoder too"
    )
    sample.add_argument("--output", metavar="DIR", help="folder of sampling.csv, and of the plot as PNG and SVG")

    gpu = benchmarks.add_parser(
        "gpu",
        help="a report of what this machine's GPU does: parity, sampling, training, pictures",
        description="Measure this machine's GPU in about eight minutes, offline, and write one report in Markdown with "
        "each promise as held or not. The sections: parity (the same numbers as on the CPU), sampling (the paper's "
        "Table 2), training (step time, memory, waits), run (a training of emoji). Keys of the recipe openmoji_gpu "
        "may follow, for that training.",
        allow_abbrev=False,
    )
    gpu.add_argument("--output", metavar="FILE", default="gpu/report.md", help="the report (default gpu/report.md)")
    gpu.add_argument(
        "--sections",
        nargs="+",
        choices=["parity", "sampling", "training", "run"],
        default=["parity", "sampling", "training", "run"],
        help="what to measure (default: all)",
    )
    gpu.add_argument(
        "--minutes", type=positive_float, help="length of the training of emoji (default 7; of the stand-in 0.1)"
    )
    gpu.add_argument("--stand_in", action="store_true", help="run the whole flow small, on the CPU")
    gpu.set_defaults(execute=bench, takes_keys=True)

    data = _add(
        benchmarks,
        "data",
        "the images read per second, next to litdata and ImageFolder",
        "a prepared data set, or a recipe",
    )
    data.add_argument("--images", metavar="DIR", help="folder of the same images for torchvision's ImageFolder")
    data.add_argument(
        "--workers",
        type=whole_number,
        default=2,
        help="number of worker processes of each loader (default 2)",
    )
    data.add_argument("--batch_size", type=positive_int, default=32, help="number of images per batch (default 32)")
    data.add_argument(
        "--samples",
        type=positive_int,
        default=1024,
        help="number of images that each loader reads in a round (default 1024)",
    )
    data.add_argument(
        "--rounds", type=positive_int, default=5, help="number of rounds; medians over them are printed (default 5)"
    )


def _add(benchmarks: Any, name: str, what: str, recipe: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = benchmarks.add_parser(
        name, help=what, description=f"Measure {what}.", allow_abbrev=False
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help=recipe)
    parser.set_defaults(execute=bench, takes_keys=True)
    return parser


def bench(options: Namespace) -> None:
    """Run one of the benchmarks."""
    if options.what == "gpu":
        from nami_lightning.benchmarks.gpu.report import measure_gpu

        measure_gpu(options)
        return
    if options.recipe is None and options.overrides and not options.overrides[0].startswith("-"):
        options.recipe = options.overrides.pop(0)  # argparse accepts an optional argument only before the first option
    if options.what == "step":
        from nami_lightning.benchmarks.train_step import measure_step

        measure_step(options)
    elif options.what == "sample":
        from nami_lightning.benchmarks.sampling import measure_sampling

        measure_sampling(options)
    else:
        from nami_lightning.benchmarks.data_loading import measure_data_loading

        measure_data_loading(options)
