"""``lightning tune``: find the sampler's settings that give the best images for their cost."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import RUN_HELP, positive_int


def add_command(commands: Any) -> None:
    """Add ``tune steps`` to the command line."""
    parser = commands.add_parser(
        "tune",
        help="find the solver steps of each stage that pay",
        description="Find the settings of the sampler that give the best images for their cost.",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    steps = kinds.add_parser(
        "steps",
        help="the solver steps of each stage",
        description="Draw the held-out captions with ever more solver steps, added at the stage where they lower the "
        "Frechet distance most for their operations. Write all that was measured and a plot; --export writes the "
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
        default=["euler", "multistep"],
        help="solvers to try at every setting (default: euler multistep)",
    )
    steps.add_argument("--guidance_scale", type=float, default=1.0, help="guidance of all settings (default 1: off)")
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
    """
    from nami_lightning.comparison.tune_steps import StepTuner, cheapest, front, search, write_front
    from nami_lightning.runs.run_dir import find_run
    from nami_lightning.utils.text_table import table

    if options.export and Path(options.export).exists():
        raise FileExistsError(f"{options.export} exists: remove it, or give another --export")
    runs = [find_run(name) for name in (options.run, *options.baseline)]
    measured = {}
    for run in runs:
        tuner = StepTuner(run, options.guidance_scale, options.samples, options.batch_size)
        measured[run.folder.name] = search(tuner, len(tuner.forward), options.solver, options.most_steps)
    rows = [["run", "steps", "solver", "GFLOP an image", "Frechet distance"]]
    for name, settings in measured.items():
        rows += [
            [name, one.name, one.solver, f"{one.flops / 1e9:.3g}", f"{one.distance:.1f}"] for one in front(settings)
        ]
    print("\n".join(table(rows, "<<<>>")))
    first = measured[runs[0].folder.name]
    chosen = cheapest(first, options.tolerance)
    assert chosen is not None
    print(
        f"{chosen.name} steps by {chosen.solver} are the cheapest within {options.tolerance:.0%} of the best distance."
    )
    for name, settings in list(measured.items())[1:]:
        theirs = cheapest(settings, options.tolerance)
        ours = theirs and cheapest(first, 0.0, best=min(one.distance for one in settings))
        if theirs and ours:
            print(
                f"The best distance of {name} takes {ours.name} steps here: {ours.flops / theirs.flops:.3f} of the "
                f"operations of its {theirs.name} steps, the cheapest within {options.tolerance:.0%} of that distance."
            )
    for path in write_front(measured, Path(options.output or runs[0].folder / "tuned")):
        print(path)
    if options.export:
        _export(runs[0], chosen, Path(options.export))


def _export(run: Any, chosen: Any, folder: Path) -> None:
    """Write the run's pipeline with the setting as its default."""
    import json

    from nami_lightning.runs.export import Export
    from nami_lightning.runs.run_dir import step_of
    from nami_lightning.utils.atomic_write import write_json

    Export(run, step_of(run.checkpoint(None))).write(folder)
    index = folder / "model_index.json"
    defaults = {
        "num_inference_steps": list(chosen.steps),
        "guidance_scale": chosen.guidance_scale,
        "solver": chosen.solver,
    }
    write_json(index, json.loads(index.read_text(encoding="utf-8")) | defaults)
    print(f"{folder}: the pipeline, with {chosen.name} steps by {chosen.solver} as its default")
