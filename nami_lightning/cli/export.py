"""``lightning export``: write a checkpoint as a folder for NamiPipeline.from_pretrained, or for load_lora_weights."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import RUN_HELP, add_checkpoint_options


def add_command(commands: Any) -> None:
    """Add ``export`` to the command line."""
    parser = commands.add_parser(
        "export",
        help="write a checkpoint as a diffusers pipeline",
        description="Write a checkpoint, of one process or of many, as a folder for NamiPipeline.from_pretrained. "
        "This needs no GPU, and only as much memory as the model itself. Of a LoRA's run the LoRA alone is written, "
        "for load_lora_weights.",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    add_checkpoint_options(parser)
    parser.add_argument("--output", metavar="DIR", help="folder to create (default: RUN/pipelines/step=NNNNNNN)")
    parser.add_argument("--merge", action="store_true", help="of a LoRA's run: the whole pipeline, with the LoRA in it")
    parser.set_defaults(execute=export)


def export(options: Namespace) -> None:
    """Write a run's pipeline, or the LoRA that it trains.

    Args:
        options: ``run``; ``step``, or None for the newest checkpoint; ``output``, or None for a folder in the run;
            ``ema``: False for the trained weights in place of the EMA's; ``merge``: add a LoRA to the weights that it
            was trained beside, and write all of them.

    Raises:
        FileNotFoundError: the run or the checkpoint does not exist.
        FileExistsError: the output already exists.
        ValueError: ``merge`` for a run that trains no LoRA.
    """
    from nami_lightning.runs.export import Export, trains_lora
    from nami_lightning.runs.run_dir import find_run, step_of

    run = find_run(options.run)
    checkpoint = run.checkpoint(options.step)
    of_lora = trains_lora(checkpoint)
    if options.merge and not of_lora:
        raise ValueError(f"{run.folder} trains no LoRA: there is nothing to --merge")
    made = Export(run, step_of(checkpoint), options.ema is not False, lora=of_lora and not options.merge)
    target = Path(options.output or made.folder)
    made.write(target)
    if made.lora:
        print(f"{target}: load it with pipeline.load_lora_weights, or use: lightning sample PIPELINE --lora {target}")
    else:
        print(f"{target}: load it with NamiPipeline.from_pretrained, or use: lightning sample {target} --prompt '...'")
