"""The files of a recipe: what is stated twice, what is added to, and what a recipe without loggers leaves."""

import sys
from pathlib import Path

import pytest
import yaml

from nami_lightning.cli.main import main
from nami_lightning.runs.old_recipes import joined
from nami_lightning.runs.recipe import Recipe
from nami_lightning.runs.tensorboard import event_folders

CSV = "lightning.pytorch.loggers.CSVLogger"
PHASES = "[{steps: 2, ratio: [1, 1, 1], learning_rate: 1.0e-3}]"


def layer(folder: Path, base: str, trainer: str) -> Path:
    path = folder / "layer.yaml"
    path.write_text(f"base: {base}\ntrainer: {trainer}\n")
    return path


def named(recipe: Recipe, key: str) -> list[str]:
    return [entry["class_path"].rpartition(".")[2] for entry in recipe.values()["trainer"][key]]


@pytest.mark.parametrize("order", [("callbacks", "callbacks+"), ("callbacks+", "callbacks")])
def test_a_list_and_its_addition_in_one_file_are_one_list(tiny: list[str], tmp_path: Path, order: list[str]) -> None:
    lists = {"callbacks": "[nami_lightning.callbacks.EMA]", "callbacks+": "[nami_lightning.callbacks.Watchdog]"}
    path = layer(tmp_path, tiny[0], "{" + ", ".join(f"{key}: {lists[key]}" for key in order) + "}")
    assert named(Recipe(path), "callbacks") == ["EMA", "Watchdog"]
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(path.read_text().partition("\n")[2])
    assert named(Recipe(tiny[0], ["--config", str(overlay)]), "callbacks") == ["EMA", "Watchdog"]


def test_single_values_and_nothing_are_joined_too() -> None:
    assert joined({"a": None, "a+": 1, "b": [{"c": [1], "c+": [0]}], "d+": [2]}) == {
        "a": [1],
        "b": [{"c": [1, 0]}],
        "d+": [2],
    }
    assert joined({"a": False, "a+": [True, 1]}) == {"a": [True, 1]}


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("base: openmoji\ntrainer:\n  devices: 1\n  precision: 32-true\n  devices: 2\n")
    assert main(["run", str(path)]) == 2
    assert "twice.yaml is not YAML: the key devices is there twice" in capsys.readouterr().err
    merged = tmp_path / "merged.yaml"
    merged.write_text("base: openmoji\nmodel: {<<: {prompt_dropout: 0.2}, prompt_dropout: 0.3}\n")
    assert Recipe(merged).values()["model"]["prompt_dropout"] == 0.3


@pytest.mark.parametrize("old", ["null", "true"])
def test_a_logger_is_added_to_the_default_of_an_old_recipe(tiny: list[str], tmp_path: Path, old: str) -> None:
    saved = Recipe(tiny[0]).values()
    saved["trainer"]["logger"] = yaml.safe_load(old)  # as earlier versions resolved it
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(saved))
    addition = tmp_path / "addition.yaml"
    addition.write_text(f"trainer: {{logger+: [{{class_path: {CSV}, init_args: {{save_dir: x}}}}]}}\n")
    recipe = Recipe(tmp_path / "recipe.yaml", ["--config", str(addition)])
    assert named(recipe, "logger") == ["RunTensorBoard", "CSVLogger"]
    assert named(Recipe(tmp_path / "recipe.yaml"), "logger") == ["RunTensorBoard"]
    both = layer(tmp_path, tiny[0], f"{{logger: {old}, logger+: [{{class_path: {CSV}, init_args: {{save_dir: x}}}}]}}")
    assert named(Recipe(both), "logger") == ["RunTensorBoard", "CSVLogger"]


def test_a_run_without_loggers_does_not_speak_of_tensorboard(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    quiet = ["--trainer.limit_val_batches", "0", "--data.init_args.num_workers", "0", "--trainer.logger", "false"]
    assert main(["run", *tiny, "--curriculum.phases", PHASES, *quiet]) == 0
    run = tmp_path / "runs" / "tiny"
    assert event_folders(run) == []
    last = caplog.messages[-1]
    assert last == f"Done. Samples: {run / 'samples'}"
    assert main(["show", str(run)]) == 0
    printed = capsys.readouterr()
    said = printed.out + printed.err + caplog.text
    assert "tensorboard" not in said.lower()
    assert "none in the run's folder" in printed.out


def test_ranks_in_other_folders_read_the_same_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my_layer_callback.py").write_text(
            "import lightning as L\n\n\nclass Mine(L.Callback): ...\n"
        )
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.syspath_prepend(str(tmp_path / folder))
        monkeypatch.delitem(sys.modules, "my_layer_callback", raising=False)
        recipe = Recipe("openmoji", ["--trainer.callbacks+", "{class_path: my_layer_callback.Mine}"])
        assert recipe.config.import_from == [str(tmp_path / folder)]
        digests.append(recipe.digest())
    assert digests[0] == digests[1] != Recipe("openmoji").digest()
    assert Recipe("openmoji", ["--seed", "8"]).digest() != Recipe("openmoji").digest()
