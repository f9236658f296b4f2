"""The search for solver steps that pay: on a distance in closed form, and the whole command on a tiny run."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import run

from nami_lightning.cli.main import main
from nami_lightning.comparison.tune_steps import Choices, Measured, Setting, cheapest, front, search, write_front
from nami_lightning.metrics.record import read_entries
from nami_lightning.pipelines.nami_pipeline import NamiPipeline

pytest_plugins = "helpers.tiny_models"
COSTS = (1, 4, 16)


def closed_form(errors: tuple[float, ...], gains: tuple[float, ...] = (0, 0, 0)) -> Any:
    """Each stage's error falls as 1 / steps**2, Euler's as 1 / steps; guidance of 2 takes a stage's gain off."""

    def measure(setting: Setting) -> Measured:
        order = 1 if setting.solver == "euler" else 2
        guided = [scale > 1 for scale in setting.guidance_scale]
        distance = 100 + sum(error / number**order for error, number in zip(errors, setting.steps, strict=True))
        distance -= sum(gain for gain, on in zip(gains, guided, strict=True) if on)
        flops = sum(c * n * (1 + on) for c, n, on in zip(COSTS, setting.steps, guided, strict=True))
        return Measured(setting, flops, distance)

    return measure


def unguided(steps: tuple[int, ...], solver: str = "multistep") -> Setting:
    return Setting(steps, (1.0,) * len(steps), solver)


def test_steps_go_where_they_pay() -> None:
    seen = search(closed_form((100, 100, 100)), 3, Choices(["euler", "multistep"], most_steps=14))
    assert all(sum(one.setting.steps) <= 14 for one in seen)
    best = front(seen)
    assert best[0].setting.steps == (1, 1, 1)
    assert [one.distance for one in best] == sorted((one.distance for one in best), reverse=True)
    assert {one.setting.solver for one in best[2:]} == {"multistep"}
    last = best[-1].setting.steps
    assert last[0] > last[1] >= last[2]
    # Of all settings with as many steps, none is as good and much cheaper.
    every = [
        closed_form((100, 100, 100))(unguided((a, b, c)))
        for a in range(1, 13)
        for b in range(1, 13)
        for c in range(1, 13)
    ]
    for one in best[2:]:
        cheaper = min(other.flops for other in every if other.distance <= one.distance)
        assert one.flops <= 1.35 * cheaper


def test_a_stage_without_error_gets_no_steps() -> None:
    best = front(search(closed_form((0, 100, 0)), 3, Choices(most_steps=12)))
    assert all(one.setting.steps[0] == one.setting.steps[2] == 1 for one in best)


def test_guidance_goes_to_the_stage_where_it_pays() -> None:
    choices = Choices(guidance_scales=[1.0, 2.0], most_steps=8)
    best = front(search(closed_form((10, 10, 10), gains=(20, 0, -5)), 3, choices))
    assert best[-1].setting.guidance_scale == (2.0, 1.0, 1.0)
    assert best[-1].setting.name.endswith(" guided 2+1+1")


def test_a_spacing_is_taken_only_where_it_is_better() -> None:
    def measure(setting: Setting) -> Measured:
        one = closed_form((10, 10, 10))(setting)
        return Measured(setting, one.flops, one.distance - 3 * (setting.spacing == good))

    for good in ("even", "linspace"):
        best = front(search(measure, 3, Choices(spacings=["even", "linspace"], most_steps=9)))
        assert {one.setting.spacing for one in best[2:]} == {good}


def test_the_cheapest_good_one() -> None:
    values = ((1, 120), (2, 102), (4, 101), (8, 100))
    settings = [Measured(unguided((n,), "euler"), n, distance) for n, distance in values]
    assert cheapest(settings, 0.02) is settings[1]
    assert cheapest(settings, 0.0) is settings[3]
    assert cheapest(settings, 0.0, best=110) is settings[1]
    assert cheapest(settings, 0.0, best=90) is None


def test_what_is_written(tmp_path: Path) -> None:
    settings = search(closed_form((1, 10, 100)), 3, Choices(most_steps=8))
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
    options = ["--solver", "euler", "--most_steps", "4", "--guidance_scale", "1", "3"]
    options += ["--spacing", "even", "linspace", "--export", str(tmp_path / "model")]
    assert main(["tune", "steps", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    every = list(csv.DictReader((folder / "tuned" / "steps.csv").open()))
    assert {row["steps"] for row in every} == {"1+1+1", "2+1+1", "1+2+1", "1+1+2"}
    assert {row["guidance_scale"] for row in every} >= {"1+1+1", "3+1+1", "1+3+1", "1+1+3"}
    rows = {row["steps"]: row for row in every if row["guidance_scale"] == "1+1+1" and row["spacing"] == "even"}
    recorded = read_entries(folder)[-1].metrics["metrics/frechet_mean_colours"]
    assert float(rows["1+2+1"]["frechet"]) == pytest.approx(recorded, rel=1e-3)

    line = next(line for line in printed.splitlines() if " are the cheapest within " in line)
    chosen = line.split()[0]
    pipeline = NamiPipeline.from_pretrained(tmp_path / "model")
    assert "+".join(map(str, pipeline.config.num_inference_steps)) == chosen
    assert pipeline.config.solver == "euler"
    guidance = pipeline.config.guidance_scale
    assert " guided " + "+".join(f"{scale:g}" for scale in guidance) in line if isinstance(guidance, list) else True
    best = min(every, key=lambda row: float(row["frechet"]))
    assert pipeline.bridge.config.timestep_spacing in {row["spacing"] for row in every if row["on_front"] == "True"}
    assert float(best["frechet"]) <= float(rows["1+2+1"]["frechet"])
    assert main(["tune", "steps", str(folder), *options]) == 2
    assert "model exists" in capsys.readouterr().err
    (folder / "evaluation.npz").unlink()
    assert main(["tune", "steps", str(folder)]) == 2
    assert "needs a run whose recipe has the callback Metrics" in capsys.readouterr().err
