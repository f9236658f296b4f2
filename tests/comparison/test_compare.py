"""Comparisons of runs as they are found on disk, and sweeps of real ones; figures against ones worked out by hand."""

import base64
import os
import re
import signal
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.processes import end, execute, start
from PIL import Image

from nami_lightning.cli.main import main
from nami_lightning.comparison import compare
from nami_lightning.comparison import sweep as sweep_module
from nami_lightning.comparison.compare import differences, load_records
from nami_lightning.comparison.report import budget_table, format_budget, format_si, reach_table
from nami_lightning.comparison.seed_variance import group_by_recipe, seed_differences
from nami_lightning.comparison.sweep import load_sweep, run_arguments
from nami_lightning.metrics.record import Entry, Evaluation, read_entries, write_entries
from nami_lightning.runs.preemption import INTERRUPTED, REQUEUE
from nami_lightning.runs.recipe import RECIPES, Recipe
from nami_lightning.runs.run_dir import Run, step_of

FRECHET, RECALL = "metrics/frechet_x", "metrics/recall_x"


def make_run(
    folder: Path,
    values: list[float],
    shift: float = 0.0,
    total: int = 60,
    seconds: bool = True,
    seed: int = 0,
    learning_rate: float = 1e-3,
) -> Path:
    """A run's folder with an evaluation every ten steps, the drawn images ``shift`` from the real ones."""
    folder.mkdir(parents=True)
    phases = [{"steps": total, "ratio": [1], "learning_rate": learning_rate}]
    recipe = {"name": folder.name, "seed": seed, "curriculum": {"phases": phases, "unit": 2}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    steps = [10 * (i + 1) for i in range(len(values))]
    write_entries(
        folder,
        [
            Entry(
                step, 2 * step, 1_000_000 * step, 0.5 * step if seconds else None, 100, {FRECHET: y, RECALL: 1 - y / 99}
            )
            for step, y in zip(steps, values, strict=True)
        ],
    )
    if values:
        rng = np.random.default_rng(seed)
        real = np.random.default_rng(99).normal(size=(100, 4))
        Evaluation(
            step=steps[-1],
            features="x",
            drawn=rng.normal(size=(100, 4)) + shift,
            real=real,
            captions=[f"prompt {i}" for i in range(100)],
            seeds=list(range(100)),
            real_ids=[str(i) for i in range(100)],
            of_drawn={"probe/retrieval_at_1": (rng.random(100) < 0.5 - shift / 10).astype(float)},
            of_real={RECALL: np.ones(100)},
            images=[np.full((8, 8, 3), 60 * i, np.uint8) for i in range(3)],
        ).save(folder)
    return folder


def test_curves_are_read_between_evaluations(tmp_path: Path) -> None:
    slow = make_run(tmp_path / "slow", [90, 50, 40, 30, 35, 30])
    fast = make_run(tmp_path / "fast", [80, 20])
    one, other = load_records([slow, fast])
    curve = one.curve(FRECHET, "flops")
    assert curve[:2] == [(10e6, 90), (20e6, 50)]
    assert compare.value_at(curve, 15e6) == 70
    assert compare.value_at(curve, 5e6) is None
    assert compare.value_at(curve, 65e6) is None
    assert compare.best_point(curve, -1) == (40e6, 30)
    assert compare.budget_to_reach(other.curve(FRECHET, "flops"), 30, -1) == pytest.approx(10e6 + 10e6 * 50 / 60)
    assert compare.budget_to_reach(curve, 20, -1) is None
    assert compare.budget_to_reach(curve, 95, -1) == 10e6
    assert compare.budget_to_reach([(1, 0.1), (2, 0.5)], 0.3, 1) == pytest.approx(1.5)
    assert compare.equal_budget([one, other], "time") == 10
    table = reach_table([one, other], "time", FRECHET)
    assert table.rows[1][1] == "9 s (0.46 of it)"  # 9.17 s of slow's 20 s
    assert table.rows[0][2] == "not reached"
    table = reach_table([one, other], "time", RECALL)  # 1 - frechet / 99
    assert table.rows[1][1] == "9 s (0.46 of it)"
    early = make_run(tmp_path / "early", [10])
    table = reach_table([one, load_records([early])[0]], "steps", FRECHET)
    assert table.rows[1][1] == "≤ 10 (≤ 0.25 of it)"


def test_every_way_of_naming_a_metric_has_its_direction() -> None:
    for name, sign in {
        "metrics/frechet_inception_v3": -1,
        "metrics/kid_x": -1,
        "metrics/mmd_x": -1,
        "metrics/precision_x": 1,
        "metrics/clip_score_vit": 1,
        "probe/retrieval_at_5": 1,
        "probe/retrieval_at_5_of_real": 0,
        "metrics/copies_x": 0,
        "metrics/nearest_training_x": 0,
    }.items():
        assert compare.direction(name) == sign, name


def test_the_bootstrap_tells_noise_from_a_difference(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / name, [2.0], shift, seed=seed)
        for name, shift, seed in (("a", 0.0, 1), ("b", 0.0, 2), ("far", 2.0, 3))
    ]
    found = {(d.one, d.other, d.metric): d for d in differences(load_records(folders), 100, quiet=True)}
    assert found["a", "b", FRECHET].within_noise
    assert not found["a", "far", FRECHET].within_noise
    # Two coordinates more than the same images by 2 in each of 4: a distance of about 16.
    assert (
        found["far", "b", FRECHET].value if ("far", "b", FRECHET) in found else -found["b", "far", FRECHET].value > 12
    )
    # A share's interval is known in closed form: the difference of two independent ones of about 1/2, 100 each.
    drawn = [np.asarray(e.of_drawn["probe/retrieval_at_1"]) for e in map(Evaluation.load, folders[:2]) if e]
    exact = 1.96 * np.std(drawn[0] - drawn[1], ddof=1) / 10
    margin = np.mean([found["a", "b", "probe/retrieval_at_1"].margin])
    assert margin == pytest.approx(exact, rel=0.25)


