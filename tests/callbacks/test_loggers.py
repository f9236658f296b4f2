"""Grids, tables and recipes reach the real loggers, offline; read back from the files that each of them wrote."""

import io
import json
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image

from nami_lightning.callbacks import image_samples
from nami_lightning.cli.main import main
from nami_lightning.runs.loggers import MOST_FAILURES, GuardedLogger, log_image, log_table, make_logger
from nami_lightning.runs.recipe import Recipe
from nami_lightning.runs.run_dir import Run
from nami_lightning.runs.tensorboard import event_folders

PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml"}
KEY = "0123456789abcdef0123456789abcdef"
HEADER, ROWS = ["run", "value"], [["a|b", "1.5"], ["c", "2.5"]]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for what the loggers write; their services are not asked, and are left as after a process's end."""
    settings = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_GIT": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "COMET_START_ONLINE": "0",
        "COMET_LOGGING_CONSOLE": "CRITICAL",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    end_services()


def end_services() -> None:
    """End what goes on until a process ends."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    if "comet_ml" in sys.modules and (experiment := sys.modules["comet_ml"].get_running_experiment()):
        experiment.end()


def described(name: str, folder: Path) -> dict[str, Any]:
    """Return a logger as a recipe names it; skip the test if its package isn't there."""
    package = PACKAGES.get(name, "lightning")
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'nami_lightning[loggers]'")
    comet = {"offline_directory": str(folder / "comet"), "log_code": False, "log_git_metadata": False}
    settings: dict[str, dict[str, Any]] = {
        "WandbLogger": {"init_args": {"project": "nami", "save_dir": str(folder)}},
        "MLFlowLogger": {"init_args": {"tracking_uri": f"file:{folder / 'mlruns'}"}},
        "CometLogger": {"init_args": {"experiment_key": KEY}, "dict_kwargs": comet | {"log_env_details": False}},
    }
    others = {"init_args": {"save_dir": str(folder)}}
    return {"class_path": f"lightning.pytorch.loggers.{name}"} | settings.get(name, others)


def pictures(name: str, folder: Path) -> list[Image.Image]:
    """Return the pictures that a logger wrote below ``folder``."""
    if name == "TensorBoardLogger":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found: list[Image.Image] = []
        for part in event_folders(folder):
            events = EventAccumulator(str(part), size_guidance={"images": 0})
            events.Reload()
            found += [Image.open(io.BytesIO(one.encoded_image_string)) for one in events.Images("samples")]
        return found
    if name == "CometLogger":
        archives = [zipfile.ZipFile(path) for path in sorted((folder / "comet").glob("*.zip"))]
        parts = [archive.read(part) for archive in archives for part in archive.namelist()]
        return [Image.open(io.BytesIO(part)) for part in parts if part.startswith(b"\x89PNG")]
    patterns = {"WandbLogger": "wandb/offline-run-*/files/media/images/*.png", "MLFlowLogger": "mlruns/**/images/*.png"}
    return [Image.open(path) for path in sorted(folder.glob(patterns[name]))]


@pytest.mark.parametrize("name", ["TensorBoardLogger", *PACKAGES])
def test_a_picture_and_a_table_are_read_back_as_they_were(name: str, offline: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    logger = make_logger(json.dumps(described(name, offline)))
    log_image(logger, "samples", picture, 7)
    log_table(logger, "comparison/Values", HEADER, ROWS)
    logger.finalize("success")
    end_services()
    (found,) = pictures(name, offline)
    assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(picture))
    if name == "WandbLogger":
        (table,) = offline.glob("wandb/offline-run-*/files/media/table/comparison/*.json")
        assert json.loads(table.read_text()) | {"columns": HEADER, "data": ROWS} == json.loads(table.read_text())
    elif name == "MLFlowLogger":
        (text,) = offline.glob("mlruns/**/Values.md")
        assert text.read_text().splitlines() == ["| run | value |", "| --- | --- |", "| a/b | 1.5 |", "| c | 2.5 |"]


def test_a_logger_without_pictures_is_left_alone_and_one_of_ones_own_gets_them(tmp_path: Path) -> None:
    class Own(CSVLogger):
        got: list[Any] = []

        def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
            self.got.append((key, images, step))

    picture = Image.new("RGB", (2, 2))
    for logger in (CSVLogger(str(tmp_path)), Own(str(tmp_path))):
        log_image(logger, "samples", picture, 3)
        log_table(logger, "values", HEADER, ROWS)
    assert Own.got == [("samples", [picture], 3)]
    assert not list(tmp_path.iterdir())


# --- in a run ----------------------------------------------------------------------------------------


