"""Two processes (DDP over gloo) against one: the same global batches, so the same losses and weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nami_lightning.runs import Run

TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp_find_unused_parameters_true"]
STEPS = [
    "--curriculum.phases",
    "[{steps: 4, ratio: [2, 1, 1], learning_rate: 0.002}, {steps: 4, ratio: [0, 1, 2], learning_rate: 0.001}]",
    *("--data.init_args.num_workers", "0"),
]


def run(arguments: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "nami_lightning.cli", "run", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def runs(tiny: list[str], tmp_path: Path) -> Path:
    run([*tiny, *STEPS, "--name", "one"])
    run([*tiny, *STEPS, *TWO, "--name", "two"])
    return tmp_path / "runs"


def test_two_processes_train_as_one(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, one = Run(runs / "one").load_newest() or pytest.fail("no checkpoint")
    _, two = Run(runs / "two").load_newest() or pytest.fail("no checkpoint")
    assert one["nami"]["step"] == two["nami"]["step"] == 8
    for name, tensor in one["state_dict"].items():
        assert torch.allclose(two["state_dict"][name], tensor, rtol=2e-4, atol=2e-5, equal_nan=True), name
    logs = []
    for name in ("one", "two"):
        events = EventAccumulator(str(runs / name), size_guidance={"scalars": 0})
        events.Reload()
        logs.append([(e.step, e.value) for e in events.Scalars("train/loss_stage3")])
    assert logs[0]
    for (step, loss), (other_step, other_loss) in zip(*logs, strict=True):
        assert (step, loss) == (other_step, pytest.approx(other_loss, rel=1e-5))
