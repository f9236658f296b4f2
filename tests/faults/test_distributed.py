"""Several processes over gloo against one: the same global batches, so the same losses and weights, however spread."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nami_lightning.models.text_encoder import PromptEncoder
from nami_lightning.runs.load import load_module
from nami_lightning.runs.run_dir import Run
from nami_lightning.training.strategies import FSDP2Strategy, shard_text_encoder

PHASES = (
    "{steps: 6, ratio: [2, 4, 0], learning_rate: 0.002, warmup_steps: 2}",  # stage 3 is not touched yet
    "{steps: 6, ratio: [4, 2, 2], learning_rate: 0.001, warmup_steps: 0}",
    "{steps: 8, ratio: [0, 2, 4], learning_rate: 0.001, warmup_steps: 0}",
)
STEPS = 20
SETTINGS = ["--data.init_args.num_workers", "0", "--trainer.log_every_n_steps", "1"]
STRATEGIES: dict[str, list[str]] = {
    "ddp": ["--trainer.devices", "2", "--trainer.strategy", "ddp_find_unused_parameters_true"],
    "fsdp2": ["--trainer.devices", "2", "--trainer.strategy", "fsdp2", "--model.activation_checkpointing", "2"],
    "hsdp": [
        *(
            "--trainer.devices",
            "4",
            "--trainer.strategy.class_path",
            "nami_lightning.FSDP2Strategy",
        ),
        *("--trainer.strategy.init_args.replicate", "2", "--trainer.strategy.init_args.reduce_gradients", "step"),
        *("--trainer.strategy.init_args.shard_text_encoder", "true", "--model.text_encoder.cache", "false"),
    ],
}


def phases(*steps: str) -> list[str]:
    return ["--curriculum.phases", f"[{', '.join(steps)}]"]


def run(arguments: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "nami_lightning.cli", "run", *arguments, *SETTINGS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def alone(tiny_module: list[str]) -> Path:
    """The run of one process, which the others are compared with."""
    run([*tiny_module, *phases(*PHASES), "--name", "alone"])
    return Path(tiny_module[2]) / "alone"


def losses(folder: Path) -> dict[str, dict[int, float]]:
    """Name to step to value of all that a run logged of its training."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("train/")]
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}


def weights(folder: Path) -> dict[str, Tensor]:
    """Of both networks, and the bridges."""
    return {
        name.replace("transformer.", "ema.", ema): tensor.float()
        for ema in (False, True)
        for name, tensor in load_module(Run(folder), ema=ema).state_dict().items()
    }


def assert_same(folder: Path, other: Path) -> None:
    one, two = losses(folder), losses(other)
    assert one.keys() == two.keys()
    assert len(one["train/loss"]) == STEPS
    for name, values in one.items():
        assert two[name] == {step: pytest.approx(value, rel=1e-5) for step, value in values.items()}, name
    ours, theirs = weights(folder), weights(other)
    assert any(name.startswith("ema.") for name in ours)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference: Any = (tensor - theirs[name]).nan_to_num().abs().max()
        assert difference < 1e-5, name


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_several_processes_train_as_one(alone: Path, tiny_module: list[str], strategy: str) -> None:
    run([*tiny_module, *phases(*PHASES), *STRATEGIES[strategy], "--name", strategy])
    assert_same(alone, alone.parent / strategy)


def test_bfloat16_computes_nearly_the_same_and_keeps_float32_weights(alone: Path, tiny_module: list[str]) -> None:
    strategy = ["--trainer.strategy.class_path", "nami_lightning.FSDP2Strategy"]
    strategy += ["--trainer.strategy.init_args.param_dtype", "bfloat16", "--trainer.devices", "2"]
    run([*tiny_module, *phases(*PHASES), *strategy, "--name", "bfloat16"])
    exact, rounded = (losses(alone.parent / name)["train/loss"] for name in ("alone", "bfloat16"))
    assert rounded == {step: pytest.approx(loss, rel=0.02) for step, loss in exact.items()}
    assert rounded != exact
    assert all(w.dtype == torch.float32 for w in load_module(Run(alone.parent / "bfloat16")).transformer.parameters())


def test_muon_trains_on_shards_as_on_one_process(tiny_module: list[str], alone: Path) -> None:
    settings = [*tiny_module, *phases(*PHASES), "--model.optimizer", "nami_lightning.MuonAdamW"]
    run([*settings, "--name", "muon"])
    run([*settings, "--name", "muon_shards", *STRATEGIES["fsdp2"]])
    one, two = (losses(alone.parent / name)["train/loss"] for name in ("muon", "muon_shards"))
    assert two == {step: pytest.approx(loss, rel=1e-4) for step, loss in one.items()}
    assert one != losses(alone)["train/loss"]


def test_bench_step_measures_shards_beside_a_bare_loop(tiny_module: list[str]) -> None:
    command = [sys.executable, "-m", "nami_lightning.cli", "bench", "step", *tiny_module, "--steps", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    spread = ["--strategy", "fsdp", "--devices", "2"]
    done = subprocess.run([*command, *spread], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if " s  " in line]
    assert [row[1] for row in rows] == ["4:2:1", "2:4:1", "0:2:4"]
    assert "2 process(es)" in done.stdout


def test_a_text_encoder_that_remembers_is_not_sharded() -> None:
    encoder = PromptEncoder(None, None, cache=True)
    with pytest.raises(ValueError, match=r"shard_text_encoder needs model.text_encoder.cache: false"):
        shard_text_encoder(encoder, FSDP2Strategy(shard_text_encoder=True))


def test_kept_gradients_of_another_number_type_are_refused() -> None:
    with pytest.raises(ValueError, match="reduce_gradients: step needs one number type"):
        FSDP2Strategy(param_dtype="bfloat16", reduce_gradients="step")


def test_two_processes_then_one_then_two_train_as_one_uninterrupted(alone: Path, tiny_module: list[str]) -> None:
    """The first stop is before stage 3 was ever touched."""
    settings = [*tiny_module, "--name", "elastic", "--trainer.strategy", "fsdp2", "--trainer.devices"]
    run([*settings, "2", *phases(PHASES[0].replace("steps: 6", "steps: 4"))])
    run([*settings, "1", *phases(PHASES[0], PHASES[1].replace("steps: 6", "steps: 3"))])
    run([*settings, "2", *phases(*PHASES)])
    assert_same(alone, alone.parent / "elastic")


def test_shards_are_not_resumed_by_another_strategy(tiny_module: list[str], alone: Path) -> None:
    command = [sys.executable, "-m", "nami_lightning.cli", "run", *tiny_module, "--name", "elastic"]
    more = phases(*PHASES[:2], PHASES[2].replace("steps: 8", "steps: 9"))
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "was written by FSDP2Strategy: resume with it as trainer.strategy" in done.stderr
