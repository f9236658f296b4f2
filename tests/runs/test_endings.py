"""Every ending of a run leaves a checkpoint of its last step, and what a resume may change is checked."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from helpers.processes import run
from PIL import Image

from nami_lightning.callbacks import RunCheckpoint
from nami_lightning.cli.main import main
from nami_lightning.datamodules.sources import ImageFolder
from nami_lightning.datamodules.storage.dataset import DESCRIPTION, PreparedDataset
from nami_lightning.models.text_encoder import resolve_name
from nami_lightning.runs.load import load_module
from nami_lightning.runs.run_dir import Run, read_metadata
from nami_lightning.training.ema import adapt_ema

FEW = "[{steps: 4, ratio: [2, 1, 1], learning_rate: 2.0e-3, warmup_steps: 2}]"
BRIDGES = {"class_path": "nami_lightning.callbacks.BridgePretraining", "init_args": {"samples": 16}}
QUIET = ["--curriculum.phases", FEW, "--data.init_args.num_workers", "0", "--trainer.limit_val_batches", "0"]


class StopAfter(L.Callback):
    """Asks the Trainer to stop after a step, as a time limit or early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        trainer.should_stop = pl_module.step >= self.step


class FailAfter(StopAfter):
    """Raises an error after a step."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.step >= self.step:
            raise ValueError("out of luck")


def callbacks(*more: dict[str, Any] | str) -> list[str]:
    listed = [BRIDGES, *({"class_path": name} if isinstance(name, str) else name for name in more)]
    return ["--trainer.callbacks", yaml.safe_dump(listed, default_flow_style=True, width=10_000)]


def steps(run: Path) -> list[str]:
    return [path.stem for path in Run(run).checkpoints]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_module(Run(run), ema=False).state_dict())


@pytest.fixture(scope="module")
def whole(tiny_module: list[str]) -> Path:
    """A run of four steps that nothing disturbed."""
    assert main(["run", *tiny_module, *QUIET, *callbacks("nami_lightning.callbacks.RunCheckpoint"), "--name", "w"]) == 0
    return Path(tiny_module[2]) / "w"


@pytest.mark.parametrize("ending", ["StopAfter", "FailAfter"])
def test_a_stop_or_an_error_saves_its_last_step_and_the_run_goes_on_to_the_same_bits(
    tiny: list[str], whole: Path, ending: str
) -> None:
    run = Path(tiny[2]) / "ended"
    stop = {"class_path": f"{__name__}.{ending}", "init_args": {"step": 2}}
    rare = {"class_path": "nami_lightning.callbacks.RunCheckpoint", "init_args": {"every_n_steps": 1000}}
    command = ["run", *tiny, *QUIET, *callbacks(stop, rare), "--name", "ended"]
    if ending == "FailAfter":
        with pytest.raises(ValueError, match="out of luck"):
            main(command)
    else:
        assert main(command) == 0
    assert steps(run) == ["step=0000002"]
    assert main(["run", *tiny, *QUIET, *callbacks(rare), "--name", "ended"]) == 0
    assert steps(run)[-1] == "step=0000004"
    found = weights(run)
    for name, value in weights(whole).items():
        assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), name


def test_without_optional_callbacks_the_weights_are_the_same_and_a_checkpoint_is_left(
    tiny: list[str], whole: Path
) -> None:
    assert main(["run", *tiny, *QUIET, *callbacks(), "--name", "bare"]) == 0
    expected, found = weights(whole), weights(Path(tiny[2]) / "bare")
    assert all(torch.equal(found[name].nan_to_num(), value.nan_to_num()) for name, value in expected.items())


def test_a_budget_of_time_is_a_starts(tiny: list[str]) -> None:
    timed = [*tiny, *QUIET, *callbacks(), "--name", "timed", "--trainer.max_time", "{microseconds: 1}"]
    for step in (1, 2, 3):
        assert main(["run", *timed]) == 0
        assert steps(Path(tiny[2]) / "timed")[-1] == f"step={step:07d}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "9"], "checkpoint's seed is 3"),
        (["--model.autoencoder.scaling_factor", "3"], "model.autoencoder is pixels (scaling_factor 1.0)"),
        (["--model.autoencoder.shift_factor", "1"], "(shift_factor 0.0)"),
        (["--model.text_encoder.max_length", "6"], "(max_length 8)"),
        (["--model.text_encoder.pooled", "some/clip"], "model.text_encoder.pooled is none"),
    ],
)
def test_a_resume_with_what_changes_the_weights_meaning_is_refused(
    tiny: list[str], whole: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, Path(tiny[2]) / "w")
    assert main(["run", *tiny, *QUIET, *callbacks(), "--name", "w", *change]) == 2
    assert message in capsys.readouterr().err


def test_another_data_set_is_refused_or_accepted_by_a_flag(
    tiny: list[str], whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, Path(tiny[2]) / "w")
    command = ["run", *tiny, *QUIET, *callbacks(), "--name", "w"]
    command += ["--curriculum.phases", FEW.replace("steps: 4", "steps: 5")]
    monkeypatch.setattr(PreparedDataset, "identity", "another")
    assert main(command) == 2
    assert "the data set is not the one that this run was trained on so far (another, not " in capsys.readouterr().err
    assert main([*command, "--accept_changed_data"]) == 0


def test_a_changed_source_replaces_no_data_set_that_a_run_was_trained_on(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, made = tmp_path / "photos", tmp_path / "made"
    photos.mkdir()
    for number in range(24):
        Image.new("RGB", (40, 40), (10 * number, 0, 99)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"picture {number}")
    source = [
        "--data.init_args.source",
        f"{{class_path: {ImageFolder.__module__}.ImageFolder, init_args: {{path: {photos}}}}}",
    ]
    command = ["run", *tiny, *QUIET, *callbacks(), *source, "--data.init_args.folder", str(made), "--name", "photos"]
    assert main(command) == 0
    (description,) = made.glob(f"*/{DESCRIPTION}")
    before = description.read_bytes()

    (photos / "3.txt").write_text("another caption, of another length")
    longer = ["--curriculum.phases", FEW.replace("steps: 4", "steps: 5")]
    assert main([*command, *longer]) == 0
    assert "1 changed, 0 removed), but a run that resumes goes on" in capsys.readouterr().out
    assert description.read_bytes() == before

    longer = ["--curriculum.phases", FEW.replace("steps: 4", "steps: 6")]
    assert main([*command, *longer, "--accept_changed_data"]) == 0
    changed = description.read_bytes()
    assert changed != before
    description.write_bytes(before)  # the data set of before, as far as a run can tell
    longer = ["--curriculum.phases", FEW.replace("steps: 4", "steps: 7")]
    assert main([*command, *longer]) == 2
    assert "the data set is not the one that this run was trained on so far" in capsys.readouterr().err
    assert description.read_bytes() == before
    assert [path.stem for path in Run(tmp_path / "runs" / "photos").checkpoints][-1] == "step=0000006"


def test_a_text_encoder_whose_folder_moved_is_the_same(tiny: list[str], whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, Path(tiny[2]) / "w")
    moved = tmp_path / "encoder"
    shutil.copytree(resolve_name("all-MiniLM-L6-v2"), moved)
    longer = FEW.replace("steps: 4", "steps: 5")
    more = ["--model.text_encoder.sequence", str(moved), "--curriculum.phases", longer]
    assert main(["run", *tiny, *QUIET, *callbacks(), "--name", "w", *more]) == 0
    assert steps(Path(tiny[2]) / "w")[-1] == "step=0000005"


def test_an_ema_may_be_added_and_taken_away(tiny: list[str], whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    run = Path(tiny[2]) / "w"
    shutil.copytree(whole, run)
    for total, more, told in ((5, ["nami_lightning.callbacks.EMA"], "starts from the weights"), (6, [], "is dropped")):
        longer = ["--curriculum.phases", FEW.replace("steps: 4", f"steps: {total}")]
        assert main(["run", *tiny, *QUIET, *callbacks(*more), "--name", "w", *longer]) == 0
        assert told in caplog.text
        caplog.clear()
        assert read_metadata(Run(run).checkpoint())["nami"]["ema"] is bool(more)
    state = {"transformer.a": torch.ones(2), "bridge.b": torch.zeros(1)}
    adapt_ema(state, wanted=True)
    assert torch.equal(state["ema.a"], state["transformer.a"])
    adapt_ema(state, wanted=False)
    assert set(state) == {"transformer.a", "bridge.b"}


def test_checkpoints_do_not_pass_through_the_folder_for_temporary_files(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.fabric.utilities.cloud_io._atomic_save", None)  # it would be called, and fail
    assert main(["run", *tiny, *QUIET, *callbacks("nami_lightning.callbacks.RunCheckpoint"), "--name", "direct"]) == 0
    assert steps(Path(tiny[2]) / "direct") == ["step=0000004"]
    assert isinstance(RunCheckpoint(), L.Callback)


def test_an_ema_may_be_added_and_taken_away_between_ranks_with_shards(tiny: list[str]) -> None:
    """The added average is computed again from the checkpoints' weights: it starts at those of step 2."""
    run_folder = Run(Path(tiny[2]) / "shards")
    saved = {"class_path": "nami_lightning.callbacks.RunCheckpoint", "init_args": {"every_n_steps": 1, "keep": 9}}
    average = {"class_path": "nami_lightning.callbacks.EMA", "init_args": {"decay": 0.25}}
    bar = ["--trainer.enable_progress_bar", "true", "--trainer.limit_val_batches", "1.0"]
    bar += ["--trainer.val_check_interval", "1"]
    command = [*tiny, "--name", "shards", "--trainer.strategy", "fsdp2", "--trainer.devices", "2", *bar]
    for total, more, told in ((2, [], "New run"), (4, [average], "starts from the weights"), (5, [], "is dropped")):
        printed = run([*command, *callbacks(saved, *more), *phases_of(total)])
        assert told in printed
        assert "sync_dist" not in printed + (run_folder.folder / "logs" / "rank_1.log").read_text()
        assert read_metadata(run_folder.checkpoint() / "meta.pt")["nami"]["ema"] is bool(more)
    second, third, fourth = (dict(load_module(run_folder, n, ema=False).transformer.state_dict()) for n in (2, 3, 4))
    found = dict(load_module(run_folder, 4).transformer.state_dict())
    assert any(not torch.equal(second[name], value) for name, value in fourth.items())
    for name, value in found.items():
        expected = 0.25 * (0.25 * second[name] + 0.75 * third[name]) + 0.75 * fourth[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def phases_of(total: int) -> list[str]:
    return ["--curriculum.phases", FEW.replace("steps: 4", f"steps: {total}")]
