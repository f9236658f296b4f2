"""The bench of a training step: both sides compute alike, and reading counts for neither."""

import weakref
from argparse import Namespace
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch

from nami_lightning import NamiTransformer2DModel
from nami_lightning.benchmarks import train_step
from nami_lightning.datamodules.step_dataset import StepDataset

TINY = Path(__file__).parents[1] / "tiny.yaml"
SLOW = 0.6
"""Seconds that reading a batch takes here; a step takes a tenth of it."""

PHASES = "[{steps: 1, ratio: [2, 1, 1], learning_rate: 0.002}]"


@pytest.fixture
def options(tiny: list[str]) -> Namespace:
    settings = ["--curriculum.phases", PHASES, "--data.init_args.num_workers", "0", "--trainer.precision", "bf16-mixed"]
    return Namespace(recipe=tiny[0], overrides=[*tiny[1:], *settings], steps=2, strategy=None, devices=None)


def test_both_sides_compute_in_the_trainers_precision(options: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = NamiTransformer2DModel.forward
    seen: dict[int, list[bool]] = {}

    def noted(network: NamiTransformer2DModel, *inputs: Any, **settings: Any) -> Any:
        seen.setdefault(id(network), []).append(torch.is_autocast_enabled("cpu"))
        return forward(network, *inputs, **settings)

    monkeypatch.setattr(NamiTransformer2DModel, "forward", noted)
    train_step.measure_step(options)
    assert len(seen) == 2  # Lightning's network, and the bare loop's
    assert all(all(autocast) for autocast in seen.values())


def test_reading_counts_for_neither_side_and_one_step_is_held(
    options: Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, held, alive = StepDataset.__getitem__, [], []

    def slow(steps: StepDataset, number: int) -> Any:
        sleep(SLOW)
        batch = read(steps, number)
        held.append(weakref.ref(batch[0].images))
        alive.append(sum(images() is not None for images in held))
        return batch

    monkeypatch.setattr(StepDataset, "__getitem__", slow)
    train_step.measure_step(options)
    assert len(alive) == options.steps + train_step.WARM_UP
    assert max(alive) <= 2
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "2:1:1" in line)
    lightning, bare = float(row[3]), float(row[5])
    assert lightning < SLOW
    assert bare < SLOW
