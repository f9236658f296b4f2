"""``lightning launch slurm``: write the script that runs a recipe on a SLURM cluster and restarts it.

``srun`` starts one process per GPU and returns their exit status; a torchrun in between would change it to 1. SLURM
itself requeues a job whose node failed. The script requeues a job that ran out of time or was preempted: two minutes
before the end every process gets SIGUSR1, saves a checkpoint, and ends with the status REQUEUE.

Commands whose work is a list of parts (``data prepare``, ``data encode``, ``sample``) become an array of jobs, one for
each shard, and a job after them that merges what they made. A job that is started again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nami_lightning.cli.argument_types import SECONDS_TO_SAVE, positive_int, time_limit

if TYPE_CHECKING:
    from nami_lightning.runs.recipe import Recipe

SECONDS_TO_FOLLOW = 300
"""Seconds that the other processes may go on after the first has ended, for whatever reason."""


ARRAYS = {"data": ("data prepare", "data encode"), "sample": ("sample",)}
"""Commands whose shards are the jobs of an array, by their first word."""


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
        "minutes before its time is up, the job saves a checkpoint and is queued again; it then resumes from there. In "
        "place of a recipe, `data prepare`, `data encode` or `sample` with their options: the script, for bash, then "
        "submits the work as an array of jobs.",
        epilog="Any recipe key can follow, as for: lightning run\n\nexamples:\n"
        "  lightning launch slurm nami_2b --nodes 8 --gpus 8 --output nami_2b.sh && sbatch nami_2b.sh\n"
        "  lightning launch slurm --tasks 64 --cpus 8 data prepare --source 's3://pairs/*.tar' --output s3://me/shards "
        "--resolutions 256 512 | bash",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    slurm.add_argument(
        "recipe", metavar="RECIPE", help="a recipe file, or the name of a packaged recipe; or data, or sample"
    )
    slurm.add_argument("--nodes", type=positive_int, help="number of nodes; for a recipe")
    slurm.add_argument("--gpus", type=positive_int, help="number of GPUs of each node, or of each job of an array")
    slurm.add_argument("--tasks", type=positive_int, help="number of jobs of an array; for data and sample")
    slurm.add_argument(
        "--cpus",
        type=positive_int,
        help="number of cores for each GPU (default: the recipe's data workers plus one), or for each job of an array "
        "(default 1)",
    )
    slurm.add_argument("--partition", help="partition of the cluster, as sbatch takes it")
    slurm.add_argument("--account", help="account to charge, as sbatch takes it")
    slurm.add_argument(
        "--time", type=time_limit, help="time limit of the job, as sbatch takes it: 24:00:00 or 2-00:00:00"
    )
    slurm.add_argument(
        "--output", metavar="FILE", help="file of the script (default: print it); with data or sample, their own output"
    )
    slurm.set_defaults(execute=launch_slurm, takes_keys=True)


def launch_slurm(options: Namespace) -> None:
    """Write the script to a file, or print it.

    Raises:
        ValueError: an option is missing, or the run would refuse the recipe.
    """
    if options.recipe in ARRAYS:
        print(array_script(options), end="")
        return
    for name in ("nodes", "gpus"):
        if getattr(options, name) is None:
            raise ValueError(f"give --{name} to train a recipe")
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
            "# Stages differ in the sizes of their tensors: segments that grow leave less of the GPU's memory unused.",
            'export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"',
            f"srun --wait={SECONDS_TO_FOLLOW} {shlex.join(command)}",
            "status=$?",
            f'if [ "$status" -eq {REQUEUE} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$status"',
            "",
        ]
    )


def array_script(options: Namespace) -> str:
    """Return the text of a bash script that submits the shards of a command as an array, and then the merging of them.

    Args:
        options: ``recipe``, which is ``data`` or ``sample``; ``overrides``, the rest of the command; ``output``, its
            option of this name or None; ``tasks``, the number of jobs; ``cpus`` and ``gpus`` of each, ``partition``,
            ``account`` and ``time``, or None.

    Raises:
        ValueError: the number of jobs is missing, or the command's work is no list of parts.
    """
    words = [options.recipe, *options.overrides, *(["--output", options.output] if options.output else [])]
    name = " ".join(words[: len(ARRAYS[options.recipe][0].split())])
    if name not in ARRAYS[options.recipe]:
        raise ValueError(f"lightning {name} can't be an array of jobs; these can: {', '.join(ARRAYS[options.recipe])}")
    if options.tasks is None:
        raise ValueError(f"give --tasks N: lightning {name} is divided into so many jobs")
    logs = Path("logs").resolve()
    settings = {
        "job-name": name.replace(" ", "-"),
        "partition": options.partition,
        "account": options.account,
        "time": options.time,
        "cpus-per-task": options.cpus or 1,
        "gpus-per-node": options.gpus,
        "chdir": Path.cwd(),
        "open-mode": "append",
    }
    workers = ["--workers", str(options.cpus or 1)] if options.recipe == "data" and "--workers" not in words else []
    command = shlex.join([sys.executable, "-m", "nami_lightning.cli", *words, *workers])
    array = settings | {"array": f"0-{options.tasks - 1}", "output": logs / "slurm_%A_%a.log"}
    shards = _job(array, f'{command} --shard "$SLURM_ARRAY_TASK_ID/{options.tasks}"')
    lines = [
        "#!/bin/bash",
        "# Run this with bash. It submits the shards of the work as an array of jobs, and then the merging.",
        f"mkdir -p {shlex.quote(str(logs))}",
        f"shards=$(sbatch --parsable <<'JOB'\n{shards}JOB\n) || exit 1",
        'echo "Submitted the shards as job $shards"',
    ]
    if options.recipe == "data":
        merging = _job(settings | {"output": logs / "slurm_%j.log"}, f"{command} --merge")
        lines.append(f"sbatch --dependency=\"afterok:$shards\" --kill-on-invalid-dep=yes <<'JOB'\n{merging}JOB")
    return "\n".join([*lines, ""])


def _job(settings: Mapping[str, Any], command: str) -> str:
    """Return the text of an sbatch script of one command, which is started again if its node fails."""
    lines = [f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in settings.items() if value is not None]
    return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", f"exec {command}", ""])


def check_on_ranks(recipe: Recipe, ranks: int) -> None:
    """Refuse now what the run would refuse once it has waited in the queue.

    Raises:
        ValueError: the model or the data refuses the recipe, or a step's samples can't be split over the ranks.
    """
    from nami_lightning.training.checks import check_precision

    check_precision(recipe.config.trainer.precision)
    objects = recipe.parser.instantiate(recipe.config)
    limits = getattr(objects.data, "max_micro_batch", None)
    if limits is None:  # a DataModule of another kind splits its batches by itself
        return
    for phase in objects.curriculum.phases:
        for stage, limit in enumerate(limits):
            objects.curriculum.split(phase, stage, ranks, limit)
