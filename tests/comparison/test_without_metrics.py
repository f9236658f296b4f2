"""Comparisons of runs that were never measured: their validation losses, and in what their recipes differ."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from nami_lightning.cli.main import main
from nami_lightning.comparison.compare import load_records
from nami_lightning.comparison.plots import write_loss_plots
from nami_lightning.comparison.recipe_differences import differing_keys
from nami_lightning.metrics.record import Entry, write_entries


def make_run(folder: Path, losses: list[float], seed: int = 0, **changes: Any) -> Path:
    """Make the folder of a run with a validation loss every ten steps and no metrics."""
    folder.mkdir(parents=True)
    phases = [{"steps": 60, "ratio": [1], "learning_rate": changes.get("learning_rate", 1e-3)}]
    callbacks = [{"class_path": "nami_lightning.callbacks.EMA", "init_args": {"decay": changes.get("decay", 0.9)}}]
    recipe = {
        "name": folder.name,
        "seed": seed,
        "curriculum": {"phases": phases, "unit": 2},
        "data": {"init_args": {"num_workers": len(folder.name)}},
        "trainer": {"callbacks": callbacks, "logger": changes.get("logger")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with SummaryWriter(str(folder)) as writer:
        for number, loss in enumerate(losses):
            writer.add_scalar("val/loss_stage1", loss, 10 * number + 9)
            writer.add_scalar("val/loss_stage1_tau_0", loss, 10 * number + 9)
            writer.add_scalar("train/loss", loss, 10 * number + 9)
    return folder


def test_the_page_has_the_losses_and_the_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        make_run(tmp_path / "one", [2.0, 1.5], logger=False),
        make_run(tmp_path / "other", [2.0, 1.25, 1.125], seed=1, learning_rate=2e-3, decay=0.99),
        make_run(tmp_path / "unlogged", []),
    ]
    output = tmp_path / "page"
    assert main(["compare", *map(str, runs), "--output", str(output)]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in lines}
    assert rows["val/loss_stage1"] == ["1.5 (step 19)", "1.125 (step 29)", "—"]
    assert rows["seed"] == ["0", "1", "0"]
    assert rows["curriculum.phases[0].learning_rate"] == ["0.001", "0.002", "0.001"]
    assert rows["trainer.callbacks[EMA].decay"] == ["0.9", "0.99", "0.9"]
    assert not {"val/loss_stage1_tau_0", "train/loss", "name", "data.num_workers", "trainer.logger"} & rows.keys()
    page = (output / "index.html").read_text()
    assert "In what the recipes differ" in page
    assert page.count("<svg") == 1
    assert "It does not rank runs" in page
    assert (output / "val_loss_stage1.png").is_file()
    assert not (output / "tensorboard").exists()
    assert [line for line in lines if line[0].startswith("Page: ")] == [[f"Page: {output / 'index.html'}"]]


BUDGETS = {
    "steps": ([9.0, 19.0, 29.0, 39.0], "steps"),
    "samples": ([50.0, 100.0, 150.0], "samples"),
    "flops": ([1e9, 2e9, 4e9], "FLOP"),
    "time": ([10.0, 20.0, 25.0], "seconds of training"),
}
"""Where its losses stand, if a run is measured after 20 and 30 steps; a loss after that has no budget but its step."""


@pytest.mark.parametrize("by", BUDGETS)
def test_losses_are_plotted_by_the_chosen_budget(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    run = make_run(tmp_path / "run", [3.0, 2.0, 1.0, 0.5])
    metrics = {"metrics/a": 1.0}
    write_entries(run, [Entry(20, 100, 2 * 10**9, 20.0, 1, metrics), Entry(30, 150, 4 * 10**9, 25.0, 1, metrics)])
    steps = [9.0, 19.0, 29.0, 39.0]
    xs, unit = BUDGETS[by]
    write_loss_plots(load_records([run]), by, tmp_path)
    axes = figures[0].axes[0]
    assert axes.get_lines()[0].get_xdata() == pytest.approx(xs)
    assert np.asarray(axes.get_lines()[0].get_ydata()).tolist() == [3.0, 2.0, 1.0, 0.5][: len(xs)]
    assert axes.get_xlabel() == unit
    # Beside a run that was never measured, both are plotted by steps.
    figures.clear()
    write_loss_plots(load_records([run, make_run(tmp_path / "unmeasured", [1.0])]), by, tmp_path)
    axes = figures[0].axes[0]
    assert [np.asarray(line.get_xdata()).tolist() for line in axes.get_lines()] == [steps, [9]]
    assert axes.get_xlabel() == ("steps" if by == "steps" else f"steps (the {by} of some runs are not known)")


def test_equal_recipes_are_said_to_be_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, [1.0]) for name in ("one", "other")]
    assert differing_keys(load_records(runs)) == {}
    assert main(["compare", *map(str, runs), "--output", str(tmp_path / "page")]) == 0
    assert "The recipes are the same." in capsys.readouterr().out


def test_a_step_trained_again_has_the_newer_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [3.0, 2.0])
    with SummaryWriter(str(run), filename_suffix=".again") as writer:
        writer.add_scalar("val/loss_stage1", 1.0, 19)
    (record,) = load_records([run])
    assert record.losses == {"val/loss_stage1": [(9, 3.0), (19, 1.0)]}
