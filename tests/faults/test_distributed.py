"""Several processes over gloo against one: the same global batches, so the same losses and weights, however spread."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.harmful_callbacks import with_callback
from helpers.processes import lightning, run, run_as_command
from torch import Tensor

from nami_lightning.models.text_encoder import PromptEncoder
from nami_lightning.runs.load import load_module
from nami_lightning.runs.run_dir import Run
from nami_lightning.training.strategies import FSDP2Strategy, shard_text_encoder

PHASES = (
    "{steps: 3, ratio: [2, 4, 0], learning_rate: 0.002, warmup_steps: 2}",  # stage 3 is not touched yet
    "{steps: 3, ratio: [4, 2, 2], learning_rate: 0.001, warmup_steps: 0}",
    "{steps: 4, ratio: [0, 2, 4], learning_rate: 0.001, warmup_steps: 0}",
)
STEPS = 10
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
    "ddp_shared_tokens": [
        *("--trainer.devices", "2", "--trainer.strategy", "ddp_find_unused_parameters_true"),
        *("--curriculum.context_parallel", "[1, 1, 2]"),
    ],
    "fsdp2_shared_tokens": [
        *("--trainer.devices", "4", "--trainer.strategy", "fsdp2", "--model.activation_checkpointing", "2"),
        *("--curriculum.context_parallel", "[1, 2, 2]"),
    ],
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def phases(*steps: str) -> list[str]:
    return ["--curriculum.phases", f"[{', '.join(steps)}]", "--trainer.val_check_interval", str(STEPS)]


@pytest.fixture(scope="module")
def alone(tiny_module: list[str]) -> Path:
    """The run of one process, which the others are compared with."""
    run_as_command([*tiny_module, *phases(*PHASES), "--name", "alone"])
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
    """DDP is started by torchrun, as a user does it."""
    settings = [*tiny_module, *phases(*PHASES), *STRATEGIES[strategy], "--name", strategy]
    settings += with_callback("CountReductions") if strategy == "ddp" else []
    if strategy == "ddp":
        run_as_command(settings, launcher=TORCHRUN)
    else:
        run(settings)
    assert_same(alone, alone.parent / strategy)


def test_ddp_reduces_the_gradient_once_a_step(alone: Path) -> None:
    """All-reduced: the gradient, a number a parameter (was it used?), and what the ranks agree on."""
    counts = [tuple(map(int, line.split())) for line in (alone.parent / "ddp" / "reduced.txt").read_text().splitlines()]
    assert [micro_batches for micro_batches, _ in counts] == [2] * 3 + [3] * 3 + [2] * 4
    trained = list(load_module(Run(alone)).transformer.parameters())
    once = sum(p.nbytes for p in trained) + 4 * len(trained) + 4 * (3 + 3)
    assert {reduced for _, reduced in counts} == {once}


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
    printed = lightning(["bench", "step", *tiny_module, "--steps", "1", "--strategy", "fsdp", "--devices", "2"])
    rows = [line.split() for line in printed.splitlines() if " s  " in line]
    assert [row[1] for row in rows] == ["4:2:1", "2:4:1", "0:2:4"]
    assert "2 process(es)" in printed


def test_a_text_encoder_that_remembers_is_not_sharded() -> None:
    encoder = PromptEncoder(None, None, cache=True)
    with pytest.raises(ValueError, match=r"shard_text_encoder needs model.text_encoder.cache: false"):
        shard_text_encoder(encoder, FSDP2Strategy(shard_text_encoder=True))


def test_kept_gradients_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="reduce_gradients: step needs one dtype"):
        FSDP2Strategy(param_dtype="bfloat16", reduce_gradients="step")


def test_two_processes_then_one_then_two_train_as_one_uninterrupted(alone: Path, tiny_module: list[str]) -> None:
    """The first stop is before stage 3 was ever touched."""
    settings = [*tiny_module, "--name", "elastic", "--trainer.strategy", "fsdp2", "--trainer.devices"]
    run([*settings, "2", *phases(PHASES[0].replace("steps: 3", "steps: 2"))])
    run([*settings, "1", *phases(PHASES[0], PHASES[1].replace("steps: 3", "steps: 1"))])
    run([*settings, "2", *phases(*PHASES)])
    assert_same(alone, alone.parent / "elastic")


def test_shards_are_not_resumed_by_another_strategy(tiny_module: list[str], alone: Path) -> None:
    more = phases(*PHASES[:2], PHASES[2].replace("steps: 4", "steps: 5"))
    printed = run([*tiny_module, "--name", "elastic", *more], status=2)
    assert "was written by FSDP2Strategy: resume with it as trainer.strategy" in printed