def test_seeds_of_a_recipe_are_taken_together(tmp_path: Path, capsys: Any) -> None:
    folders = [
        make_run(tmp_path / "a", [50, 20], seed=0),
        make_run(tmp_path / "b", [60, 44], seed=0, learning_rate=2e-3),
        make_run(tmp_path / "a1", [70, 30, 28], seed=1),
        make_run(tmp_path / "b1", [80, 40], seed=1, learning_rate=2e-3),
        make_run(tmp_path / "a_again", [50, 25], seed=0),  # not a third sample of chance
    ]
    records = load_records(folders)
    a, b, again = group_by_recipe(records)
    assert [group.title for group in (a, b, again)] == ["a (2 seeds)", "b (2 seeds)", "a_again"]
    assert a.values(FRECHET) == [20, 30]  # at step 20: 28 is one's alone
    assert a.curve(FRECHET, "time") == [(5, 60), (10, 25)]  # step 30 is one's alone
    assert a.curve("metrics/none", "time") == []

    found = {one.metric: one for one in seed_differences(records)}
    assert (found[FRECHET].value, found[FRECHET].better) == (-17, "a")
    assert found[FRECHET].probability == pytest.approx(2 / len(list(combinations(range(4), 2))))
    assert found[RECALL].better == "a"  # larger is better
    overlapping = [*records[1:4], load_records([make_run(tmp_path / "a2", [90, 45], seed=2)])[0]]
    assert [one.better for one in seed_differences(overlapping)] == [None, None]
    assert seed_differences(records[:2]) == []

    assert run_compare(*map(str, folders), "--output", str(tmp_path / "out"), "--resamples", "20") == 0
    shown = capsys.readouterr().out
    assert re.search(r"frechet_x ↓ +25 ± 7.1 +42 ± 2.8 +25\n", shown)
    assert re.search(r"at step +20 +20 +20\n", shown)
    assert re.search(r"frechet_x +a - b +-17 +every seed of a is better +33%", shown)


