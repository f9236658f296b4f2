"""The command as a user meets it: a small run and all that is read of it, and one clear message for each mistake."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from nami_lightning.cli.main import main
from nami_lightning.cli.show import last_scalars
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.runs.load import load_module, load_pipeline
from nami_lightning.runs.recipe import RECIPES, Recipe
from nami_lightning.runs.run_dir import Run

TINY = Path(__file__).parents[1] / "tiny.yaml"
PROMPT = ["--prompt", "red apple", "--prompt", "dog", "--steps", "1", "2", "3"]


@pytest.fixture(scope="module")
def finished(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe."""
    runs = tmp_path_factory.mktemp("runs")
    arguments = ["run", str(TINY), "--output_dir", str(runs), "--data.init_args.folder", str(data_root)]
    assert main(arguments) == 0
    return runs / "tiny"


def resume(run: Path, *overrides: str) -> int:
    return main(["run", str(run / "recipe.yaml"), *overrides])


def test_help_answers_quickly_and_names_the_commands() -> None:
    begin = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-m", "nami_lightning.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert time.monotonic() - begin < 2
    assert all(command in shown for command in ("run", "sample", "show", "bench"))


def test_a_run_leaves_what_the_readme_says(finished: Path) -> None:
    assert sorted(path.name for path in finished.glob("checkpoints/*")) == ["step=0000056.ckpt", "step=0000060.ckpt"]
    assert sorted(path.name for path in finished.glob("samples/*")) == ["step=0000030.png", "step=0000060.png"]
    assert Image.open(finished / "samples" / "step=0000060.png").size[0] > 2 * 128
    assert list(finished.glob("events.out.tfevents.*"))
    logged = last_scalars(finished)
    stages = [f"train/loss_stage{k}" for k in (1, 2, 3)] + [f"val/loss_stage{k}" for k in (1, 2, 3)]
    assert set(stages) <= set(logged)
    # Stage 1 has no part in the last phase, so its last loss was logged before that phase began.
    assert logged["train/loss_stage1"][0] < 40 <= logged["train/loss_stage3"][0]


def test_the_curriculum_is_in_the_logs(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished), size_guidance={"scalars": 0})
    events.Reload()
    phase, rate, share = (
        {event.step: event.value for event in events.Scalars(f"curriculum/{name}")}
        for name in ("phase", "learning_rate", "share_stage3")
    )
    assert [phase[step] for step in (4, 19, 24, 39, 44, 59)] == [1, 1, 2, 2, 3, 3]
    assert rate[4] == pytest.approx(2e-3)
    assert rate[59] == pytest.approx(5e-4)
    assert share[44] == pytest.approx(4 / 6)
    assert {"throughput/images_per_second_stage2", "throughput/share_waiting_for_data"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples"]


def test_the_resolved_recipe_stands_alone(finished: Path) -> None:
    recipe = Recipe(finished / "recipe.yaml")
    assert recipe.dump() == (finished / "recipe.yaml").read_text()
    assert recipe.config.base is None


def test_run_again_says_it_is_finished(finished: Path, capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    before = (finished / "checkpoints" / "step=0000060.ckpt").stat().st_mtime_ns
    assert resume(finished) == 0
    assert "is finished (step 60 of 60, phase 3 of 3)" in capsys.readouterr().err + caplog.text
    assert (finished / "checkpoints" / "step=0000060.ckpt").stat().st_mtime_ns == before


def test_fresh_keeps_the_old_run(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "tiny")
    short = ["--curriculum.phases", "[{steps: 2, ratio: [1, 1, 1], learning_rate: 1e-3}]"]
    assert resume(finished, "--fresh", "--output_dir", str(tmp_path), *short) == 0
    old = [path for path in tmp_path.iterdir() if path.name.startswith("tiny.")]
    assert (old[0] / "checkpoints" / "step=0000060.ckpt").exists()
    assert [path.stem for path in Run(tmp_path / "tiny").checkpoints] == ["step=0000002"]


def test_fresh_leaves_the_old_run_alone_if_the_new_recipe_is_wrong(finished: Path, capsys: Any) -> None:
    before = sorted(finished.parent.iterdir())
    assert resume(finished, "--fresh", "--model.tau_mean", "[0.0, 1.0]") == 2
    assert "need one number, or 3 (one a stage)" in capsys.readouterr().err
    assert sorted(finished.parent.iterdir()) == before


def test_a_longer_last_phase_goes_on(finished: Path, tmp_path: Path, caplog: Any) -> None:
    shutil.copytree(finished, tmp_path / "tiny")
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    recipe["output_dir"] = str(tmp_path)
    recipe["curriculum"]["phases"][2]["steps"] = 22
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "longer.yaml")]) == 0
    assert Run(tmp_path / "tiny").checkpoints[-1].stem == "step=0000062"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"phases": 0, "learning_rate": 1e-5}, r"curriculum.phases\[0\].learning_rate was 0.002"),
        (
            {"phases": 1, "steps": 10},
            r"curriculum.phases\[1\].steps was 20 in the checkpoint, and that phase is completed",
        ),
        ({"phases": 2, "steps": 10}, r"would end at step 50, but the checkpoint has already done 60"),
    ],
)
def test_an_edited_past_is_refused(
    finished: Path, tmp_path: Path, edit: dict[str, Any], message: str, capsys: Any
) -> None:
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    phase = recipe["curriculum"]["phases"][edit.pop("phases")]
    phase.update(edit)
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "edited.yaml")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_checkpoint_of_another_model_is_refused(finished: Path, capsys: Any) -> None:
    assert resume(finished, "--model.transformer.init_args.num_single_layers", "[0, 1, 2]") == 2
    error = capsys.readouterr().err
    assert "another model: its transformer.num_single_layers is [0, 1, 1], this recipe's [0, 1, 2]" in error
    assert error.count("\n") == 1


