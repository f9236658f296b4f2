"""``lightning run``: train what a recipe describes, or resume from its run's newest checkpoint."""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning as L

    from nami_lightning.runs.recipe import Recipe
    from nami_lightning.runs.run_dir import Run
    from nami_lightning.training.module import NamiModule

EPILOG = """\
Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint after the current step and end the run with exit status 130,
or with 75 if it should be started again. A second signal ends it at once. The output of every rank but the
first is in the run's logs/rank_N.log.

Any recipe key can follow: --curriculum.unit 8 --trainer.devices 2 --config OVERLAY.yaml
--print_config prints the resolved recipe; the recipes in recipes/ explain every key."""


def add_command(commands: Any) -> None:
    """Add ``run`` to the command line."""
    parser = commands.add_parser(
        "run",
        help="train what a recipe describes; run again to resume",
        description="Train what RECIPE describes. Run the same command again to resume from the newest checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a packaged recipe (openmoji)")
    parser.add_argument("--fresh", action="store_true", help="start over; the old run is renamed, but never deleted")
    parser.set_defaults(execute=run, takes_keys=True)


def run(options: Namespace) -> None:
    """Train a recipe; if its run has a checkpoint, resume from the newest one."""
    from lightning.pytorch.utilities import rank_zero_info

    from nami_lightning.runs.lock import hold
    from nami_lightning.runs.rank_logs import output_of_rank
    from nami_lightning.runs.recipe import Recipe
    from nami_lightning.runs.run_dir import Run

    recipe = Recipe(options.recipe, options.overrides)
    run = Run(recipe.folder)
    model, data, trainer = recipe.make()
    fresh = options.fresh and not is_restart()
    if fresh and trainer.global_rank == 0 and (aside := run.set_aside()):
        rank_zero_info(f"Starting over; the old run is now {aside}")
    lock = hold(run.folder) if trainer.global_rank == 0 else nullcontext()
    with output_of_rank(trainer.global_rank, run.folder / "logs"), lock:
        train(run, recipe, model, data, trainer, fresh)


def train(
    run: Run, recipe: Recipe, model: NamiModule, data: L.LightningDataModule, trainer: L.Trainer, fresh: bool
) -> None:
    """Resume a run from its newest checkpoint, or start it."""
    from lightning.pytorch.utilities import rank_zero_info

    from nami_lightning.runs.rank_logs import join_after_restart
    from nami_lightning.training.strategies import FSDP2Strategy

    curriculum = model.curriculum
    # With --fresh another rank may not have renamed the old run yet: don't look at it.
    newest = None if fresh else run.load_newest()
    if newest is None:
        rank_zero_info(f"New run {run.folder}: {curriculum.total_steps} steps in {len(curriculum.phases)} phases")
    else:
        path, checkpoint = newest
        model.check_checkpoint(checkpoint)
        step = checkpoint["nami"]["step"]
        where = curriculum.describe(step)
        if step >= curriculum.total_steps:
            rank_zero_info(f"{run.folder} is finished ({where}). Sample: lightning sample {run.folder} --prompt '...'")
            return
        if path.is_dir() and not isinstance(trainer.strategy, FSDP2Strategy):
            raise ValueError(
                f"{path} was written by FSDP2Strategy: resume with it as trainer.strategy (on one device too)"
            )
        rank_zero_info(f"Resuming {run.folder} from {where}, checkpoint {path.name}")

    if trainer.global_rank == 0:
        run.write_recipe(recipe.dump())
    join_after_restart(trainer.strategy)
    trainer.fit(model, data, ckpt_path=newest[0] if newest else None, weights_only=True)
    if model.step < curriculum.total_steps:
        rank_zero_info(f"Stopped at {curriculum.describe(model.step)}. Run the same command again to resume.")
    else:
        rank_zero_info(f"Done. Samples: {run.folder / 'samples'}  Curves: tensorboard --logdir {run.folder.parent}")


def is_restart() -> bool:
    """Tell whether torchrun or SLURM started this job again after a failure; then ``--fresh`` must not apply."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(int(count) > 0 for count in counts)
