"""What a run prints and logs, in its first session and after a resume from elsewhere, with a recipe of a user's own."""

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from nami_lightning.callbacks.terminal import ProgressBar, Summary, bring_terminal_output
from nami_lightning.cli.main import main, quieten_libraries, say_loading
from nami_lightning.runs.recipe import RECIPES, Recipe
from nami_lightning.runs.tensorboard import event_folders, read_scalars

CALLBACK = "import lightning as L\n\n\nclass Mine{number}(L.Callback):\n    pass\n"
PHASES = "[{{steps: {steps}, ratio: [1, 1, 1], learning_rate: 1e-3}}]"


@contextmanager
def heard() -> Iterator[io.StringIO]:
    """Collect all that is printed, logged and warned of."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    try:
        with redirect_stdout(text), redirect_stderr(text), warnings.catch_warnings(record=True) as warned:
            yield text
            text.write("".join(f"{one.message}\n" for one in warned))
    finally:
        logger.removeHandler(handler)


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Make ``folder`` the current folder for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def sessions(tiny_module: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str, str]:
    """A run's folder, what its first session printed, what ``show`` then did, and what a resume did.

    The recipe is a user's own, with a callback and a logger beside it. The resume is from another folder, and without
    loggers.
    """
    home = tmp_path_factory.mktemp("home")
    (home / "my_session_callback.py").write_text(CALLBACK.format(number=1))
    callback = {"class_path": "my_session_callback.Mine1"}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(home / "csv")}}
    trainer = {"callbacks+": [callback], "logger+": [logger], "log_every_n_steps": 1}
    trainer |= {"enable_progress_bar": True, "enable_model_summary": True}
    recipe = {"base": tiny_module[0], "name": "mine", "trainer": trainer | {"val_check_interval": 2}}
    (home / "mine.yaml").write_text(yaml.safe_dump(recipe))
    with heard() as first:
        phases = ["--curriculum.phases", PHASES.format(steps=2)]
        assert main(["run", str(home / "mine.yaml"), *tiny_module[1:], *phases]) == 0
    run = Path(tiny_module[2]) / "mine"
    with heard() as shown, working_in(tmp_path_factory.mktemp("elsewhere")):
        assert main(["show", str(run)]) == 0
        with heard() as resumed:
            keys = ["--curriculum.phases", PHASES.format(steps=4), "--trainer.logger", "false"]
            assert main(["run", str(run / "recipe.yaml"), *keys]) == 0
    return run, first.getvalue(), shown.getvalue(), resumed.getvalue()


def test_a_logger_of_the_recipe_is_added_to_tensorboard(sessions: tuple[Path, str, str, str]) -> None:
    run, printed, shown, _ = sessions
    assert event_folders(run) == [run]
    assert "train/loss" in (next((run.parents[1]).glob("home*/csv/*/*/metrics.csv"))).read_text()
    assert printed.rstrip().splitlines()[-1].endswith(f"Curves: tensorboard --logdir {run.parent}")
    assert f"tensorboard --logdir {run.parent}" in shown
    assert {step for step, _ in read_scalars(run, lambda tag: tag == "train/loss")["train/loss"]} == {0, 1}


def test_every_logger_gets_the_resolved_recipe(sessions: tuple[Path, str, str, str]) -> None:
    run, *_ = sessions
    for file in (run / "hparams.yaml", next((run.parents[1]).glob("home*/csv/*/*/hparams.yaml"))):
        logged = yaml.safe_load(file.read_text())
        assert logged["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
        assert logged["curriculum"]["phases"][0]["steps"] == 2


def test_a_run_remembers_where_its_own_classes_were(sessions: tuple[Path, str, str, str]) -> None:
    run, *_ = sessions
    (folder,) = yaml.safe_load((run / "recipe.yaml").read_text())["import_from"]
    assert (Path(folder) / "my_session_callback.py").is_file()


def test_the_bar_of_a_resume_has_the_total_and_this_sessions_rate(sessions: tuple[Path, str, str, str]) -> None:
    _, printed, _, resumed = sessions
    assert re.search(r"2/2 \[", printed)
    assert re.search(r" 50%\|.*\| 2/4 \[", resumed)
    bar = re.findall(r"100%\|.*\| 4/4 \[(\d\d):(\d\d)<00:00, +([\d.]+)(it/s|s/it)", resumed)[-1]
    minutes, seconds, rate = int(bar[0]), int(bar[1]), float(bar[2]) if bar[3] == "it/s" else 1 / float(bar[2])
    assert rate * (60 * minutes + seconds) <= 2 < rate * (60 * minutes + seconds + 2)  # two steps, not four
    assert "v_num" not in printed + resumed


def test_a_run_makes_no_noise(sessions: tuple[Path, str, str, str]) -> None:
    _, printed, _, resumed = sessions
    assert "TPU" not in printed + resumed
    assert "FLOPs" not in printed + resumed
    assert "worker" not in printed + resumed
    assert re.search(r"\n[\d,]+ parameters, [\d,]+ of them trained, [\d,.]+ MB\n", printed)
    assert re.search(r"\n\d+ +transformer +NamiTransformer2DModel ", printed)


@pytest.mark.parametrize("name", ["train/loss", "mine/loss"])
def test_an_alarm_about_one_ranks_values_is_not_hidden(name: str) -> None:
    """Our own values don't cause it: they are sums over all ranks, which the runs of two ranks check."""
    alarm = f"It is recommended to use `self.log({name!r}, ..., sync_dist=True)` when logging on epoch level"
    with warnings.catch_warnings(record=True) as warned:
        quieten_libraries()
        warnings.warn(alarm, stacklevel=1)
        warnings.warn("This DataLoader will create 9 worker processes in total. Our suggested max is 2", stacklevel=1)
    assert [str(one.message) for one in warned] == [alarm]


