"""``lightning run``: train what a recipe describes, or resume from its run's newest checkpoint."""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from contextlib import ExitStack
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
    parser.add_argument(
        "--accept_changed_data", action="store_true", help="resume although the data set is not the checkpoint's"
    )
    parser.set_defaults(execute=run, takes_keys=True)


def run(options: Namespace) -> None:
    """Train a recipe; if its run has a checkpoint, resume from the newest one."""
    from nami_lightning.callbacks.terminal import bring_terminal_output
    from nami_lightning.runs.export import find_start
    from nami_lightning.runs.lock import hold
    from nami_lightning.runs.rank_logs import output_of_rank
    from nami_lightning.runs.rank_start import decided_by_rank_zero
    from nami_lightning.runs.recipe import Recipe, class_paths
    from nami_lightning.runs.run_dir import Run
    from nami_lightning.training.checks import check_precision

    recipe = Recipe(options.recipe, options.overrides)
    fresh = options.fresh and not is_restart()
    start = find_start(recipe, fresh)
    if start is not None:
        recipe = Recipe(options.recipe, [*options.overrides, "--model.pretrained", str(start.folder)])
    check_precision(recipe.config.trainer.precision)
    run = Run(recipe.folder)
    model, data, trainer = recipe.make()
    bring_terminal_output(trainer, class_paths(recipe.config.as_dict()))
    if recipe.config.trainer.enable_checkpointing is not False:
        bring_checkpoints(trainer)
    model.accept_changed_data = options.accept_changed_data
    with ExitStack() as stack:
        stack.enter_context(output_of_rank(trainer.global_rank, run.folder / "logs"))

        def begin() -> dict[str, Any]:
            """Take the lock of the run's folder and decide, on rank 0, what all ranks start from."""
            if fresh and (aside := run.set_aside()):
                print(f"Starting over; the old run is now {aside}")
            stack.enter_context(hold(run.folder))
            decision = decide_start(run, recipe, model, trainer)
            if not decision["finished"]:
                if start is not None and not start.folder.exists():
                    start.write(start.folder)
                run.write_recipe(recipe.dump())
            return decision

        decision = decided_by_rank_zero(trainer, begin)
        if decision["recipe"] != recipe.digest():
            raise RuntimeError(
                f"rank {trainer.global_rank} reads another recipe than rank 0: start all ranks with the same file, "
                "overrides and version"
            )
        if not decision["finished"]:
            train(run, recipe, model, data, trainer, decision["checkpoint"])


def bring_checkpoints(trainer: L.Trainer) -> None:
    """Add RunCheckpoint to a trainer that lacks it: without it a run would leave nothing to resume or to sample."""
    from nami_lightning.callbacks import RunCheckpoint

    if not any(isinstance(callback, RunCheckpoint) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        trainer.callbacks.append(RunCheckpoint())  # type: ignore[attr-defined]


def decide_start(run: Run, recipe: Recipe, model: NamiModule, trainer: L.Trainer) -> dict[str, Any]:
    """Decide what a run starts from, and say so.

    Returns:
        The ``checkpoint``'s name, or None to begin; whether the run is ``finished``; and a digest of the ``recipe``.

    Raises:
        ValueError: the newest checkpoint is not one that this recipe can go on from.
    """
    from lightning.pytorch.utilities import rank_zero_info

    from nami_lightning.training.strategies import FSDP2Strategy

    curriculum = model.curriculum
    decision = {"checkpoint": None, "finished": False, "recipe": recipe.digest()}
    newest = run.load_newest()
    if newest is None:
        rank_zero_info(f"New run {run.folder}: {curriculum.total_steps} steps in {len(curriculum.phases)} phases")
        return decision
    path, checkpoint = newest
    model.identity.check(checkpoint)
    step = checkpoint["nami"]["step"]
    where = curriculum.describe(step)
    if step >= curriculum.total_steps:
        rank_zero_info(f"{run.folder} is finished ({where}). Sample: lightning sample {run.folder} --prompt '...'")
        return decision | {"finished": True}
    if path.is_dir() and not isinstance(trainer.strategy, FSDP2Strategy):
        raise ValueError(f"{path} was written by FSDP2Strategy: resume with it as trainer.strategy (on one device too)")
    rank_zero_info(f"Resuming {run.folder} from {where}, checkpoint {path.name}")
    return decision | {"checkpoint": path.name}


def train(
    run: Run, recipe: Recipe, model: NamiModule, data: L.LightningDataModule, trainer: L.Trainer, checkpoint: str | None
) -> None:
    """Train from a checkpoint of the run, or from the beginning."""
    from lightning.pytorch.utilities import rank_zero_info

    from nami_lightning.datamodules import MultiResolutionDataModule
    from nami_lightning.runs.loggers import GuardedLogger, report_failures, start_loggers

    curriculum = model.curriculum
    if isinstance(data, MultiResolutionDataModule):
        data.keep_prepared = checkpoint is not None and not model.accept_changed_data
    model.same_on_all_ranks = {"recipe": recipe.digest(), "checkpoint": checkpoint}
    path = None if checkpoint is None else run.folder / "checkpoints" / checkpoint
    start_loggers(trainer.loggers, run.folder, recipe.values(), resumed=checkpoint is not None)
    guarded = [GuardedLogger(logger) for logger in trainer.loggers]
    trainer.fit(model, data, ckpt_path=path, weights_only=True)
    if model.step < curriculum.total_steps:
        rank_zero_info(f"Stopped at {curriculum.describe(model.step)}. Run the same command again to resume.")
    else:
        rank_zero_info(f"Done. {run.describe_results()}")
    report_failures(guarded)


def is_restart() -> bool:
    """Tell whether torchrun or SLURM started this job again after a failure; then ``--fresh`` must not apply."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(int(count) > 0 for count in counts)
