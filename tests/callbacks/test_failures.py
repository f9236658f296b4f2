"""Pictures and measurements that fail end no training; what failed is told at the end, and pauses are no slow steps."""

import io
import json
import os
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.processes import end, start
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from nami_lightning.callbacks import ProgressBar, generation, image_metrics, image_samples
from nami_lightning.callbacks.generation import Attempts
from nami_lightning.cli.main import main
from nami_lightning.runs.recipe import Recipe
from nami_lightning.runs.run_dir import Run

PHASES = "[{steps: 4, ratio: [1, 1, 1], learning_rate: 1.0e-3}]"
METRICS = (
    "{class_path: nami_lightning.callbacks.Metrics, init_args: {samples: 4, training_images: 4, every_n_steps: 2, "
    "sampler: {num_inference_steps: 3}}}"
)


@pytest.fixture
def short(tiny: list[str]) -> list[str]:
    """A run of four steps with pictures after every second one."""
    recipe = Recipe(tiny[0]).values()["trainer"]["callbacks"]
    pictures = next(one for one in recipe if one["class_path"].endswith("ImageSamples"))
    pictures["init_args"]["every_n_steps"] = 2
    few = [one for one in recipe if one["class_path"].endswith(("BridgePretraining", "RunCheckpoint"))]
    quiet = ["--trainer.limit_val_batches", "0", "--data.init_args.num_workers", "0"]
    return ["run", *tiny, "--curriculum.phases", PHASES, *quiet, "--trainer.callbacks", json.dumps([*few, pictures])]


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no kernel for this device")


def test_what_fails_at_every_attempt_is_a_warning_each_time_and_one_error_at_the_end(
    short: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    for module in (image_samples, image_metrics):
        monkeypatch.setattr(module, "generate", fail)
    assert main([*short, "--trainer.callbacks+", METRICS]) == 2
    assert Run(tmp_path / "runs" / "tiny").checkpoint().stem == "step=0000004"
    said = "\n".join(str(one.message) for one in recwarn)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the training is saved, but ")
    for name in ("ImageSamples", "Metrics"):
        for step in (2, 4):
            assert f"{name} failed at step {step}: no kernel for this device. The training goes on." in said
        both = "step 2: no kernel for this device; step 4: no kernel for this device"
        assert f"{name} failed at {both}, at every attempt (2)" in error


def test_a_failure_in_writing_or_of_one_attempt_is_told_too(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = image_samples.save_image

    def write_later_ones(image: Any, path: Path) -> None:
        if "0000002" in path.name:
            raise OSError(28, "No space left on device")
        write(image, path)

    monkeypatch.setattr(image_samples, "save_image", write_later_ones)
    assert main(short) == 2
    assert [path.name for path in (tmp_path / "runs" / "tiny" / "samples").iterdir()] == ["step=0000004.png"]
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error == "error: the training is saved, but ImageSamples failed at step 2: [Errno 28] No space left on device"
    )


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, KeyboardInterrupt])
def test_the_lack_of_memory_and_a_stop_end_the_training(kind: type[BaseException]) -> None:
    module: Any = SimpleNamespace(step=3, seconds_paused=0.0)
    trainer: Any = SimpleNamespace(world_size=1)
    with pytest.raises(kind), Attempts("Pictures").attempt(trainer, module):
        raise kind


# --- several ranks -----------------------------------------------------------------------------------


def attempt_on_rank(folder: Path, failing: list[int]) -> None:
    """Be one of two ranks; write to ``rank_N`` what came of an attempt that fails on some of them."""
    rank = int(os.environ["LOCAL_RANK"])
    generation.PATIENCE = timedelta(seconds=0.5)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    trainer: Any = SimpleNamespace(world_size=2, global_rank=rank)
    module: Any = SimpleNamespace(step=3, seconds_paused=0.0)
    attempts, came = Attempts("Pictures"), "went on"
    try:
        with attempts.attempt(trainer, module, together=True):
            if rank in failing:
                raise ValueError("a wrong prompt")
    except ValueError:
        came = "ended"
    (folder / f"rank_{rank}").write_text(f"{came}: {attempts.describe()}")
    dist.barrier()


@pytest.mark.parametrize(
    ("failing", "expected"),
    [([0, 1], ["went on: Pictures failed at step 3: a wrong prompt"] * 2), ([1], ["went on: ", "ended: "])],
)
def test_ranks_that_need_each_other_go_on_only_if_all_failed(
    tmp_path: Path, failing: list[int], expected: list[str]
) -> None:
    output = tmp_path / "output"
    assert end(start(attempt_on_rank, (tmp_path, failing), 2, output)) == 0, output.read_text()
    assert [(tmp_path / f"rank_{rank}").read_text() for rank in range(2)] == expected


# --- pauses ------------------------------------------------------------------------------------------


def test_the_bars_time_leaves_out_validation_and_pictures(tiny: list[str]) -> None:
    model = Recipe(tiny[0]).make_model()
    model._trainer = SimpleNamespace(strategy=None)  # type: ignore[assignment]
    model.configure_model()
    model.on_validation_start()
    time.sleep(0.05)
    model.on_validation_end()
    assert 0.05 <= model.seconds_paused < 1
    with Attempts("Pictures").attempt(model.trainer, model):
        time.sleep(0.05)
    assert 0.1 <= model.seconds_paused < 2

    bar: Any = ProgressBar()
    bar.train_progress_bar = Tqdm(total=4, file=io.StringIO())
    bar.on_train_batch_start(model.trainer, model, None, 0)
    began = bar.train_progress_bar.start_t
    model.seconds_paused += 100
    bar.on_train_batch_start(model.trainer, model, None, 1)
    bar.on_train_batch_start(model.trainer, model, None, 2)
    assert bar.train_progress_bar.start_t == pytest.approx(began + 100)
