"""``lightning convert``: make a pipeline of the authors' release, of a FLUX, or of a NAMI with one finer stage."""

from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nami_lightning.cli.argument_types import add_checkpoint_options, positive_int, whole_number

if TYPE_CHECKING:
    from nami_lightning.conversion.convert import Source, Write

DESCRIPTION = """\
Make a NamiPipeline's folder of a model. SOURCE is one of

  the authors' release   a folder or a hub name in their layout (qihoo360/NAMI-T2I): their network, windows, times and
                         text states, exactly
  a FLUX                 a FluxPipeline or FluxTransformer2DModel of diffusers without guidance embedding
                         (FLUX.1-schnell): its blocks split over the stages, its head for each of them
  a NAMI                 a run, or a pipeline of ours: with --add_stage one finer stage more; or, of one stage
                         (FLUX-base), its blocks split over several with --num_layers and --num_single_layers

`lightning sample`, `evaluate` and `run --model.pretrained` take the result, and NamiPipeline.from_pretrained.
"""

EXAMPLES = """\
examples:
  lightning convert weights/ --output nami-t2i                    the authors' release, with restored noise (any size)
  lightning convert weights/ --output released --jump released    with their own jump, at 1024x1024 alone
  lightning convert black-forest-labs/FLUX.1-schnell --output flux_nami --num_layers 19 0 0 --num_single_layers 4 18 16
  lightning convert openmoji --output finer --add_stage 128
"""

OPTIONS = {
    "release": ("jump", "num_single_layers", "axes_dims_rope"),
    "flux": ("num_layers", "num_single_layers", "window_ratios", "output_head", "resolution", "encoders"),
    "pipeline": ("add_stage", "num_layers", "num_single_layers", "window_ratio", "window_ratios", "output_head"),
    "run": (
        *("add_stage", "num_layers", "num_single_layers", "window_ratio", "window_ratios", "output_head"),
        *("step", "ema"),
    ),
}
"""The options that each kind of source takes."""

NAMES = {
    "release": "the authors' release",
    "flux": "a FLUX",
    "pipeline": "a pipeline of NAMI",
    "run": "a run",
}


def add_command(commands: Any) -> None:
    """Add ``convert`` to the command line."""
    parser = commands.add_parser(
        "convert",
        help="make a pipeline of the authors' release, of a FLUX, or of a NAMI and a finer stage",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder, a run, or a name on the Hugging Face hub")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder to create")
    parser.add_argument(
        "--num_layers",
        type=whole_number,
        nargs="+",
        metavar="N",
        help="a FLUX: double blocks that each stage adds, coarsest first; --add_stage: of the new one (default 0)",
    )
    parser.add_argument(
        "--num_single_layers",
        type=whole_number,
        nargs="+",
        metavar="N",
        help="single blocks that each stage adds (the release: 1 7 6); --add_stage: those of the new one (default 0)",
    )
    release = parser.add_argument_group("the authors' release")
    release.add_argument(
        "--jump",
        choices=["matched", "released"],
        help="matched: restore the noise that their windows were made for, at any size and aspect (default); released: "
        "their scale and shift for each position, without noise, at one size alone",
    )
    release.add_argument(
        "--axes_dims_rope",
        type=positive_int,
        nargs=3,
        metavar="N",
        help="rotary dimensions of a network of another size",
    )
    flux = parser.add_argument_group("a FLUX")
    flux.add_argument(
        "--window_ratios", type=float, nargs="+", metavar="R", help="relative widths of the windows (default: even)"
    )
    flux.add_argument(
        "--output_head", choices=["shared", "per_stage"], help="one head for all stages (default), or a copy for each"
    )
    flux.add_argument("--resolution", type=positive_int, metavar="PX", help="of the finest stage (default 1024)")
    flux.add_argument(
        "--encoders", metavar="PIPELINE", help="of a transformer alone: the FLUX pipeline that has the other parts"
    )
    finer = parser.add_argument_group("a NAMI with one finer stage")
    finer.add_argument("--add_stage", type=positive_int, metavar="PX", help="px of the new stage, twice the finest's")
    finer.add_argument(
        "--window_ratio",
        type=float,
        metavar="R",
        help="width of the new stage's window, of that which the finest one has (default: half of it)",
    )
    add_checkpoint_options(parser)
    parser.set_defaults(execute=convert)