def test_the_same_images_of_two_runs_never_differ(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, [2.0], 1.0, seed=1) for name in ("a", "again")]
    for one in differences(load_records(folders), 5, quiet=True):
        assert one.value == 0
        assert one.within_noise
        assert one.margin == (5.5 / 100 if one.metric.startswith("probe/") or one.metric == RECALL else 0)


def run_compare(*arguments: str) -> int:
    return main(["compare", *arguments])


def test_the_command_writes_a_page_that_needs_nothing_else(tmp_path: Path, capsys: Any) -> None:
    slow = make_run(tmp_path / "slow", [90, 50, 40, 30, 35, 30], 1.0)
    fast = make_run(tmp_path / "fast", [80, 20], 0.5, total=20)
    write_entries(fast, [replace(e, metrics=e.metrics | {f"{FRECHET}_of_real": 7.0}) for e in read_entries(fast)])
    assert run_compare(str(slow), str(fast), "--output", str(tmp_path / "out"), "--resamples", "20") == 0
    shown = capsys.readouterr().out
    assert "finished, 20 steps" in shown
    assert "At equal flops: 20 MFLOP" in shown
    assert "It covers the noise of the metric, not that of training" in shown
    page = (tmp_path / "out" / "index.html").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:|#)", page)
    assert page.count("<svg") == 2
    assert page.count("<!-- real images -->") == 1
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names))
    encoded = re.search(r"data:image/png;base64,([^']+)", page)
    assert encoded
    (tmp_path / "grid.png").write_bytes(base64.b64decode(encoded[1]))
    assert Image.open(tmp_path / "grid.png").size == Image.open(tmp_path / "out" / "grid.png").size
    for name in ("metrics_frechet_x.png", "metrics_frechet_x.svg", "metrics_recall_x.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    assert "| metrics/frechet_x ↓ | 30 | 20 * |" in markdown
    assert "| metrics/frechet_x ↓ | 50 | 20 * |" in markdown

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out" / "tensorboard" / "slow"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars(f"{FRECHET} by seconds")][:2] == [(5, 90), (10, 50)]
    assert f"{FRECHET} by gigaflops" in events.Tags()["scalars"]


def test_all_states_of_runs_are_shown_without_a_traceback(tmp_path: Path, capsys: Any) -> None:
    folders = [
        make_run(tmp_path / "done", [9, 8, 7, 6, 5, 4]),
        make_run(tmp_path / "running", [9, 8]),
        make_run(tmp_path / "crashed", [9]),
        make_run(tmp_path / "untimed", [9, 7], seconds=False),
        make_run(tmp_path / "bare", []),
        make_run(tmp_path / "elsewhere" / "done", [9, 3]),
        make_run(tmp_path / "young", []),
    ]
    recipe = yaml.safe_load((folders[6] / "recipe.yaml").read_text())
    recipe["trainer"] = {"callbacks": [{"class_path": "nami_lightning.callbacks.Metrics"}]}
    (folders[6] / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with (folders[2] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "samp')
    long_ago = time.time() - 3600
    for path in folders[2].iterdir():
        os.utime(path, (long_ago, long_ago))
    output = ["--output", str(tmp_path / "out"), "--resamples", "20"]
    for by in ("steps", "time"):
        assert run_compare(*map(str, folders), "--by", by, *output) == 0
    shown = capsys.readouterr().out
    assert "finished, 60 steps" in shown
    assert "running, step 20 of 60" in shown
    assert "stopped at step 10 of 60 (last written" in shown
    assert "running, step 0 of 60; its recipe lacks the callback Metrics" in shown
    assert "running, step 0 of 60; not measured yet" in shown
    assert str(folders[5]) in shown
    assert run_compare(str(folders[4]), *output) == 0
    assert run_compare(str(folders[0]), str(tmp_path / "nowhere"), *output) == 2
    assert "nowhere is not a run" in capsys.readouterr().err
    (folders[1] / "recipe.yaml").write_text("{}")
    assert run_compare(str(folders[1]), *output) == 2
    assert "is not a resolved recipe" in capsys.readouterr().err


def test_a_young_run_takes_nothing_from_the_others(tmp_path: Path) -> None:
    records = load_records([make_run(tmp_path / "a", [9, 8, 7]), make_run(tmp_path / "b", [6, 5, 4])])
    late = load_records([make_run(tmp_path / "late", [3])])[0]
    late = replace(late, entries=[replace(late.entries[0], step=4, flops=4_000_000)])
    table = budget_table([*records, late], "flops")
    assert table.title == "At equal flops: 30 MFLOP"
    assert "Left out, because their budget is smaller: late" in table.note
    assert table.rows[0][1:] == ["7", "4 *", "—"]


def test_a_run_that_is_given_twice_is_taken_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [9, 8])
    assert [record.name for record in load_records([run, tmp_path / "a" / ".." / "a"])] == ["a"]


def test_what_changes_nothing_of_the_training_tells_no_recipes_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, [9, 8], seed=seed) for seed, name in enumerate("ab")]
    recipe = yaml.safe_load((folders[1] / "recipe.yaml").read_text())
    recipe["trainer"] = {"devices": 8, "max_time": "00:01:00:00"}
    (folders[1] / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    recipe = yaml.safe_load((folders[0] / "recipe.yaml").read_text())
    recipe["trainer"] = {"devices": 1}
    (folders[0] / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert [group.title for group in group_by_recipe(load_records(folders))] == ["a (2 seeds)"]


def test_runs_measured_on_other_images_get_no_verdict(tmp_path: Path, capsys: Any) -> None:
    folders = [make_run(tmp_path / "a", [9.0], 1.0), make_run(tmp_path / "b", [5.0], 3.0)]
    evaluation = Evaluation.load(folders[1])
    assert evaluation is not None
    replace(evaluation, real_ids=[f"other {name}" for name in evaluation.real_ids]).save(folders[1])
    assert run_compare(*map(str, folders), "--output", str(tmp_path / "out"), "--resamples", "20") == 0
    shown = capsys.readouterr().out
    assert "The runs were measured against different held-out images: they can't be compared." in shown
    assert "not comparable" in shown
    assert "is better\n" not in shown


def test_five_images_are_never_beyond_the_noise(tmp_path: Path) -> None:
    """The exact sign test of five against none gives 1/16; a bootstrap alone would call it a difference."""
    folders = [make_run(tmp_path / name, [9.0], 1.0) for name in "ab"]
    for folder, hits in zip(folders, (0, 5), strict=True):
        evaluation = Evaluation.load(folder)
        assert evaluation is not None
        found = np.zeros(len(evaluation.drawn))
        found[:hits] = 1
        replace(evaluation, of_drawn={"probe/retrieval_at_1": found}).save(folder)
    one = next(d for d in differences(load_records(folders), 100, quiet=True) if d.metric == "probe/retrieval_at_1")
    assert abs(one.value) == pytest.approx(0.05)
    assert one.within_noise


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut short"])
def test_damaged_files_of_a_run_are_named(content: bytes, tmp_path: Path, capsys: Any) -> None:
    run = make_run(tmp_path / "a", [9.0, 8.0], 1.0)
    (run / "evaluation.npz").write_bytes(content)
    assert run_compare(str(run), "--output", str(tmp_path / "out")) == 2
    assert f"{run / 'evaluation.npz'} is damaged" in capsys.readouterr().err
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n[]\n")
    assert run_compare(str(run), "--output", str(tmp_path / "out")) == 2
    assert "line 1 is not an evaluation" in capsys.readouterr().err


def test_a_comparison_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "mine").mkdir(parents=True)
    for name in ("a", "b"):
        run = make_run(tmp_path / name, [9.0, 8.0])
        assert run_compare(str(run), "--output", str(output)) == 0
    assert [path.name for path in (output / "tensorboard").iterdir()] == ["b"]
    assert (output / "mine").is_dir()


def test_too_few_resamples_are_refused(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run_compare(str(tmp_path), "--resamples", "1")
    assert "neither 0 nor at least 20" in capsys.readouterr().err


def test_amounts_are_for_people() -> None:
    assert [format_si(value) for value in (0, 5, 1234, 17.1e12)] == ["0", "5 ", "1.23 k", "17.1 T"]
    assert format_budget(852, "time") == "14 min 12 s"
    assert format_budget(7265, "time") == "2 h 01 min"
    assert format_budget(17.1e12, "flops") == "17.1 TFLOP"
    assert format_budget(12345, "samples") == "12,345"


# --- sweeps ----------------------------------------------------------------------------------------


def write_sweep(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: x\nruns: []", "runs must be a list of at least one run"),
        ("output_dir: x\nrun: []", "unknown key run; the keys are output_dir, runs, by, overrides"),
        ("output_dir: x\nruns: [{recipe: openmoji}]", r"runs\[0\] lacks the key name"),
        ("output_dir: x\nruns: [{recipe: openmoji, name: a, sed: 1}]", r"runs\[0\]: unknown key sed"),
        ("output_dir: x\nruns: [{recipe: o, name: a}, {recipe: o, name: a}]", "several runs have the name a"),
        ("output_dir: x\nby: money\nruns: [{recipe: o, name: a}]", "by must be one of steps, samples, flops, time"),
        ("output_dir: x\nruns: [", "is not YAML"),
        ("output_dir: x\nruns: [{recipe: o, name: a, overrides: 3}]", "overrides must be a part of a recipe"),
        ("nothing", "must be a mapping"),
        ("output_dir: x\nruns: [{recipe: o, name: 1_1_2}]", r"runs\[0\]: name must be a string"),
        ("output_dir: x\nruns: [{recipe: o, name: a, overrides: {name: b}}]", "name can't be overridden"),
    ],
)
def test_a_wrong_sweep_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_sweep(write_sweep(tmp_path, text))


def test_a_misspelt_override_is_refused_before_anything_is_trained(tmp_path: Path, capsys: Any) -> None:
    run = "{recipe: openmoji, name: a, overrides: {model: {taau: uniform}}}"
    text = f"output_dir: {tmp_path / 'runs'}\nruns: [{run}]"
    assert main(["sweep", str(write_sweep(tmp_path, text))]) == 2
    assert "did you mean model.tau?" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["sweep", "openmoji_nothing"]) == 2
    assert "no sweep openmoji_nothing" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "status"), [("SIGINT", INTERRUPTED), ("SIGTERM", REQUEUE)])
