"""Resuming: against the uninterrupted run, bit for bit, after kill -9 at random points."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.processes import execute, start

from nami_lightning.callbacks import RunCheckpoint
from nami_lightning.runs.run_dir import Run

KILLS = int(os.environ.get("NAMI_KILLS", "5"))


class RecordIds(RunCheckpoint):
    """Appends each step's sample ids to ``ids.jsonl``, then checkpoints as its parent does."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """One line a step."""
        line = {"step": batch[0].step, "ids": [[micro.stage, *micro.ids] for micro in batch]}
        with (Path(trainer.default_root_dir) / "ids.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def start_run(arguments: list[str], output: Path) -> Any:
    (process,) = start(execute, (["run", *arguments],), 1, output)
    return process


def lines_of(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def ids_by_step(run: Path) -> dict[int, Any]:
    """The last line of each step: a step after the last checkpoint is done again."""
    lines = map(json.loads, (run / "ids.jsonl").read_text().splitlines())
    return {line["step"]: line["ids"] for line in lines}


@pytest.fixture
def recording(tiny: list[str], tmp_path: Path) -> list[str]:
    recipe = yaml.safe_load(Path(tiny[0]).read_text())
    recipe["trainer"]["callbacks"][-1]["class_path"] = f"{__name__}.RecordIds"
    path = tmp_path / "recording.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return [str(path), *tiny[1:]]


def test_kill_9_at_random_points_ends_with_the_same_bits(recording: list[str], tmp_path: Path) -> None:
    output = tmp_path / "output"
    whole = start_run([*recording, "--name", "whole"], output)
    whole.join()
    assert whole.exitcode == 0, output.read_text()

    chance, killed = random.Random(0), tmp_path / "runs" / "killed" / "ids.jsonl"
    for _ in range(KILLS):
        process = start_run([*recording, "--name", "killed"], output)
        steps = lines_of(killed) + chance.randint(1, 10)  # fewer than are left, so that none of the runs ends by itself
        while lines_of(killed) < steps and process.is_alive():
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))  # a step, or writing a checkpoint
        assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    last = start_run([*recording, "--name", "killed"], output)
    last.join()
    assert last.exitcode == 0, output.read_text()

    one, other = Run(tmp_path / "runs" / "whole"), Run(tmp_path / "runs" / "killed")
    assert [path.name for path in other.checkpoints] == ["step=0000056.ckpt", "step=0000060.ckpt"]
    assert ids_by_step(other.folder) == ids_by_step(one.folder)
    assert sorted(ids_by_step(one.folder)) == list(range(60))
    batches = [batch for _, batch in sorted(ids_by_step(other.folder).items())]
    stream = [name for batch in batches for stage, *names in batch if stage == 0 for name in names]
    epoch = len(set(stream))
    assert len(stream) > 2 * epoch  # of stage 1, which has but one bucket
    assert len(set(stream[:epoch])) == len(set(stream[epoch : 2 * epoch])) == epoch
    _, expected = one.load_newest() or pytest.fail("no checkpoint")
    _, found = other.load_newest() or pytest.fail("no checkpoint")
    assert found["nami"] == expected["nami"]
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor), name
    moments, found_moments = (c["optimizer_states"][0]["state"] for c in (expected, found))
    assert all(torch.equal(found_moments[i][key], value) for i, s in moments.items() for key, value in s.items())
    assert not list((tmp_path / "runs" / "killed").rglob("*.partial"))