def convert(options: Namespace) -> None:
    """Write the pipeline's folder under a temporary name, and rename it when it is complete.

    Raises:
        FileNotFoundError: the source, or a file of it, isn't there.
        FileExistsError: the output exists already.
        ValueError: the source can't be converted, or an option doesn't fit it.
    """
    from nami_lightning.conversion.convert import find_source, write_pipeline

    source = find_source(options.source)
    refuse_other_options(options, source.kind)
    notes = write_pipeline(Path(options.output), make_writer(source, options))
    for note in notes:
        print(f"Note: {note}")
    print(f"{options.output}: a NamiPipeline of {NAMES[source.kind]}")


def refuse_other_options(options: Namespace, kind: str) -> None:
    """Refuse options that a kind of source doesn't take.

    Raises:
        ValueError: naming the option and what it is for.
    """
    for name in sorted({name for names in OPTIONS.values() for name in names} - set(OPTIONS[kind])):
        if getattr(options, name) is not None:
            takers = " or ".join(NAMES[other] for other, names in OPTIONS.items() if name in names)
            raise ValueError(f"--{name} is for {takers}, and {options.source} is {NAMES[kind]}")
    if kind in ("pipeline", "run") and not (options.add_stage or options.num_layers or options.num_single_layers):
        raise ValueError(
            f"{options.source} is {NAMES[kind]} already: give --add_stage PX to add a finer stage, or --num_layers and "
            "--num_single_layers to split one stage's blocks over several; lightning export writes a run's checkpoint "
            "as it is"
        )
    wrong, right = ["window_ratios", "output_head"], "to split one stage, not for --add_stage"
    if options.add_stage is None:
        wrong, right = ["window_ratio"], "for --add_stage"
    for name in wrong:
        if kind in ("pipeline", "run") and getattr(options, name) is not None:
            raise ValueError(f"--{name} is {right}")


def make_writer(source: "Source", options: Namespace) -> "Write":
    """Return what writes the parts of the pipeline.

    Raises:
        ValueError: options that don't fit the source or each other.
    """
    from nami_lightning.conversion import convert as conversion
    from nami_lightning.conversion.add_stage import NewStage
    from nami_lightning.conversion.flux import FluxSplit, convert_flux, pipeline_of
    from nami_lightning.conversion.released import convert_release, read_layout
    from nami_lightning.conversion.weights import local_folder

    if source.kind == "release":
        layout = read_layout(source.folder, options.num_single_layers, options.axes_dims_rope)
        return lambda target: convert_release(source.folder, target, options.jump or "matched", layout)
    split = FluxSplit(
        options.num_layers,
        options.num_single_layers,
        options.window_ratios,
        options.output_head or "shared",
        options.resolution or 1024,
    )
    if source.kind == "flux":
        encoders = local_folder(options.encoders, conversion.PATTERNS) if options.encoders else None
        folder, parts = pipeline_of(source.folder, encoders)
        return lambda target: convert_flux(folder, parts, target, split)
    nami = conversion.load_nami(source, options.step, options.ema is not False)
    if options.add_stage is None:
        return lambda target: conversion.split_stages(nami, split, target)
    double, single = (one_number(options, name) for name in ("num_layers", "num_single_layers"))
    stage = NewStage(options.add_stage, double, single, options.window_ratio)
    return lambda target: conversion.add_stage(nami, stage, target)


def one_number(options: Namespace, name: str) -> int:
    """Return the one number of an option that takes several for other sources; 0 if it isn't given.

    Raises:
        ValueError: there are several.
    """
    values = getattr(options, name) or [0]
    if len(values) != 1:
        raise ValueError(f"--{name} is one number with --add_stage: the blocks that the new stage adds")
    return int(values[0])
