"""Run a command whose work is a list of parts on a Ray cluster: the shards of the command are Ray's tasks.

Ray places the tasks, starts those of a lost machine or process again elsewhere, and knows when all are done. A task
runs the same command with ``--shard I/N``, which skips the parts that are finished already. So the result is the same
on any number of machines, whatever is lost on the way. All machines need this package, and must reach the data and the
output under the same names: in a store, or in folders that they share.
"""

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ENGINES = ("processes", "ray")
RETRIES = 8
"""How many times a task is started again whose process or machine was lost."""


def add_engine_options(parser: Any) -> None:
    """Add the options of where the work is done to a parser of argparse or jsonargparse."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="processes",
        help="processes: on this machine. ray: on a Ray cluster (pip install '.[ray]'), which must reach source and "
        "output under the same names.",
    )
    parser.add_argument(
        "--tasks", type=int, help="Number of Ray tasks the work is divided into (default: all fit at once)."
    )
    parser.add_argument(
        "--address", help="Address of the Ray cluster (default: RAY_ADDRESS, or else a cluster on this machine)."
    )
    parser.add_argument("--cpus_per_task", type=int, default=1, help="Cores that Ray keeps for a task.")
    parser.add_argument("--gpus_per_task", type=float, default=0.0, help="GPUs that Ray keeps for a task: 1, or 0.5.")


def run_overrides_on_ray(execute: Callable[[Namespace], None], arguments: Sequence[str], settings: Namespace) -> None:
    """Run the shards of a command that parses its arguments itself; then the caller merges what they made.

    Args:
        execute: the command's function, which takes options with ``overrides``.
        arguments: the command's arguments.
        settings: what :func:`add_engine_options` parsed, and ``workers``.
    """
    own = ["--engine", "processes", "--workers", str(settings.cpus_per_task)]
    run_on_ray(execute, lambda shard: Namespace(overrides=[*arguments, *own, "--shard", shard]), settings)


def run_on_ray(
    execute: Callable[[Namespace], None], options_of: Callable[[str], Namespace], settings: Namespace
) -> None:
    """Run all shards of a command on a Ray cluster, and wait for them.

    Args:
        execute: the function of the command.
        options_of: gives the options of a shard ``I/N``.
        settings: what :func:`add_engine_options` parsed.

    Raises:
        ModuleNotFoundError: the extra ``ray`` is not installed.
        ValueError: the cluster has less than a task needs, or an option is below 1.
        RuntimeError: a task was lost too often.
        Exception: what a shard raised.
    """
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"--engine ray needs Ray: pip install '.[ray]' ({error})") from error
    from tqdm.auto import tqdm

    for name in ("tasks", "cpus_per_task"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1; got {value}")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own words: the coming default
    ray.init(settings.address, log_to_driver=False, configure_logging=False, include_dashboard=False)
    try:
        count = settings.tasks or tasks_at_once(ray.cluster_resources(), settings.cpus_per_task, settings.gpus_per_task)
        # A process runs one task, so that the memory of its GPU is free for the next.
        kind = {"num_cpus": settings.cpus_per_task, "num_gpus": settings.gpus_per_task, "max_calls": 1}
        task = ray.remote(**kind, max_retries=RETRIES)(_run_shard)
        waiting = [task.remote(execute, options_of(f"{number}/{count}"), os.getcwd()) for number in range(count)]
        with tqdm(desc="on Ray", total=count, unit="task") as bar:
            while waiting:
                done, waiting = ray.wait(waiting)
                ray.get(done)
                bar.update(len(done))
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise RuntimeError(
            f"Ray lost a task {RETRIES + 1} times ({type(error).__name__}; out of memory?): the same command goes on "
            "with what is missing"
        ) from error
    finally:
        ray.shutdown()


def tasks_at_once(resources: dict[str, float], cpus: int, gpus: float) -> int:
    """Return how many tasks a cluster runs at the same time.

    Args:
        resources: the cluster's, as Ray counts them.
        cpus: the cores of a task.
        gpus: the GPUs of a task.

    Raises:
        ValueError: it runs none.
    """
    fits = [int(resources.get("CPU", 0) // cpus), *([int(resources.get("GPU", 0) // gpus)] if gpus else [])]
    if min(fits) < 1:
        raise ValueError(
            f"the Ray cluster has {resources.get('CPU', 0):g} cores and {resources.get('GPU', 0):g} GPUs, too few for "
            f"a task with --cpus_per_task {cpus} --gpus_per_task {gpus:g}"
        )
    return min(fits)


def _run_shard(execute: Callable[[Namespace], None], options: Namespace, folder: str) -> None:
    """Run one shard, in the folder in which the command was given if this machine has it; Ray calls this."""
    if Path(folder).is_dir():
        os.chdir(folder)
    execute(options)
