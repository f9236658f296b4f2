"""The search for solver steps that pay: on a distance in closed form, and the whole command on a tiny run."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import run

from nami_lightning.cli.main import main
from nami_lightning.comparison.tune_steps import Setting, cheapest, front, search, write_front
from nami_lightning.metrics.record import read_entries
from nami_lightning.pipelines.nami_pipeline import NamiPipeline

pytest_plugins = "helpers.tiny_models"
COSTS = (1, 4, 16)


def closed_form(errors: tuple[float, ...]) -> Any:
    """Each stage's error falls as 1 / steps**2; Euler's as 1 / steps."""

    def measure(steps: tuple[int, ...], solver: str) -> Setting:
        order = 1 if solver == "euler" else 2
        distance = 100 + sum(error / number**order for error, number in zip(errors, steps, strict=True))
        flops = sum(cost * number for cost, number in zip(COSTS, steps, strict=True))
        return Setting(steps, solver, 1.0, flops, distance)

    return measure


def test_steps_go_where_they_pay() -> None:
    seen = search(closed_form((100, 100, 100)), 3, ["euler", "multistep"], 14)
    assert all(sum(one.steps) <= 14 for one in seen)
    best = front(seen)
    assert best[0].steps == (1, 1, 1)
    assert [one.distance for one in best] == sorted((one.distance for one in best), reverse=True)
    assert {one.solver for one in best[1:]} == {"multistep"}
    last = best[-1].steps
    assert last[0] > last[1] >= last[2]
    # Of all settings with as many steps, none is as good and much cheaper.
    every = [
        closed_form((100, 100, 100))((a, b, c), "multistep")
        for a in range(1, 13)
        for b in range(1, 13)
        for c in range(1, 13)
    ]
    for one in best[1:]:
        cheaper = min(other.flops for other in every if other.distance <= one.distance)
        assert one.flops <= 1.35 * cheaper


def test_a_stage_without_error_gets_no_steps() -> None:
    best = front(search(closed_form((0, 100, 0)), 3, ["multistep"], 12))
    assert all(one.steps[0] == one.steps[2] == 1 for one in best)


def test_the_cheapest_good_one() -> None:
    settings = [Setting((n,), "euler", 1.0, n, distance) for n, distance in ((1, 120), (2, 102), (4, 101), (8, 100))]
    assert cheapest(settings, 0.02) is settings[1]
    assert cheapest(settings, 0.0) is settings[3]
    assert cheapest(settings, 0.0, best=110) is settings[1]
    assert cheapest(settings, 0.0, best=90) is None


def test_what_is_written(tmp_path: Path) -> None:
    settings = search(closed_form((1, 10, 100)), 3, ["multistep"], 8)
    write_front({"nami": settings, "base": settings[:1]}, tmp_path)
    rows = list(csv.DictReader((tmp_path / "steps.csv").open()))
    assert len(rows) == len(settings) + 1
    assert {row["run"] for row in rows} == {"nami", "base"}
    assert [row["steps"] for row in rows if row["run"] == "base"] == ["1+1+1"]
    assert (tmp_path / "steps.png").stat().st_size > 1000


def test_a_run_is_tuned_and_exported(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured: dict[str, Any] = {
        "class_path": "nami_lightning.callbacks.Metrics",
        "init_args": {
            "samples": 8,
            "training_images": 20,
            "agreement": None,
            "features": {"class_path": "helpers.tiny_models.MeanColours"},
            "sampler": {"num_inference_steps": [1, 2, 1], "guidance_scale": 1.0, "solver": "euler"},
        },
    }
    callbacks = [
        {"class_path": "nami_lightning.callbacks.BridgePretraining", "init_args": {"samples": 64}},
        {"class_path": "nami_lightning.callbacks.RunCheckpoint"},
    ]
    settings = ["--curriculum.phases", "[{steps: 2, ratio: [2, 1, 1], learning_rate: 0.002}]", "--trainer.callbacks"]
    run([*tiny, *settings, json.dumps([*callbacks, measured]), "--name", "measured"])
    folder = tmp_path / "runs" / "measured"
    capsys.readouterr()
    options = ["--solver", "euler", "--most_steps", "4", "--export", str(tmp_path / "model")]
    assert main(["tune", "steps", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    rows = {row["steps"]: row for row in csv.DictReader((folder / "tuned" / "steps.csv").open())}
    assert set(rows) == {"1+1+1", "2+1+1", "1+2+1", "1+1+2"}
    recorded = read_entries(folder)[-1].metrics["metrics/frechet_mean_colours"]
    assert float(rows["1+2+1"]["frechet"]) == pytest.approx(recorded, rel=1e-3)

    chosen = next(line.split()[0] for line in printed.splitlines() if " are the cheapest within " in line)
    pipeline = NamiPipeline.from_pretrained(tmp_path / "model")
    assert "+".join(map(str, pipeline.config.num_inference_steps)) == chosen
    assert (pipeline.config.solver, pipeline.config.guidance_scale) == ("euler", 1.0)
    assert main(["tune", "steps", str(folder), *options]) == 2
    assert "model exists" in capsys.readouterr().err
    (folder / "evaluation.npz").unlink()
    assert main(["tune", "steps", str(folder)]) == 2
    assert "needs a run whose recipe has the callback Metrics" in capsys.readouterr().err