def test_a_damaged_checkpoint_is_named(finished: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(finished, tmp_path / "tiny")
    path = tmp_path / "tiny" / "checkpoints" / "step=0000060.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    assert resume(finished, "--output_dir", str(tmp_path)) == 2
    assert "step=0000060.ckpt can't be read" in capsys.readouterr().err


def test_commands_say_that_they_load_weights(finished: Path, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    weights = f"Loading the weights of {finished / 'checkpoints' / 'step=0000060.ckpt'} ..."
    pipeline = tmp_path / "pipeline"
    assert main(["export", str(finished), "--output", str(pipeline)]) == 0
    assert caplog.messages == [weights]
    for source, told in ((finished, weights), (pipeline, f"Loading the weights of {pipeline} ...")):
        caplog.clear()
        assert main(["sample", str(source), *PROMPT, "--output", str(tmp_path / source.name)]) == 0
        assert caplog.messages[0] == told


def test_sample_writes_images_and_a_grid(finished: Path, tmp_path: Path, capsys: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("flag: France\n\nhouse\n", encoding="utf-8")
    arguments = ["sample", str(finished), *PROMPT, "--prompts", str(prompts), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--images", "2"]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [*(f"{i:05d}.png" for i in range(8)), "grid.png", "index.jsonl"]
    assert Image.open(tmp_path / "out" / "00000.png").size == (32, 32)


def test_a_saved_pipeline_draws_what_the_run_draws(finished: Path, tmp_path: Path) -> None:
    load_pipeline(str(finished)).save_pretrained(tmp_path / "pipeline")
    for source, out in ((finished, "run"), (tmp_path / "pipeline", "saved")):
        assert main(["sample", str(source), *PROMPT, "--output", str(tmp_path / out)]) == 0
    one, other = (Image.open(tmp_path / out / "00000.png").tobytes() for out in ("run", "saved"))
    assert one == other
    assert isinstance(NamiPipeline.from_pretrained(tmp_path / "pipeline"), NamiPipeline)


def test_samples_are_drawn_with_the_ema(finished: Path) -> None:
    path, _ = Run(finished).load_newest() or pytest.fail("no checkpoint")
    saved = torch.load(path, weights_only=True)["state_dict"]
    drawn = load_module(Run(finished)).pipeline().transformer.state_dict()
    assert all(torch.equal(value, saved[f"ema.{name}"]) for name, value in drawn.items())
    assert not all(torch.equal(value, saved[f"transformer.{name}"]) for name, value in drawn.items())


def test_show_tells_what_a_run_is(finished: Path, capsys: Any) -> None:
    assert main(["show", str(finished)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "step 60 of 60, phase 3 of 3",
        "train/loss_stage3",
        "val/loss_stage1",
        "step=0000060.ckpt",
        "recipe.yaml",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "no recipe nowhere.yaml; give a YAML file, or one of: "),
        (["run", str(TINY), "--model.tua", "uniform"], "unknown recipe key model.tua; did you mean model.tau?"),
        (["run", str(TINY), "--model.tau", "banana"], "model.tau: Expected"),
        (["run", str(TINY), "--data.init_args.num_worker", "3"], "unknown key num_worker; did you mean num_workers?"),
        (
            ["run", str(TINY), "--resolutions", "[8, 16]"],
            "resolutions [8, 16] must have one number a stage",
        ),
        (["run", str(TINY), "--resolutions", "[8, 16, 40]"], "must be twice the one before"),
        (["run", str(TINY), "--resolutions", "[6, 12, 24]"], "[6] are not multiples of 4 px"),
        (["run", str(TINY), "--model.bridge.init_args.window_ratios", "[1, 1]"], "window_ratios has 2"),
        (["run", str(TINY), "--model.bridge.init_args.window_ratios", "[1, 0, 1]"], "must be positive numbers"),
        (["run", str(TINY), "--model.transformer.init_args.num_layers", "[1, 0]"], "need one number a stage"),
        (["run", str(TINY), "--model.transformer.init_args.num_layers", "[1, -1, 0]"], "must not be negative"),
        (["run", str(TINY), "--curriculum.unit", "0"], "unit must be at least 1"),
        (
            ["run", str(TINY), "--trainer.precision", "16-true"],
            "trainer.precision 16-true is not supported: use 32-true",
        ),
        (["run", str(TINY), "--trainer.gradient_clip_val", "1.0"], "gradient clipping is not supported"),
        (["run", str(TINY), "--name", str(TINY / "below")], "is no name of a folder below output_dir"),
        (["data", "prepare", "--source", "folder", "--output", "o"], "folder is neither an existing path nor one of"),
        (["run", str(TINY), "--curriculum.phases", "[]"], "needs at least one phase"),
        (["run", str(TINY), "--model.bridge.init_args.channels", "4"], "both are the channels of the latents"),
        (["run", str(TINY), "--model.text_encoder.sequence", "no/such-model"], "no/such-model"),
        (["sample", "nowhere", "--prompt", "x", "--output", "o"], "nowhere is neither a run"),
        (["show", "nowhere"], "nowhere is not a run"),
    ],
)
def test_a_mistake_gets_one_clear_message(
    arguments: list[str], message: str, data_root: Path, tmp_path: Path, capsys: Any
) -> None:
    if arguments[:2] == ["run", str(TINY)]:
        arguments = [*arguments, "--output_dir", str(tmp_path), "--data.init_args.folder", str(data_root)]
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert "Traceback" not in "".join(error)


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ("unti: 2", "unit: 2", "curriculum: unknown key unti; did you mean unit?"),
        ("warmup_stesp: 5", "warmup_steps: 5", "unknown key warmup_stesp; did you mean warmup_steps?"),
        ("callbacks.EMMA", "callbacks.EMA", "nami_lightning.callbacks has no EMMA; did you mean EMA?"),
        ("decaay: 0.9", "decay: 0.9", "trainer.callbacks: unknown key decaay; did you mean decay?"),
        ("decay: 1.9", "decay: 0.9", "EMA needs 0 <= decay < 1"),
        ("patch_sise: 4", "patch_size: 4", "model.transformer: unknown key patch_sise; did you mean patch_size?"),
        ("phases: [", "phases:", "is not YAML"),
        ("curiculum:", "curriculum:", "curriculum"),
        ("ratio: [4, 2]", "ratio: [4, 2, 1]", "all phases need one number a stage"),
    ],
)
def test_a_misspelt_recipe_gets_the_right_name(
    wrong: str, right: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TINY.read_text().replace(right, wrong, 1))
    assert main(["run", str(recipe)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_of_the_package_describes_a_model(recipe: str) -> None:
    model = Recipe(recipe).make_model()
    assert model.curriculum.num_stages == len(model.resolutions)


def test_the_papers_recipes_have_its_settings() -> None:
    model = Recipe("nami_2b").make_model()
    assert [(p.steps, p.ratio, p.learning_rate) for p in model.curriculum.phases] == [
        (120_000, [4, 2, 1], 1e-4),
        (80_000, [2, 4, 1], 1e-4),
        (50_000, [1, 2, 4], 5e-5),
    ]
    assert model.resolutions == [256, 512, 1024]
    assert [window.start for window in model.bridge.windows] == pytest.approx([1, 2 / 3, 1 / 3])
    assert Recipe("flux_base_2b").make_model().bridge.time_shift(4096) == pytest.approx(1.15)


def training_flops(recipe: str) -> float:
    """Floating-point operations of a recipe's training, by torch's counter on the meta device."""
    model = Recipe(recipe).make_model()
    counts = []
    with torch.device("meta"):
        transformer = model.make_transformer()
        for stage, side in enumerate(model.resolutions):
            text, time = torch.zeros(1, model.text_encoder_config.max_length, 384), torch.zeros(1)
            with FlopCounterMode(display=False) as counter:
                transformer(torch.zeros(1, 3, side, side), text, torch.zeros(1, 384), time, stage).sum().backward()
            counts.append(counter.get_total_flops())
    runs = [model.curriculum.runs(stage) for stage in range(model.num_stages)]
    return sum(count * sum(n * samples for n, samples in run) for count, run in zip(counts, runs, strict=True))


@pytest.mark.parametrize("recipe", ["openmoji_flux_base", "openmoji_flow_only"])
def test_the_demos_comparisons_have_its_budget_and_its_network(recipe: str) -> None:
    assert training_flops(recipe) == pytest.approx(training_flops("openmoji"), rel=0.005)
    demo, other = (Recipe(name).make_model().transformer_config for name in ("openmoji", recipe))
    assert sum(demo["num_layers"]) == sum(other["num_layers"])
    assert sum(demo["num_single_layers"]) == sum(other["num_single_layers"])


def test_bench_step_prints_a_row_a_phase_and_writes_no_run(data_root: Path, tmp_path: Path, capsys: Any) -> None:
    folders = ["--output_dir", str(tmp_path / "runs"), "--data.init_args.folder", str(data_root)]
    assert main(["bench", "step", str(TINY), "--steps", "2", *folders]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " s  " in line]
    assert [row[1] for row in rows] == ["4:2:1", "2:4:1", "0:2:4"]
    assert all(float(row[-1]) > 0 for row in rows)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "a\0b"], "output_dir: a path can't hold the character NUL"),
        (["--seed", "9" * 5000], f"{TINY}: "),
    ],
)
def test_odd_values_get_one_clear_message(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["run", str(TINY), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert len(error) < 2000