def test_a_sweep_that_is_told_to_stop_lets_its_run_save_and_starts_no_other(
    name: str, status: int, tmp_path: Path, tiny: list[str]
) -> None:
    """Ctrl-C goes to the whole process group, SIGTERM to the sweep alone."""
    data = {"init_args": {"folder": tiny[4], "num_workers": 0}}
    runs = [{"recipe": tiny[0], "name": run, "overrides": {"data": data}} for run in ("one", "other")]
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "runs"), "runs": runs}))
    (process,) = start(execute, (["sweep", str(file)],), 1, tmp_path / "log")
    checkpoints = tmp_path / "runs" / "one" / "checkpoints"
    while process.is_alive() and not list(checkpoints.glob("*.ckpt")):
        time.sleep(0.05)
    assert process.pid
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    assert end([process]) == status
    saved = step_of(Run(tmp_path / "runs" / "one").checkpoints[-1])
    assert f"Told to stop: saved step {saved} of 60" in (tmp_path / "log").read_text()
    assert not (tmp_path / "runs" / "other").exists()


def test_a_sweep_trains_resumes_skips_and_compares(
    tiny: list[str], tmp_path: Path, capfd: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    callbacks = [
        {"class_path": "nami_lightning.callbacks.BridgePretraining", "init_args": {"samples": 64}},
        {
            "class_path": "nami_lightning.callbacks.Metrics",
            "init_args": {
                "samples": 8,
                "training_images": 12,
                "every_n_steps": 2,
                "agreement": None,
                "features": {"class_path": "helpers.tiny_models.MeanColours"},
                "sampler": {"num_inference_steps": 3, "guidance_scale": 1.0},
            },
        },
        {"class_path": "nami_lightning.callbacks.RunCheckpoint", "init_args": {"every_n_steps": 2}},
    ]
    common = {
        "data": {"init_args": {"folder": tiny[4], "num_workers": 0}},
        "curriculum": {"phases": [{"steps": 4, "ratio": [2, 1, 1], "learning_rate": 1e-3}]},
        "trainer": {"callbacks": callbacks},
    }
    quiet = {"model": {"bridge": {"init_args": {"residual_noise": False}}}}
    uneven = {"curriculum": {"unit": 5}}  # 10 samples in micro-batches of at most 4
    runs = [
        {"recipe": tiny[0], "name": "plain"},
        {"recipe": tiny[0], "name": "wrong", "overrides": uneven},
        {"recipe": tiny[0], "name": "quiet", "overrides": quiet},
    ]
    sweep = {"output_dir": str(tmp_path / "runs"), "by": "steps", "overrides": common, "runs": runs}
    path = write_sweep(tmp_path, yaml.safe_dump(sweep))
    real_run = sweep_module.run_command

    def run_here(command: list[str]) -> int:
        """In this process, which has imported everything; the one that fails in its own, as in earnest."""
        return real_run(command) if "wrong" in command else main(command[3:])

    monkeypatch.setattr(sweep_module, "run_command", run_here)

    assert main(["sweep", str(path), "--resamples", "20"]) == 2
    told = capfd.readouterr()
    assert "failed: wrong" in told.err
    assert [entry.step for entry in read_entries(tmp_path / "runs" / "quiet")] == [2, 4]
    assert Recipe(tmp_path / "runs" / "quiet" / "recipe.yaml").config.model.bridge.init_args.residual_noise is False
    assert "Traceback" not in told.err
    page = (tmp_path / "runs" / "comparisons" / "sweep" / "index.html").read_text()
    assert all(name in page for name in ("plain", "quiet", "frechet_mean_colours"))

    (tmp_path / "runs" / "quiet" / "checkpoints" / "step=0000004.ckpt").unlink()
    before = (tmp_path / "runs" / "plain" / "metrics.jsonl").stat().st_mtime_ns
    sweep["runs"] = [runs[0], runs[2]]
    assert main(["sweep", str(write_sweep(tmp_path, yaml.safe_dump(sweep))), "--resamples", "20"]) == 0
    told = capfd.readouterr()
    assert "[1/2] plain: finished\n" in told.out
    assert "from step 2 of 4" in told.err + caplog.text
    assert (tmp_path / "runs" / "plain" / "metrics.jsonl").stat().st_mtime_ns == before
    assert [entry.step for entry in read_entries(tmp_path / "runs" / "quiet")] == [2, 4]


@pytest.mark.parametrize("name", sorted(path.stem for path in (RECIPES / "experiments").glob("*.yaml")))
def test_every_packaged_sweep_describes_models_that_measure_the_same(name: str) -> None:
    path = RECIPES / "experiments" / f"{name}.yaml"
    sweep = load_sweep(path)
    measured = set()
    for run in sweep.runs:
        first, *rest = run_arguments(sweep, run, path.parent)
        recipe = Recipe(first, rest)
        model = recipe.make_model()
        assert model.curriculum.num_stages == len(model.resolutions)
        settings = [c.init_args for c in recipe.config.trainer.callbacks if c.class_path.endswith(".Metrics")]
        assert len(settings) == 1
        solver_steps = settings[0].sampler.num_inference_steps
        networks = settings[0].features or []
        features = tuple(one.class_path for one in (networks if isinstance(networks, list) else [networks]))
        measured.add((settings[0].samples, settings[0].seed, features, settings[0].agreement, solver_steps))
    assert len(measured) == 1


def test_equal_budgets_of_the_packaged_comparison() -> None:
    """Flow-only and FLUX-base have NAMI's samples in the paper's setting."""
    totals = set()
    for name in ("nami_0.6b", "flux_base_0.6b"):
        curriculum = Recipe(RECIPES / "experiments" / "measured" / f"{name}.yaml").make_model().curriculum
        totals.add(sum(phase.steps * sum(phase.ratio) * curriculum.unit for phase in curriculum.phases))
    assert len(totals) == 1
