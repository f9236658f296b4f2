"""What a run does when something goes wrong: bad numbers, signals, ranks that hang or die."""

import re
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from helpers.checkpoint_contents import numbers, same_numbers
from helpers.harmful_callbacks import with_callback
from helpers.processes import run, run_as_command
from kill_ranks import check, forked_torchrun

from nami_lightning.cli.main import main
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.runs.preemption import INTERRUPTED, REQUEUE
from nami_lightning.runs.run_dir import Run, step_of

SHORT = ["--curriculum.phases", "[{steps: 12, ratio: [2, 2, 2], learning_rate: 0.002, warmup_steps: 2}]"]
TWO_RANKS = ["--trainer.devices", "2", "--trainer.strategy"]
ANY_FAILURE = None
STRATEGIES: dict[str, list[str]] = {
    "alone": [],
    "ddp": [*TWO_RANKS, "ddp_find_unused_parameters_true"],
    "fsdp2": [*TWO_RANKS, "fsdp2"],
}


def logged(folder: Path, name: str) -> dict[int, float]:
    """Step to value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_all_ranks_skip_a_step_whose_loss_is_not_finite_on_one(tiny: list[str], strategy: str) -> None:
    """That nothing moved in it, and that something did in the others, is checked by the poison on each rank."""
    alone = strategy == "alone"
    rank = 0 if alone else 1
    said = run([*tiny, *SHORT, *STRATEGIES[strategy], *with_callback("Poison", steps="[0,4,5]", rank=rank)])
    folder = Path(tiny[2]) / "tiny"
    assert logged(folder, "train/skipped")[11] == 3
    assert sorted(logged(folder, "train/loss")) == [1, 2, 3, 6, 7, 8, 9, 10, 11]
    for step, in_row, total in ((0, 1, 1), (4, 1, 2), (5, 2, 3)):
        named = re.search(rf"Step {step} is skipped: the loss of rank {rank}, (.*) is not finite \((.*)\)", said)
        assert named, said
        assert named[2] == f"{in_row} in a row, {total} in all"
        assert named[1].count("(stage ") == (8 if alone else 6)
        assert ("and 4 more" in named[1]) == alone
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
    for kind in ("state_dict.ema.", "state_dict.transformer.", "exp_avg_sq"):
        assert any(kind in name for name in states[0]), kind
    assert not same_numbers(*states)


@pytest.fixture(scope="module")
def whole(tiny_module: list[str]) -> Callable[[str], Path]:
    """The uninterrupted run of each strategy, made once."""

    @cache
    def make(strategy: str) -> Path:
        name = f"whole_{strategy}"
        run([*tiny_module, *SHORT, *STRATEGIES[strategy], "--trainer.val_check_interval", "12", "--name", name])
        return Path(tiny_module[2]) / name

    return make


@pytest.mark.parametrize(
    ("strategy", "signal_of", "status"),
    [
        ("alone", {"name": "SIGTERM", "group": "true"}, REQUEUE),  # its reading process gets it too
        ("alone", {"name": "SIGINT", "group": "true"}, INTERRUPTED),  # as Ctrl-C in a terminal
        ("fsdp2", {"name": "SIGUSR1", "rank": "1"}, REQUEUE),
    ],
)
def test_told_to_stop_it_saves_and_the_same_command_goes_on_to_the_same_bits(
    tiny: list[str], whole: Callable[[str], Path], strategy: str, signal_of: dict[str, str], status: int
) -> None:
    command = [*tiny, *SHORT, *STRATEGIES[strategy], "--data.init_args.num_workers", "1"]
    start = run if strategy == "alone" else run_as_command  # Lightning's own launcher hears of each rank's end
    said = start([*command, *with_callback("Signal", step=4, **signal_of)], status)
    assert "Told to stop: saved step 5 of 12" in said
    assert ("Stopping after the running step" in said) == (status == INTERRUPTED)
    folder = Path(tiny[2]) / "tiny"
    assert [path.stem for path in Run(folder).checkpoints] == ["step=0000005"]
    assert "from step 5 of 12" in run(command)
    assert_same_bits(whole(strategy), folder)
    if strategy == "fsdp2":
        assert "Told to stop" not in (folder / "logs" / "rank_1.log").read_text()


def test_the_second_signal_ends_it_at_once(tiny: list[str]) -> None:
    run([*tiny, *SHORT, *with_callback("Signal", step=2, again_after=1.2)], 128 + signal.SIGTERM)
    assert not Run(Path(tiny[2]) / "tiny").checkpoints


@pytest.mark.parametrize("strategy", ["alone", "fsdp2"])
def test_checkpoints_written_by_a_thread_and_an_average_on_the_host_change_nothing(
    tiny: list[str], tmp_path: Path, whole: Callable[[str], Path], strategy: str
) -> None:
    """Every second step is due, every second of these stays for good, and the end waits for the last."""
    recipe = yaml.safe_load(Path(tiny[0]).read_text())
    settings = {entry["class_path"].split(".")[-1]: entry for entry in recipe["trainer"]["callbacks"]}
    settings["RunCheckpoint"]["init_args"] = {"every_n_steps": 2, "keep": 2, "keep_every": 2, "asynchronous": True}
    settings["EMA"]["init_args"]["device"] = "host"
    settings["ImageSamples"]["init_args"]["every_n_steps"] = 5
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run([str(path), *tiny[1:], *SHORT, *STRATEGIES[strategy], "--trainer.val_check_interval", "6"])
    folder = Path(tiny[2]) / "tiny"
    assert [step_of(path) for path in Run(folder).checkpoints] == [4, 8, 10, 12]
    assert not list(folder.rglob("*.partial"))
    assert_same_bits(whole(strategy), folder)
    ours, theirs = ((run / "samples" / "step=0000012.png").read_bytes() for run in (folder, whole(strategy)))
    assert ours == theirs
    validated, expected = (logged(run, "val/loss_stage2") for run in (folder, whole(strategy)))
    assert expected.items() <= validated.items()
    assert len(validated) == 2


@pytest.mark.parametrize("strategy", ["alone", "fsdp2"])
def test_an_exported_pipeline_has_the_runs_weights_and_draws(
    whole: Callable[[str], Path], tmp_path: Path, strategy: str
) -> None:
    folder = whole(strategy)
    for options, network in (([], "ema"), (["--step", "7", "--no-ema"], "transformer")):
        out = tmp_path / network
        assert main(["export", str(folder), "--output", str(out), *options]) == 0
        step = 7 if options else 12
        saved = numbers(folder / "checkpoints" / f"step={step:07d}.ckpt")
        pipeline = NamiPipeline.from_pretrained(out)
        for name, weight in pipeline.transformer.state_dict().items():
            assert torch.equal(weight, saved[f"state_dict.{network}.{name}"]), name
        for name, weight in pipeline.bridge.state_dict().items():
            assert torch.equal(weight, saved[f"state_dict.bridge.{name}"]), name
    picture = pipeline(["red apple"], num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (32, 32)
    assert main(["export", str(folder), "--output", str(out)]) == 2  # it is there
    assert main(["export", str(folder), "--step", "3"]) == 2
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_whose_ranks_are_killed_ends_with_the_same_bits(tmp_path: Path, data_root: Path) -> None:
    """The short form of ``make faults``: once in a step, once while a checkpoint is written."""
    assert check(tmp_path, kills=2, steps=12, seed=1, data=data_root, launch=forked_torchrun) == []


def test_a_rank_that_hangs_is_named_with_step_and_stage(tiny: list[str]) -> None:
    added = [*with_callback("Sleep", step=5, rank=1)]
    added += ["--trainer.callbacks+=nami_lightning.callbacks.Watchdog", "--trainer.callbacks.timeout_minutes=0.1"]
    said = run([*tiny, *SHORT, *STRATEGIES["fsdp2"], *added], ANY_FAILURE)
    assert re.search(r"Hung for more than 6 seconds in step 5, stage 1, micro-batch 1 of \d on rank 0", said), said
    other = (Path(tiny[2]) / "tiny" / "logs" / "rank_1.log").read_text()
    assert "Hung for more than 6 seconds in step 5, waiting for data on rank 1" in other
    assert "harmful_callbacks.py" in other  # the line that it sleeps in
