"""``lightning tune``: find the sampler's settings that give the best images for their cost."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import RUN_HELP, positive_int


def add_command(commands: Any) -> None:
    """Add ``tune steps`` to the command line."""
    parser = commands.add_parser(
        "tune",
        help="find the solver steps and the guidance of each stage that pay",
        description="Find the settings of the sampler that give the best images for their cost.",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    steps = kinds.add_parser(
        "steps",
        help="the solver steps of each stage, their guidance, solver and spacing",
        description="Draw the held-out captions at one setting after the other. Begin with one solver step a stage; "
        "then raise the steps or the guidance of the stage where that lowers the Frechet distance most for its "
        "operations, or change the solver or spacing. Write all that was measured and a plot; --export writes the "
        "model as a pipeline with the cheapest good setting as its default. The run's recipe needs the callback "
        "Metrics.",
    )
    steps.add_argument("run", metavar="RUN", help=RUN_HELP)
    steps.add_argument(
        "--baseline", action="append", default=[], metavar="RUN", help="run to tune and plot beside it, FLUX-base say"
    )
    steps.add_argument(
        "--solver",
        nargs="+",
        choices=["euler", "heun", "multistep"],
        default=["multistep", "euler"],
        help="solvers to choose from, the one to start with first (default: multistep euler)",
    )
    steps.add_argument(
        "--guidance_scale",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="SCALE",
        help="guidance to choose from at each stage, the lowest first; above 1 it doubles a stage's cost (default 1)",
    )
    steps.add_argument(
        "--spacing",
        nargs="+",
        choices=["even", "linspace"],
        default=["even"],
        help="spacings of a stage's steps to choose from, the one to start with first (default: even)",
    )
    steps.add_argument("--most_steps", type=positive_int, default=24, help="most steps of all stages (default 24)")
    steps.add_argument("--samples", type=positive_int, help="captions to draw (default: all of the run's evaluation)")
    steps.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        help="the setting taken is the cheapest whose distance is at most so much above the best (default 0.02)",
    )
    steps.add_argument("--batch_size", type=positive_int, default=16, help="images drawn at once (default 16)")
    steps.add_argument("--output", metavar="DIR", help="folder of steps.csv and steps.png (default: RUN/tuned)")
    steps.add_argument("--export", metavar="DIR", help="write the run as a pipeline with the setting as its default")
    steps.set_defaults(execute=tune_steps)


def tune_steps(options: Namespace) -> None:
    """Measure, print the front, and write it.

    Raises:
        FileNotFoundError: a run does not exist, or was never evaluated.
        FileExistsError: the export's folder exists.
        ValueError: guidance that does not ascend, or fewer steps than stages.
    """
    from nami_lightning.comparison.tune_steps import Choices, StepTuner, cheapest, export, front, search, write_front
    from nami_lightning.runs.run_dir import find_run
    from nami_lightning.utils.text_table import table

    if options.export and Path(options.export).exists():
        raise FileExistsError(f"{options.export} exists: remove it, or give another --export")
    if options.guidance_scale != sorted(set(options.guidance_scale)):
        raise ValueError("--guidance_scale must ascend, without repeats")
    choices = Choices(options.solver, options.guidance_scale, options.spacing, options.most_steps)
    runs = [find_run(name) for name in (options.run, *options.baseline)]
    measured = {}
    for run in runs:
        tuner = StepTuner(run, options.samples, options.batch_size)
        if options.most_steps < len(tuner.forward):
            raise ValueError(f"--most_steps {options.most_steps}: {run.folder.name} has {len(tuner.forward)} stages")
        measured[run.folder.name] = search(tuner, len(tuner.forward), choices)
    rows = [["run", "steps", "solver", "spacing", "GFLOP an image", "Frechet distance"]]
    for name, settings in measured.items():
        rows += [
            [
                name,
                one.setting.name,
                one.setting.solver,
                one.setting.spacing,
                f"{one.flops / 1e9:.3g}",
                f"{one.distance:.1f}",
            ]
            for one in front(settings)
        ]
    print("\n".join(table(rows, "<<<<>>")))
    first = measured[runs[0].folder.name]
    chosen = cheapest(first, options.tolerance)
    assert chosen is not None
    print(
        f"{chosen.setting.name} steps by {chosen.setting.solver} are the cheapest within {options.tolerance:.0%} of "
        "the best distance."
    )
    for name, settings in list(measured.items())[1:]:
        theirs = cheapest(settings, options.tolerance)
        ours = theirs and cheapest(first, 0.0, best=min(one.distance for one in settings))
        if theirs and ours:
            print(
                f"The best distance of {name} takes {ours.setting.name} steps here: {ours.flops / theirs.flops:.3f} of "
                f"the operations of its {theirs.setting.name} steps, the cheapest within {options.tolerance:.0%} of "
                "that distance."
            )
    for path in write_front(measured, Path(options.output or runs[0].folder / "tuned")):
        print(path)
    if options.export:
        export(runs[0], chosen.setting, Path(options.export))
        print(f"{options.export}: the pipeline, with {chosen.setting.name} steps as its default")
