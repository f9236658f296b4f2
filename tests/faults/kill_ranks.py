"""Kills one of two ranks again and again, in a step or while a checkpoint is written; torchrun starts both anew.

    python tests/faults/kill_ranks.py --kills 20        # what `make faults` does

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
from faults import ENVIRONMENT, numbers, same_numbers
from tqdm import tqdm

from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation, fingerprint, settings_of
from nami_lightning.datamodules.sources import OpenMoji
from nami_lightning.runs.run_dir import Run, read_metadata, step_of

TINY = Path(__file__).parents[1] / "tiny.yaml"


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
            {"class_path": "faults.TellProcess"},
            {
                "class_path": "nami_lightning.callbacks.RunCheckpoint",
                "init_args": {"every_n_steps": 2, "asynchronous": True},
            },
        ],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(recipe: Path, name: str, restarts: int, log: Path) -> "subprocess.Popen[bytes]":
    """The recipe under torchrun on two processes of this machine."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", str(restarts)]
    command = [sys.executable, *torchrun, "-m", "nami_lightning.cli", "run", str(recipe), "--name", name]
    with log.open("ab") as file:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file)


def disturb(process: "subprocess.Popen[bytes]", run: Path, kills: int, steps: int, chance: random.Random) -> None:
    """Kill a rank ``kills`` times, every second time while a checkpoint is being written, if one still is."""
    hold = run / "hold"
    hold.parent.mkdir()
    hold.touch()
    last = 0.0
    for number in tqdm(range(kills), "kills"):
        rank, in_writing = chance.randrange(2), number % 2 == 1
        wait_for(process, partial(began, run, last))
        time.sleep(chance.uniform(0, 0.5))
        if in_writing:
            wait_for(process, lambda: list(run.glob("checkpoints/*.partial")) or newest_step(run) >= steps - 2)
            in_writing = bool(list(run.glob("checkpoints/*.partial")))
        os.kill(pid_of(run, rank), signal.SIGKILL)
        newest = newest_step(run)
        if newest:
            checkpoint = Run(run).checkpoint()
            assert read_metadata(checkpoint)["nami"]["step"] == step_of(checkpoint)
            assert numbers(checkpoint)
        tqdm.write(f"killed rank {rank} in {'writing' if in_writing else 'a step'}; the newest is of step {newest}")
        # Not before the other is gone too: what it wrote must not pass for a sign of the next start.
        wait_for(process, lambda: not any(alive(pid_of(run, rank)) for rank in range(2)))
        last = time.time()
    hold.unlink()


def wait_for(process: "subprocess.Popen[bytes]", done: Callable[[], Any]) -> None:
    """Until ``done()``; the run must not end before."""
    while not done():
        assert process.poll() is None, "the run ended on its own"
        time.sleep(0.001)


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


def check(folder: Path, kills: int, steps: int, seed: int, data: Path) -> list[str]:
    """What differs between a disturbed run and one that was left alone; nothing should."""
    recipe = write_recipe(folder, steps, data)
    log = folder / "output.log"
    for name, restarts in (("whole", 0), ("killed", kills)):
        process = start(recipe, name, restarts, log)
        if restarts:
            disturb(process, folder / name, kills, steps, random.Random(seed))
        assert process.wait() == 0, f"{name} failed: see {log}"
    one, other = (Run(folder / name).checkpoints[-1] for name in ("whole", "killed"))
    assert step_of(one) == step_of(other) == steps
    return same_numbers(numbers(one), numbers(other))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="default 20")
    parser.add_argument("--steps", type=int, help="of the run (default: 6 a kill)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args()
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
