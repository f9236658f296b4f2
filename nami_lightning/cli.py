"""The command ``lightning`` (also ``nami``): its options, and errors as one clear message.

Nothing heavy is imported until a command needs it, so that ``--help`` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence

EXAMPLES = """\
examples:
  lightning run recipes/openmoji.yaml                      train the demo; run it again to resume
  lightning run recipes/openmoji.yaml --curriculum.unit 8  with another value of any recipe key
  lightning sample openmoji --prompt "red apple" --out out draw with the run's newest checkpoint
  lightning show openmoji                                  how far it is, and where its files lie
"""

BENCH = "Step time beside a bare PyTorch loop over the same modules and batches, interleaved in one run."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Set NAMI_TRACEBACK=1 to see where an error came from."""
    options, rest = make_parser().parse_known_args(arguments)
    if options.command in ("run", "bench"):
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
        epilog="Any recipe key can follow: --curriculum.unit 8 --trainer.devices 2 --config OVERLAY.yaml\n"
        "--print_config prints the resolved recipe; the recipes in recipes/ explain every key.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged one (openmoji)")
    run.add_argument("--fresh", action="store_true", help="start over; the old run is renamed, never deleted")

    bench = commands.add_parser("bench", help="measure, beside what it should be as fast as", description=BENCH)
    bench.add_argument("what", choices=["step"], help="step: a recipe's step time in each phase")
    bench.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged one; recipe keys may follow"
    )
    bench.add_argument("--steps", type=int, default=20, help="steps of each phase that count (default 20)")

    sample = commands.add_parser("sample", help="draw images from prompts", description="Draw images from prompts.")
    sample.add_argument("run", metavar="RUN", help="a run (folder, or name below runs/), or a saved pipeline's folder")
    sample.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    sample.add_argument("--prompts", metavar="FILE", help="a text file, one prompt a line")
    sample.add_argument("--negative_prompt", default="", metavar="TEXT", help="what guidance leads away from")
    sample.add_argument("--out", required=True, metavar="DIR", help="where the PNGs and grid.png go")
    sample.add_argument("--images", type=int, default=1, help="images of each prompt (default 1)")
    sample.add_argument(
        "--steps", type=int, nargs="+", default=[10], help="steps a stage: one number, or one a stage (10)"
    )
    sample.add_argument("--guidance_scale", type=float, default=2.0, help="1 is off (default 2)")
    sample.add_argument("--solver", choices=["euler", "heun", "multistep"], default="multistep")
    sample.add_argument("--seed", type=int, default=0, help="of the first image; the next has the next (default 0)")
    sample.add_argument("--batch_size", type=int, default=16, help="images drawn at once (default 16)")
    sample.add_argument("--columns", type=int, default=8, help="images in a row of the grid (default 8)")

    show = commands.add_parser("show", help="print what a run is", description="Print what a run is.")
    show.add_argument("run", metavar="RUN", help="a run (folder, or name below runs/)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