@pytest.mark.parametrize("named", ["lightning.pytorch.callbacks.RichProgressBar", "my_bars.TQDMProgressBar"])
def test_a_bar_of_the_recipes_own_stays(named: str) -> None:
    own = RichProgressBar() if "Rich" in named else type("TQDMProgressBar", (TQDMProgressBar,), {})()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[own])
    bring_terminal_output(trainer, [named])
    assert own in trainer.callbacks  # type: ignore[attr-defined]
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[TQDMProgressBar(refresh_rate=5)])
    bring_terminal_output(trainer, [])
    bar, summary = trainer.callbacks[:2]  # type: ignore[attr-defined]
    assert isinstance(bar, ProgressBar)
    assert isinstance(summary, Summary)
    assert bar.refresh_rate == 5


@pytest.mark.parametrize("name", ["openmoji", "openmoji.yaml"])
def test_a_base_may_be_a_packaged_recipe(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: {name}\nname: mine\n")
    mine = Recipe(tmp_path / "mine.yaml").values()
    assert mine == Recipe("openmoji").values() | {"name": "mine"}


def test_a_wrong_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("base: opennoji\n")
    assert main(["run", str(tmp_path / "mine.yaml")]) == 2
    assert "its base opennoji isn't there: no recipe opennoji, did you mean openmoji?" in capsys.readouterr().err
    assert main(["run", "openmoji", "--config", str(tmp_path / "mine.yaml")]) == 2
    assert "base: opennoji in an overlay: only RECIPE itself can name its base" in capsys.readouterr().err
    assert main(["run", "nowhere/openmoji.yaml"]) == 2
    assert "no recipe nowhere/openmoji.yaml, did you mean openmoji?" in capsys.readouterr().err


def test_classes_are_found_in_the_current_folder_and_beside_overlays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, folder in ((2, "current"), (3, "beside")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"my_callback_{number}.py").write_text(CALLBACK.format(number=number))
    overlay = tmp_path / "beside" / "overlay.yaml"
    overlay.write_text("trainer: {callbacks+: [{class_path: my_callback_3.Mine3}]}\n")
    with working_in(tmp_path / "current"):
        own = ["--config", str(overlay), "--trainer.callbacks+", "{class_path: my_callback_2.Mine2}"]
        assert Recipe("openmoji", own).config.import_from == [str(tmp_path / "beside"), str(tmp_path / "current")]
        assert main(["run", "openmoji", "--trainer.callbacks+", "{class_path: my_callback_4.Mine}"]) == 2
    searched = f"{RECIPES.resolve()}, {tmp_path / 'current'}"
    assert f"Python looked among the installed packages and in {searched}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["show"], ["compare"], ["export"], ["sample", "--prompt", "x"]])
def test_a_wrong_name_of_a_run_lists_the_runs(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with working_in(tmp_path):
        assert main([command[0], "opnmoji", *command[1:]]) == 2
        assert "there is no run in runs" in capsys.readouterr().err
        for name in ("openmoji", "swept/longer"):
            (tmp_path / "runs" / name).mkdir(parents=True)
            (tmp_path / "runs" / name / "recipe.yaml").write_text("name: x\n")
        assert main([command[0], "opnmoji", *command[1:]]) == 2
        error = capsys.readouterr().err
        assert "swept/longer" in error
        assert error.endswith("; did you mean runs/openmoji?\n")
        assert main([command[0], "runs/swept/long", *command[1:]]) == 2
        assert capsys.readouterr().err.endswith("runs/swept holds longer; did you mean runs/swept/longer?\n")


def test_a_command_that_loads_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say_loading({})
    assert capsys.readouterr().err == ""  # nothing is left to load
    monkeypatch.delitem(sys.modules, "torch")
    say_loading({"RANK": "1"})
    assert capsys.readouterr().err == ""  # rank 0 says it for all
    say_loading({"RANK": "0"})
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "Loading PyTorch and Lightning ...\n")
