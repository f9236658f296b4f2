"""The command ``lightning`` (also ``nami``): its options, and errors as one clear message.

Nothing heavy is imported until a command needs it, so that ``--help`` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from nami_lightning.evaluation import options as evaluation
from nami_lightning.numbers import positive, resamples

EXAMPLES = """\
examples:
  lightning run recipes/openmoji.yaml                      train the demo; run it again to resume
  lightning run recipes/openmoji.yaml --curriculum.unit 8  with another value of any recipe key
  lightning sample openmoji --prompt "red apple"           draw with the run's newest checkpoint
  lightning show openmoji                                  how far it is, and where its files lie
  lightning export openmoji                                its newest checkpoint as a diffusers pipeline
  lightning launch slurm recipes/nami_2b.yaml --nodes 8 --gpus 8 --output nami_2b.sh
  lightning plan nami_2b --devices 64 --device a100-80gb   memory, operations and GPU-hours before anything is bought
  lightning data prepare --source photos/ --output shards/ --resolutions 256 512 1024
  lightning compare nami flux_base --by flops              tables, plots, grids, one page
  lightning sweep openmoji_components                      train a list of recipes, then compare
"""

DATA_EXAMPLES = """\
examples:
  lightning data prepare --source photos/ --output shards/ --resolutions 256 512 1024
  lightning data prepare --source 'laion/*.tar' --output shards/ --resolutions 256 512 --filters.min_aesthetic 5
  lightning data prepare recipes/openmoji.yaml             what the recipe's data: block says
  lightning data encode recipes/nami_0.6b.yaml             latents and text states: training without the encoders
  lightning data show shards/                              counts, captions, a contact sheet
  lightning data verify shards/                            read all, and report the damaged
"""

PLAN_EXAMPLES = """\
examples:
  lightning plan nami_2b --devices 64 --device a100-80gb
  lightning plan nami_0.6b --devices 8 --device h100 --images 50000000
  lightning plan nami_2b --devices 64 --device a100-40gb --model.activation_checkpointing 2   any recipe key
  lightning plan nami_2b --devices 64 --json               the same for programs
