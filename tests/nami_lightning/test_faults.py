"""What a run does when something goes wrong: bad numbers, signals, ranks that hang or die."""

import re
import signal
from pathlib import Path

import pytest
import torch
from faults import numbers, run, with_callback

from nami_lightning.preemption import REQUEUE
from nami_lightning.runs import Run

SHORT = ["--curriculum.phases", "[{steps: 12, ratio: [2, 2, 2], learning_rate: 0.002, warmup_steps: 2}]"]
TWO_RANKS = ["--trainer.devices", "2", "--trainer.strategy"]
DDP, FSDP2 = [*TWO_RANKS, "ddp_find_unused_parameters_true"], [*TWO_RANKS, "fsdp2"]


def logged(folder: Path, name: str) -> dict[int, float]:
    """Step to value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@pytest.mark.parametrize(("strategy", "rank"), [([], 0), (DDP, 1), (FSDP2, 1)], ids=["alone", "ddp", "fsdp2"])
def test_all_ranks_skip_a_step_whose_loss_is_not_finite_on_one(tiny: list[str], strategy: list[str], rank: int) -> None:
    """That nothing moved in it, and that something did in the others, is checked by the poison on each rank."""
    said = run([*tiny, *SHORT, *strategy, *with_callback("Poison", steps="[0,4,5]", rank=rank)])
    folder = Path(tiny[2]) / "tiny"
    assert logged(folder, "train/skipped")[11] == 3
    assert sorted(logged(folder, "train/loss")) == [1, 2, 3, 6, 7, 8, 9, 10, 11]
    for step, in_row, total in ((0, 1, 1), (4, 1, 2), (5, 2, 3)):
        named = re.search(rf"Step {step} is skipped: the loss of rank {rank}, (.*) is not finite \((.*)\)", said)
        assert named, said
        assert named[2] == f"{in_row} in a row, {total} in all"
        assert named[1].count("(stage ") == (6 if strategy else 8)
        assert ("and 4 more" in named[1]) == (not strategy)
    path, about = Run(folder).load_newest() or pytest.fail("no checkpoint")
    assert path.stem == "step=0000012"
    assert about["nami"]["skipped"] == {"total": 3, "in_row": 0}


def test_it_stops_after_so_many_in_a_row_with_a_checkpoint_from_before(tiny: list[str]) -> None:
    keys = ["--model.max_skipped_steps", "4", *with_callback("Poison", steps="[7,8,9,10]")]
    said = run([*tiny, *SHORT, *keys], status=2)
    assert "error: steps 7 to 10 had a loss or gradient that is not finite" in said
    assert [path.stem for path in Run(Path(tiny[2]) / "tiny").checkpoints] == ["step=0000007"]


def assert_same_bits(folder: Path, other: Path) -> None:
    """The newest checkpoints of two runs hold the same numbers: weights, EMA, moments, counts."""
    (one, about), (two, about_two) = (Run(run).load_newest() or pytest.fail("no checkpoint") for run in (folder, other))
    assert one.name == two.name
    assert about["nami"] == about_two["nami"]
    states = [numbers(path) for path in (one, two)]
    assert states[0].keys() == states[1].keys()
    for kind in ("state_dict.ema.", "state_dict.transformer.", "exp_avg_sq"):
        assert any(kind in name for name in states[0]), kind
    for name, value in states[0].items():
        same = torch.equal(value.nan_to_num(), states[1][name].nan_to_num()) if torch.is_tensor(value) else None
        assert same is not False, name


@pytest.mark.parametrize(
    ("strategy", "rank", "name"), [([], 0, "SIGTERM"), (FSDP2, 1, "SIGUSR1")], ids=["alone", "fsdp2"]
)
def test_told_to_stop_it_saves_and_the_same_command_goes_on_to_the_same_bits(
    tiny: list[str], strategy: list[str], rank: int, name: str
) -> None:
    command = [*tiny, *SHORT, *strategy]
    run([*command, "--name", "whole"])
    said = run([*command, "--name", "told", *with_callback("SignalItself", step=4, rank=rank, name=name)], REQUEUE)
    assert "Told to stop: saved step 5 of 12" in said
    runs = Path(tiny[2])
    assert [path.stem for path in Run(runs / "told").checkpoints] == ["step=0000005"]
    assert "from step 5 of 12" in run([*command, "--name", "told"])
    assert_same_bits(runs / "whole", runs / "told")


def test_the_second_signal_ends_it_at_once(tiny: list[str]) -> None:
    run([*tiny, *SHORT, *with_callback("SignalItself", step=2, again_after=1.2)], 128 + signal.SIGTERM)
    assert not Run(Path(tiny[2]) / "tiny").checkpoints
