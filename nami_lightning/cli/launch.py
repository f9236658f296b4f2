"""``lightning launch slurm``: the script that runs a recipe on a SLURM cluster and asks to be started again.

``srun`` starts one process a GPU, and hands on the status that they end with: a torchrun in between would make it 1.
SLURM itself requeues a job whose node failed; the script requeues one that ran out of time or was preempted, for which
every process gets SIGUSR1 two minutes before the end, saves, and ends with the status REQUEUE.
"""

import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

SECONDS_TO_SAVE = 120
SECONDS_TO_FOLLOW = 300
"""How long the other processes may go on after the first ended, for whatever reason."""


def add_command(commands: Any) -> None:
    """Add ``launch`` and the clusters that it knows to the command line."""
    parser = commands.add_parser(
        "launch",
        help="a script that runs a recipe on a cluster",
        description="Write the script that runs a recipe on a cluster.",
    )
    clusters = parser.add_subparsers(dest="what", required=True, metavar="CLUSTER")
    slurm = clusters.add_parser(
        "slurm",
        help="an sbatch script",
        description="Write the sbatch script that trains RECIPE on a SLURM cluster, one process a GPU. Two minutes "
        "before its time is up the job saves and is queued again; each time it goes on from its newest checkpoint.",
        epilog="Any recipe key can follow, as for: lightning run",
        allow_abbrev=False,
    )
    slurm.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged one")
    slurm.add_argument("--nodes", type=int, required=True, help="how many")
    slurm.add_argument("--gpus", type=int, required=True, help="of each node")
    slurm.add_argument("--cpus", type=int, help="cores for each GPU (default: the recipe's data workers and one more)")
    slurm.add_argument("--partition", help="as sbatch takes it")
    slurm.add_argument("--account", help="as sbatch takes it")
    slurm.add_argument("--time", help="as sbatch takes it: 24:00:00, 2-00:00:00")
    slurm.add_argument("--output", metavar="FILE", help="where the script goes (default: the terminal)")
    slurm.set_defaults(execute=launch_slurm, takes_keys=True)


def launch_slurm(options: Namespace) -> None:
    """Write or print the script."""
    script = slurm_script(options)
    if options.output is None:
        print(script, end="")
    else:
        Path(options.output).write_text(script)
        print(f"Submit it with: sbatch {options.output}")


def slurm_script(options: Namespace) -> str:
    """Return the text of an sbatch script, and make its log's folder, without which SLURM ends a job at once.

    Args:
        options: ``recipe``, ``overrides``, ``nodes``, ``gpus`` (a node), ``cpus`` (a GPU; None for the recipe's workers
            and one more), ``partition``, ``account`` and ``time`` (None for the cluster's own).
    """
    from nami_lightning.runs.preemption import REQUEUE
    from nami_lightning.runs.recipe import Recipe

    sizes = ["--trainer.num_nodes", str(options.nodes), "--trainer.devices", str(options.gpus)]
    recipe = Recipe(options.recipe, [*options.overrides, *sizes])
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
    lines = [f"#SBATCH --{key}={value}" for key, value in settings.items() if value is not None]
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
