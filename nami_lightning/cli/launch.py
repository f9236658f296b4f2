"""``lightning launch slurm``: write the script that runs a recipe on a SLURM cluster and restarts it.

``srun`` starts one process per GPU and returns their exit status; a torchrun in between would change it to 1. SLURM
itself requeues a job whose node failed. The script requeues a job that ran out of time or was preempted: two minutes
before the end every process gets SIGUSR1, saves a checkpoint, and ends with the status REQUEUE.
"""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nami_lightning.cli.argument_types import SECONDS_TO_SAVE, positive_int, time_limit

if TYPE_CHECKING:
    from nami_lightning.runs.recipe import Recipe

SECONDS_TO_FOLLOW = 300
"""Seconds that the other processes may go on after the first has ended, for whatever reason."""


def add_command(commands: Any) -> None:
    """Add ``launch`` and its clusters to the command line."""
    parser = commands.add_parser(
        "launch",
        help="write a script that runs a recipe on a cluster",
        description="Write the script that runs a recipe on a cluster.",
    )
    clusters = parser.add_subparsers(dest="what", required=True, metavar="CLUSTER")
    slurm = clusters.add_parser(
        "slurm",
        help="write an sbatch script for SLURM",
        description="Write the sbatch script that trains RECIPE on a SLURM cluster, with one process per GPU. Two "
        "minutes before its time is up, the job saves a checkpoint and is queued again; it then resumes from there.",
        epilog="Any recipe key can follow, as for: lightning run",
        allow_abbrev=False,
    )
    slurm.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a packaged recipe")
    slurm.add_argument("--nodes", type=positive_int, required=True, help="number of nodes")
    slurm.add_argument("--gpus", type=positive_int, required=True, help="number of GPUs of each node")
    slurm.add_argument(
        "--cpus", type=positive_int, help="number of cores for each GPU (default: the recipe's data workers plus one)"
    )
    slurm.add_argument("--partition", help="partition of the cluster, as sbatch takes it")
    slurm.add_argument("--account", help="account to charge, as sbatch takes it")
    slurm.add_argument(
        "--time", type=time_limit, help="time limit of the job, as sbatch takes it: 24:00:00 or 2-00:00:00"
    )
    slurm.add_argument("--output", metavar="FILE", help="file of the script (default: print it)")
    slurm.set_defaults(execute=launch_slurm, takes_keys=True)


def launch_slurm(options: Namespace) -> None:
    """Write the script to a file, or print it."""
    script = slurm_script(options)
    if options.output is None:
        print(script, end="")
    else:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(script)
        print(f"Submit it with: sbatch {options.output}")


def slurm_script(options: Namespace) -> str:
    """Return the text of an sbatch script, and create the folder of its log.

    SLURM ends a job at once if that folder doesn't exist.

    Args:
        options: ``recipe``; ``overrides``; ``nodes``; ``gpus`` of each node; ``cpus`` for each GPU, or None for the
            recipe's data workers plus one; ``partition``, ``account`` and ``time``, or None for the cluster's defaults.

    Raises:
        ValueError: the run would refuse the recipe on so many GPUs.
    """
    from nami_lightning.runs.preemption import REQUEUE
    from nami_lightning.runs.recipe import Recipe

    sizes = ["--trainer.num_nodes", str(options.nodes), "--trainer.devices", str(options.gpus)]
    recipe = Recipe(options.recipe, [*options.overrides, *sizes])
    check_on_ranks(recipe, options.nodes * options.gpus)
    logs = recipe.folder.resolve() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    workers = recipe.config.data.init_args.get("num_workers", 0)
    path = Path(options.recipe)
    name = str(path.resolve()) if path.is_file() else options.recipe
    command = [sys.executable, "-m", "nami_lightning.cli", "run", name, *options.overrides, *sizes]
    settings = {
        "job-name": recipe.config.name,
        "partition": options.partition,
        "account": options.account,
        "time": options.time,
        "nodes": options.nodes,
        "ntasks-per-node": options.gpus,
        "gpus-per-node": options.gpus,
        "cpus-per-task": options.cpus or workers + 1,
        "signal": f"USR1@{SECONDS_TO_SAVE}",
        "chdir": Path.cwd(),
        "output": logs / "slurm_%j.log",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in settings.items() if value is not None]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            "",
            "# The first process writes to the log above, the others to logs/rank_N.log beside it.",
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
            f"srun --wait={SECONDS_TO_FOLLOW} {shlex.join(command)}",
            "status=$?",
            f'if [ "$status" -eq {REQUEUE} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$status"',
            "",
        ]
    )


def check_on_ranks(recipe: Recipe, ranks: int) -> None:
    """Refuse now what the run would refuse once it has waited in the queue.

    Raises:
        ValueError: the model or the data refuses the recipe, or a step's samples can't be split over the ranks.
    """
    from nami_lightning.training.checks import check_precision
    from nami_lightning.training.curriculum import split_evenly

    check_precision(recipe.config.trainer.precision)
    objects = recipe.parser.instantiate(recipe.config)
    limits = getattr(objects.data, "max_micro_batch", None)
    if limits is None:  # a DataModule of another kind splits its batches by itself
        return
    for phase in objects.curriculum.phases:
        for stage, parts in enumerate(phase.ratio):
            split_evenly(parts * objects.curriculum.unit, ranks, limits[stage], stage)