"""

BENCH = "Time it, and what it should be as fast as, in turns within one run; medians and quotients."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Set NAMI_TRACEBACK=1 to see where an error came from."""
    options, rest = make_parser().parse_known_args(arguments)
    if options.command in ("run", "bench") or getattr(options, "takes_keys", False):
        if options.command == "bench" and options.recipe is None and rest and not rest[0].startswith("-"):
            options.recipe = rest.pop(0)  # argparse takes optional ones only before any option
        options.overrides = rest
    elif rest:
        print(f"error: unknown option {rest[0]}; see: lightning {options.command} --help", file=sys.stderr)
        return 2
    from nami_lightning import commands
    from nami_lightning.errors import explain, is_for_people

    try:
        getattr(commands, options.command)(options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("NAMI_TRACEBACK") or not is_for_people(error):
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options of all commands; ``run`` takes any recipe key besides."""
    parser = argparse.ArgumentParser(
        prog="lightning",
        description="Train text-to-image models in stages of rising resolution (NAMI).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="train what a recipe describes; run again to resume",
        description="Train what RECIPE describes. Run the same command again to resume from the newest checkpoint.",
        epilog="Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint after the running step and end it with exit status 130,\n"
        "or 75 (start it again). A second signal ends it at once. What ranks but the first print is in the run's\n"
        "logs/rank_N.log.\n\n"
        "Any recipe key can follow: --curriculum.unit 8 --trainer.devices 2 --config OVERLAY.yaml\n"
        "--print_config prints the resolved recipe; the recipes in recipes/ explain every key.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged one (openmoji)")
    run.add_argument("--fresh", action="store_true", help="start over; the old run is renamed, never deleted")

    bench = commands.add_parser("bench", help="how fast it is, next to what it should be as fast as", description=BENCH)
    bench.add_argument(
        "what",
        choices=["step", "sample", "data"],
        help="step: a recipe's step time in each phase, beside a bare PyTorch loop; sample: how long its model draws, "
        "beside FLUX-base and flow-only; data: images read a second, beside litdata and ImageFolder",
    )
    bench.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        help="a YAML file, or the name of a packaged one, keys may follow (default openmoji); for data also DIR",
    )
    bench.add_argument(
        "--steps",
        type=positive,
        help="step: steps of each phase that count (20); sample: the solver's in each stage (10)",
    )
    bench.add_argument("--strategy", choices=["ddp", "fsdp"], help="step: spread both so (default: as the recipe says)")
    bench.add_argument("--devices", type=positive, help="step: processes, or GPUs (default: as the recipe says)")
    bench.add_argument("--images", metavar="DIR", help="data: the same images as torchvision's ImageFolder takes them")
    bench.add_argument("--workers", type=int, help="data: processes of each loader (default 2)")
    bench.add_argument("--batch_size", type=positive, help="data: images a batch (32); sample: images at once (1)")
    bench.add_argument("--samples", type=positive, help="data: images that each reads in a round (1024)")
    bench.add_argument("--rounds", type=positive, help="data, sample: rounds, of which medians are taken (default 5)")

    sample = commands.add_parser("sample", help="draw images from prompts", description="Draw images from prompts.")
    sample.add_argument("run", metavar="RUN", help="a run (folder, or name below runs/), or a saved pipeline's folder")
    sample.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    sample.add_argument("--prompts", metavar="FILE", help="a text file, one prompt a line")
    sample.add_argument("--negative_prompt", default="", metavar="TEXT", help="what guidance leads away from")
    sample.add_argument("--out", default="drawn", metavar="DIR", help="where the PNGs and grid.png go (default: drawn)")
    sample.add_argument("--images", type=positive, default=1, help="images of each prompt (default 1)")
    sample.add_argument(
        "--steps", type=positive, nargs="+", default=[10], help="steps a stage: one number, or one a stage (10)"
    )
    sample.add_argument("--guidance_scale", type=float, default=3.5, help="1 is off (default 3.5)")
    sample.add_argument("--solver", choices=["euler", "heun", "multistep"], default="multistep")
    sample.add_argument("--seed", type=int, default=0, help="of the first image; the next has the next (default 0)")
    sample.add_argument("--batch_size", type=positive, default=16, help="images drawn at once (default 16)")
    sample.add_argument("--columns", type=positive, default=8, help="images in a row of the grid (default 8)")

    add_plan_command(commands)
    add_data_commands(
        commands.add_parser(
            "data",
            help="image-caption collections to shards",
            description="Make a data set of any collection of images with captions, look at it, check it.",
            epilog=DATA_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )

    export = commands.add_parser(
        "export",
        help="a checkpoint as a diffusers pipeline",
        description="Write a checkpoint, of one process or of many, as a folder for NamiPipeline.from_pretrained. "
        "Needs no GPU, and memory for the model alone.",
    )
    export.add_argument("run", metavar="RUN", help="a run (folder, or name below runs/)")
    export.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    export.add_argument("--output", metavar="DIR", help="a new folder (default: RUN/pipelines/step=NNNNNNN)")
    export.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True, help="the EMA's weights, not the trained ones"
    )

    add_launch_commands(
        commands.add_parser(
            "launch",
            help="a script that runs a recipe on a cluster",
            description="Write the script that runs a recipe on a cluster.",
        )
    )

    evaluate = commands.add_parser(
        "evaluate",
        help="benchmarks of generation: GenEval, DPG-Bench, NAMI-1K, grids",
        description=evaluation.DESCRIPTION,
        epilog=evaluation.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluation.add_evaluate_options(evaluate)

    compare = commands.add_parser(
        "compare",
        help="runs side by side: tables, plots, grids",
        description="Put runs side by side: final values, values at an equal budget, what one needs to reach another's "
        "best, and which differences are more than the metric's noise. Their recipes need the callback Metrics.",
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="a run (folder, or name below runs/)")
    compare.add_argument(
        "--by",
        choices=["steps", "samples", "flops", "time"],
        default="flops",
        help="what budget is counted in: the x-axis of the plots too (default flops)",
    )
    add_compare_options(compare)

    sweep = commands.add_parser(
        "sweep",
        help="train a list of recipes, then compare",
        description="Train the runs that FILE lists (recipes/experiments/ has examples), each in turn, then compare "
        "them. Run again to go on: finished runs are left alone, half-done ones resume.",
    )
    sweep.add_argument(
        "file",
        metavar="FILE",
        help="a YAML file (output_dir, runs: [{recipe, name, overrides}]), or the name of a packaged one",
    )
    add_compare_options(sweep)

    show = commands.add_parser("show", help="print what a run is", description="Print what a run is.")
    show.add_argument("run", metavar="RUN", help="a run (folder, or name below runs/)")
    return parser


def add_launch_commands(parser: argparse.ArgumentParser) -> None:
    """The commands below ``lightning launch``."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="CLUSTER")
    slurm = commands.add_parser(
        "slurm",
        help="an sbatch script",
        description="Write the sbatch script that trains RECIPE on a SLURM cluster, one process a GPU. Two minutes "
        "before its time is up the job saves and is queued again; each time it goes on from its newest checkpoint.",
        epilog="Any recipe key can follow, as for: lightning run",
        allow_abbrev=False,
    )
    slurm.set_defaults(takes_keys=True)
    slurm.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged one")
    slurm.add_argument("--nodes", type=int, required=True, help="how many")
    slurm.add_argument("--gpus", type=int, required=True, help="of each node")
    slurm.add_argument("--cpus", type=int, help="cores for each GPU (default: the recipe's data workers and one more)")
    slurm.add_argument("--partition", help="as sbatch takes it")
    slurm.add_argument("--account", help="as sbatch takes it")
    slurm.add_argument("--time", help="as sbatch takes it: 24:00:00, 2-00:00:00")
    slurm.add_argument("--output", metavar="FILE", help="where the script goes (default: the terminal)")


def add_plan_command(commands: Any) -> None:
    """``lightning plan``."""
    plan = commands.add_parser(
        "plan",
        help="what a recipe needs: memory, operations, GPU-hours",
        description="Say before anything is bought what RECIPE needs on given devices, beside FLUX-base, the same "
        "network with one stage. Nothing is downloaded, prepared or trained.",
        epilog=PLAN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    plan.set_defaults(takes_keys=True)
    plan.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged one; keys may follow")
    plan.add_argument("--devices", type=int, help="how many (default: the recipe's trainer.devices; 8 if that is auto)")
    plan.add_argument("--device", default="a100-80gb", help="which: a100-40gb, h100, h200, ... (default a100-80gb)")
    plan.add_argument(
        "--utilization", type=float, default=0.4, help="share of the device's peak that is reached (default 0.4)"
    )
    plan.add_argument(
        "--images", type=int, nargs="+", metavar="N", help="images for training: all, or those of each resolution"
    )
    plan.add_argument("--json", action="store_true", help="all figures for programs: bytes, operations, seconds")


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """What ``compare`` and ``sweep`` share."""
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="where index.html, comparison.md, plots and grid.png go (default: comparison, "
        "or for a sweep its output_dir/comparisons/FILE)",
    )
    parser.add_argument(
        "--resamples", type=resamples, default=200, help="of the bootstrap; 0 leaves it out (default 200)"
    )


def add_data_commands(parser: argparse.ArgumentParser) -> None:
    """The commands below ``lightning data``."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    prepare = commands.add_parser("prepare", help="images and captions to shards", add_help=False, allow_abbrev=False)
    prepare.set_defaults(takes_keys=True)

    encode = commands.add_parser(
        "encode", help="images and captions to latents and text states", add_help=False, allow_abbrev=False
    )
    encode.set_defaults(takes_keys=True)

    show = commands.add_parser(
        "show", help="counts, captions, a contact sheet", description="Print what a data set is."
    )
    show.add_argument("folder", metavar="DIR", help="a prepared data set, or its URL (s3://bucket/path)")
    show.add_argument("--out", metavar="DIR", default=".", help="where contact_sheet.png goes (default: here)")
    show.add_argument("--images", type=int, default=48, help="images on it (default 48)")

    verify = commands.add_parser(
        "verify", help="read all, and report the damaged", description="Read a data set whole."
    )
    verify.add_argument("folder", metavar="DIR", help="a prepared data set")
    verify.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")


if __name__ == "__main__":
    sys.exit(main())