def arguments(tiny: list[str], loggers: list[dict[str, Any]], steps: int) -> list[str]:
    """A run of a few steps with pictures after every second one."""
    callbacks = Recipe(tiny[0]).values()["trainer"]["callbacks"]
    few = [one for one in callbacks if one["class_path"].endswith(("BridgePretraining", "RunCheckpoint"))]
    samples = next(one for one in callbacks if one["class_path"].endswith("ImageSamples"))
    samples["init_args"]["every_n_steps"] = 2
    phases = f"[{{steps: {steps}, ratio: [1, 1, 1], learning_rate: 1.0e-3}}]"
    quiet = [
        "--trainer.limit_val_batches",
        "0",
        "--data.init_args.num_workers",
        "0",
        "--trainer.log_every_n_steps",
        "1",
    ]
    lists = ["--trainer.callbacks", json.dumps([*few, samples]), "--trainer.logger+", json.dumps(loggers)]
    return ["run", *tiny, "--curriculum.phases", phases, *quiet, *lists]


def test_a_run_and_its_resume_give_all_loggers_the_same_grids_and_go_on_in_the_same_runs(
    tiny: list[str], offline: Path
) -> None:
    loggers = [described(name, offline) for name in (*PACKAGES, "CSVLogger")]
    for steps in (2, 4):
        assert main(arguments(tiny, loggers, steps)) == 0
        end_services()
    folder = offline / "runs" / "tiny"
    grids = [np.asarray(Image.open(path)) for path in sorted((folder / "samples").glob("*.png"))]
    assert len(grids) == 2
    for name in PACKAGES:
        found = [np.asarray(one.convert("RGB")) for one in pictures(name, offline)]
        assert len(found) == 2, name
        assert all(any(np.array_equal(one, grid) for one in found) for grid in grids), name
    assert len(pictures("TensorBoardLogger", folder)) == 2

    ids = json.loads((folder / "logger_runs.json").read_text())
    assert [path.name.rpartition("-")[2] for path in offline.glob("wandb/offline-run-*")] == [ids["WandbLogger"]] * 2
    (run,) = (path.parent for path in offline.glob("mlruns/*/*/meta.yaml"))
    assert run.name == ids["MLFlowLogger"]
    assert (run / "params" / "curriculum" / "unit").read_text() == "2"
    losses = [line.split() for line in (run / "metrics" / "train" / "loss").read_text().splitlines()]
    assert [int(step) for _, _, step in losses] == [0, 1, 2, 3]


def test_a_service_that_is_not_there_when_a_run_starts_is_one_clear_message(
    tiny: list[str], offline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    logger = described("MLFlowLogger", offline) | {"init_args": {"tracking_uri": "http://127.0.0.1:9"}}
    assert main(arguments(tiny, [logger], 2)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: trainer.logger: MLFlowLogger can't start: API request to http://127.0.0.1:9/")


def test_a_logger_that_fails_loses_neither_the_training_nor_the_others_values(
    tiny: list[str], offline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the server")

    give = image_samples.log_image

    def give_to_others(logger: Logger, *rest: Any) -> None:
        refuse() if isinstance(logger, CSVLogger) else give(logger, *rest)

    monkeypatch.setattr(CSVLogger, "log_metrics", refuse)
    monkeypatch.setattr(image_samples, "log_image", give_to_others)
    with pytest.warns(UserWarning, match="CSVLogger failed: no route to the server. The training goes on"):
        assert main(arguments(tiny, [described("CSVLogger", offline)], 4)) == 2
    folder = offline / "runs" / "tiny"
    assert Run(folder).checkpoint().stem == "step=0000004"
    assert len(pictures("TensorBoardLogger", folder)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the training is saved, but ImageSamples failed at step 2: no route to the server")


def test_a_logger_that_keeps_failing_is_left_alone_and_told_at_the_end(tmp_path: Path) -> None:
    calls = []

    class Broken(TensorBoardLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            calls.append(step)
            if step != 1:
                raise OSError("full")

    logger = Broken(str(tmp_path))
    guarded = GuardedLogger(logger)
    for step in range(2 + MOST_FAILURES - 1):
        logger.log_metrics({}, step)
        logger.save()
    with pytest.warns(UserWarning, match="Broken gets nothing more"):
        logger.log_metrics({}, 1 + MOST_FAILURES)
    for step in range(2 + MOST_FAILURES, 9):
        logger.log_metrics({}, step)
    assert calls == [0, 1, *range(2, 2 + MOST_FAILURES)]
    assert guarded.describe() == "Broken failed 4 time(s): full"


def test_the_comparison_goes_to_a_logger(tiny: list[str], offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tiny, [], 2)) == 0
    command = ["compare", str(offline / "runs" / "tiny"), "--output", str(offline / "out"), "--logger"]
    assert main([*command, "WandLogger"]) == 2
    assert "--logger: " in capsys.readouterr().err
    assert main([*command, json.dumps(described("WandbLogger", offline))]) == 0
    end_services()
    tables = [json.loads(path.read_text()) for path in offline.glob("wandb/offline-run-*/files/media/table/**/*.json")]
    assert any(row[0] == "tiny" for table in tables for row in table["data"])
