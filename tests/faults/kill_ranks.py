"""Kills one of two ranks again and again, in a step or while a checkpoint is written; torchrun starts both anew.

    PYTHONPATH=tests python tests/faults/kill_ranks.py --kills 20        # what `make faults` does

After every kill the newest checkpoint must load. In the end weights, EMA and moments must be those of a run that nobody
disturbed: equal bit for bit. Prints a line a kill; the exit status is 1 if anything differs.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from helpers.checkpoint_contents import numbers, same_numbers
from helpers.processes import ENVIRONMENT, end, execute, start
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from tqdm import tqdm

from nami_lightning.cli.main import main as lightning
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation, fingerprint, settings_of
from nami_lightning.datamodules.sources import OpenMoji
from nami_lightning.runs.run_dir import Run, read_metadata, step_of

TINY = Path(__file__).parents[1] / "tiny.yaml"
ExitCode = Callable[[], int | None]
Launch = Callable[[list[str], int, Path], ExitCode]


def write_recipe(folder: Path, steps: int, data: Path) -> Path:
    """The tests' recipe on two ranks with FSDP2, a checkpoint every two steps, and nothing drawn."""
    recipe = yaml.safe_load(TINY.read_text())
    recipe["output_dir"] = str(folder)
    half = steps // 2
    recipe["curriculum"]["phases"] = [
        {"steps": half, "ratio": [2, 2, 1], "learning_rate": 2.0e-3, "warmup_steps": 2},
        {"steps": steps - half, "ratio": [1, 2, 2], "learning_rate": 1.0e-3},
    ]
    recipe["data"]["init_args"] |= {"folder": str(data), "num_workers": 0}
    callbacks = recipe["trainer"]["callbacks"]
    recipe["trainer"] |= {
        "devices": 2,
        "strategy": "fsdp2",
        "limit_val_batches": 0,
        "callbacks": [
            *[
                entry
                for entry in callbacks
                if entry["class_path"].endswith(("CurriculumCallback", "Pretraining", "EMA"))
            ],
            {"class_path": "helpers.harmful_callbacks.TellProcess"},
            {
                "class_path": "nami_lightning.callbacks.RunCheckpoint",
                "init_args": {"every_n_steps": 2, "asynchronous": True},
            },
        ],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def torchrun(arguments: list[str], restarts: int, log: Path) -> ExitCode:
    """Start ``lightning ARGUMENTS`` under torchrun, in two processes that import everything anew at each start."""
    command = [sys.executable, "-m", "torch.distributed.run", *agent_options(restarts), "-m", "nami_lightning.cli"]
    with log.open("ab") as file:
        return subprocess.Popen([*command, *arguments], stdout=file, stderr=file).poll


def forked_torchrun(arguments: list[str], restarts: int, log: Path) -> ExitCode:
    """As ``torchrun``, but its agent and the ranks that it starts are forked from one that has imported everything."""
    (process,) = start(be_agent, (agent_options(restarts), arguments), 1, log)
    return lambda: process.exitcode


def agent_options(restarts: int) -> list[str]:
    """Two ranks on this machine; what ``--standalone`` sets is written out, since the command alone knows it."""
    alone = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "kill_ranks"]
    return [*alone, "--nproc_per_node", "2", "--max-restarts", str(restarts)]


def be_agent(options: list[str], arguments: list[str]) -> None:
    """Do what ``python -m torch.distributed.run`` does, with a function in place of a command."""
    config, _, _ = config_from_args(parse_args([*options, "--start-method", "fork", "a_script"]))
    elastic_launch(config, entrypoint=be_rank)(arguments)


def be_rank(arguments: list[str]) -> None:
    if status := lightning(arguments):
        raise SystemExit(status)


def disturb(exit_code: ExitCode, run: Path, kills: int, steps: int, chance: random.Random) -> None:
    """Kill a rank ``kills`` times, every second time while a checkpoint is being written, if one still is."""
    hold = run / "hold"
    hold.parent.mkdir()
    hold.touch()
    last = 0.0
    for number in tqdm(range(kills), "kills"):
        rank, in_writing = chance.randrange(2), number % 2 == 1
        wait_for(exit_code, partial(began, run, last))
        time.sleep(chance.uniform(0, 0.5))
        if in_writing:
            wait_for(exit_code, partial(is_writing, run, steps), pause=0.001)
            in_writing = bool(list(run.glob("checkpoints/*.partial")))
        os.kill(pid_of(run, rank), signal.SIGKILL)
        newest = newest_step(run)
        if newest:
            checkpoint = Run(run).checkpoint()
            assert read_metadata(checkpoint)["nami"]["step"] == step_of(checkpoint)
            assert numbers(checkpoint)
        tqdm.write(f"killed rank {rank} in {'writing' if in_writing else 'a step'}; the newest is of step {newest}")
        # Not before the other is gone too: what it wrote must not pass for a sign of the next start.
        wait_for(exit_code, lambda: not any(alive(pid_of(run, rank)) for rank in range(2)))
        last = time.time()
    hold.unlink()


def wait_for(exit_code: ExitCode, done: Callable[[], Any], pause: float = 0.01) -> None:
    """Until ``done()``; the run must not end before."""
    while not done():
        assert exit_code() is None, "the run ended on its own"
        time.sleep(pause)


def is_writing(run: Path, steps: int) -> bool:
    """Whether a checkpoint after the first is being written, or none is left to be."""
    newest = newest_step(run)
    return newest >= steps - 2 or (newest > 0 and any(run.glob("checkpoints/*.partial")))


def began(run: Path, after: float) -> bool:
    """Whether both ranks have begun a step since the time ``after``."""
    paths = [run / f"rank_{rank}.pid" for rank in range(2)]
    return all(path.exists() and path.stat().st_mtime > after for path in paths)


def pid_of(run: Path, rank: int) -> int:
    return int((run / f"rank_{rank}.pid").read_text())


def newest_step(run: Path) -> int:
    """0 before the first checkpoint."""
    return max(map(step_of, Run(run).checkpoints), default=0)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def check(folder: Path, kills: int, steps: int, seed: int, data: Path, launch: Launch = torchrun) -> list[str]:
    """What differs between a disturbed run and one that was left alone; nothing should."""
    recipe = write_recipe(folder, steps, data)
    log = folder / "output.log"
    assert end(start(execute, (["run", str(recipe), "--name", "whole"],), 2, log)) == 0, log.read_text()
    exit_code = launch(["run", str(recipe), "--name", "killed"], kills, log)
    disturb(exit_code, folder / "killed", kills, steps, random.Random(seed))
    while exit_code() is None:
        time.sleep(0.05)
    assert exit_code() == 0, log.read_text()
    assert f"Resuming {folder / 'killed'}" in log.read_text()
    one, other = (Run(folder / name).checkpoints[-1] for name in ("whole", "killed"))
    assert step_of(one) == step_of(other) == steps
    return same_numbers(numbers(one), numbers(other))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="default 20")
    parser.add_argument("--steps", type=int, help="of the run (default: 6 a kill)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, preparation = OpenMoji(["en", "de"], 80, size=32), Preparation([32], heldout_percent=10.0, format="png")
        data = folder / "data"
        prepare(source, data / fingerprint(settings_of(source, preparation)), preparation, workers=1)
        different = check(folder, options.kills, options.steps or 6 * options.kills, options.seed, data)
    print("\n".join(different) or "The disturbed run ended with the same numbers, bit for bit.")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
