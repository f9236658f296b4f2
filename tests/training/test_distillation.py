"""Distillation to few steps: the student's target against closed forms, and a student's run as a user starts it."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.checkpoint_contents import numbers, same_numbers
from helpers.processes import SETTINGS, lightning, run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nami_lightning import NamiTransformer2DModel
from nami_lightning.cli.main import make_parser
from nami_lightning.cli.plan import read_setup
from nami_lightning.metrics.budget import sample_flops
from nami_lightning.models import flow
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.text_encoder import TextStates
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.planning.plan import make_plan
from nami_lightning.runs.load import load_module
from nami_lightning.runs.recipe import Recipe
from nami_lightning.runs.run_dir import Run
from nami_lightning.training import rng
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.paths.rectified import DistillationSettings, RectifiedPath
from nami_lightning.training.paths.straight import PathPoint

TINY = Path(__file__).parents[1] / "tiny.yaml"
TRAIN = ["--train_steps", "6", "--learning_rate", "0.003", "--curriculum.unit", "1"]


class Growth(nn.Module):
    """The velocity ``c * t * x``; c is the pooled state. In global time its flow is ``x = exp(c * t^2 / 2) * x_0``."""

    def forward(self, x: Tensor, sequence: Tensor, pooled: Tensor, t: Tensor, stage: int) -> Tensor:
        return (pooled * t[:, None])[..., None, None] * x


def micro_batch(stage: int, indices: list[int]) -> MicroBatch:
    n = len(indices)
    return MicroBatch(7, stage, torch.zeros(n, 3, 0, 0), ["dog"] * n, ["a"] * n, indices)


def point_of(path: RectifiedPath, stage: int, indices: list[int], c: float, c_empty: float = 0.0) -> PathPoint:
    """Return the path's points between constant images; they depend on the sample's index."""
    path.teacher = Growth()  # type: ignore[assignment]
    shape = (len(indices), 3, 8, 8)
    number = torch.tensor(indices)[:, None, None, None] + 1.0
    text, empty = (
        TextStates(torch.zeros(n, 2, 4), torch.full((n, 1), v)) for n, v in ((len(indices), c), (1, c_empty))
    )
    encoders: Any = SimpleNamespace(empty_prompt_states=lambda micro: empty)
    draws = rng.sample(3, 7, indices, (1, 1, 1))
    start, end = number.expand(shape), (-2 * number).expand(shape)
    return path(encoders, micro_batch(stage, indices), start, end, text, draws)


@pytest.mark.parametrize("solver", ["heun", "multistep"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("velocity_time", ["global", "local"])
def test_a_step_along_the_target_ends_where_the_teachers_flow_does(
    solver: flow.SolverKind, guidance_scale: float, velocity_time: flow.VelocityTime
) -> None:
    bridge = BridgeFlow([2, 1, 1], 3, velocity_time=velocity_time, shift=True)
    path = RectifiedPath(bridge, 4, DistillationSettings([1, 3, 2], 64, solver, guidance_scale))
    c, c_empty = 0.8, -0.3
    for stage, pieces in enumerate((1, 3, 2)):
        window = bridge.windows[stage]
        x, tau, velocity = point_of(path, stage, list(range(24)), c, c_empty)
        times = bridge.local_times(stage, pieces, tokens=4)
        after = {round(now, 5): later for now, later in pairwise(times)}
        assert {round(now, 5) for now in tau.tolist()} == set(after)
        tau_next = torch.tensor([after[round(now, 5)] for now in tau.tolist()])
        reached = x + (tau_next - tau).view(-1, 1, 1, 1) * window.duration * velocity

        t, t_next = (window.end + one.double() * window.width for one in (tau, tau_next))
        unit = 1 if velocity_time == "global" else 1 / window.width  # the stage's own time runs faster
        guided = (c_empty + guidance_scale * (c - c_empty)) if guidance_scale > 1 else c
        growth = torch.exp(unit * guided * (t_next**2 - t**2) / 2)
        number = torch.arange(24) + 1.0
        expected_x = (3 * tau - 2) * number
        torch.testing.assert_close(x, expected_x.view(-1, 1, 1, 1).expand_as(x))
        torch.testing.assert_close(reached[:, 0, 0, 0].double(), growth * expected_x.double(), rtol=2e-3, atol=1e-4)


def test_pieces_are_drawn_evenly_and_belong_to_the_sample() -> None:
    path = RectifiedPath(BridgeFlow([1, 1], 3), 4, DistillationSettings([4, 1], 1))
    together = point_of(path, 0, list(range(400)), 0.1)
    counts = torch.stack([(together.tau == tau).sum() for tau in (1.0, 0.75, 0.5, 0.25)])
    assert int(counts.sum()) == 400
    assert counts.min() > 70
    alone = point_of(path, 0, [17], 0.1)
    assert all(torch.equal(one[0], many[17]) for one, many in zip(alone, together, strict=True))


# --- runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tiny_module: list[str]) -> Path:
    """A run of two steps, with other weights than it began with."""
    phases = "[{steps: 2, ratio: [4, 2, 2], learning_rate: 0.01}]"
    run([*tiny_module, "--curriculum.phases", phases, "--name", "teacher", "--trainer.val_check_interval", "2"])
    return Path(tiny_module[2]) / "teacher"


def distill(teacher: Path, *more: str, status: int = 0) -> str:
    return lightning(["distill", str(teacher), "--steps", "2", "1", "1", *TRAIN, *SETTINGS, *more], status)


@pytest.fixture(scope="module")
def student(teacher: Path) -> Path:
    """A student that was never interrupted."""
    distill(teacher, "--guidance_scale", "2", "--model.distillation.teacher_steps", "2")
    return teacher.parent / "teacher_distilled_2_1_1"


def test_the_recipe_is_the_teachers_with_another_curriculum_and_sampler(teacher: Path, student: Path) -> None:
    values, before = (Recipe(folder / "recipe.yaml").values() for folder in (student, teacher))
    assert before["model"]["distillation"] is None
    assert values["model"]["distillation"] == {
        "steps": [2, 1, 1],
        "teacher_steps": 2,
        "solver": "multistep",
        "guidance_scale": 2.0,
    }
    assert values["model"]["pretrained"] == str(teacher / "pipelines" / "step=0000002")
    assert [phase["steps"] for phase in values["curriculum"]["phases"]] == [3, 3]
    callbacks = [one.get("init_args") or {} for one in values["trainer"]["callbacks"]]
    samplers = [one["sampler"] for one in callbacks if "sampler" in one]
    assert [one["num_inference_steps"] for one in samplers] == [[2, 1, 1]]
    for key in ("transformer", "bridge", "text_encoder", "optimizer"):
        assert values["model"][key] == before["model"][key]
    assert values["data"] == before["data"]


def test_the_student_is_trained_and_the_teacher_is_in_no_checkpoint(teacher: Path, student: Path) -> None:
    saved = torch.load(Run(student).checkpoint(), weights_only=True)
    assert {name.partition(".")[0] for name in saved["state_dict"]} == {
        "transformer",
        "ema",
        "bridge",
        "running_losses",
    }
    weights = [name for name in saved["state_dict"] if name.startswith("transformer.")]
    assert len(saved["optimizer_states"][0]["state"]) == len(weights)
    start = load_module(Run(teacher)).transformer
    moved = [
        not torch.equal(a, b)
        for a, b in zip(load_module(Run(student)).transformer.parameters(), start.parameters(), strict=True)
    ]
    assert sum(moved) > 0.9 * len(moved)
    exported = load_file(teacher / "pipelines/step=0000002/transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, exported[name]) for name, weight in start.state_dict().items())


def test_an_exported_student_samples_with_its_steps_by_default(student: Path, tmp_path: Path) -> None:
    lightning(["export", str(student), "--output", str(tmp_path / "export")])
    pipeline = NamiPipeline.from_pretrained(tmp_path / "export")
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    handle = pipeline.transformer.register_forward_hook(lambda _, inputs, __: calls.append((inputs[4], len(inputs[0]))))
    by_default = pipeline("dog", generator=torch.Generator().manual_seed(0), output_type="pt").images
    handle.remove()
    assert calls == [(0, 1), (0, 1), (1, 1), (2, 1)]  # without guidance: one row an image
    stated = {"num_inference_steps": [2, 1, 1], "guidance_scale": 1.0, "solver": "euler"}
    images = pipeline("dog", generator=torch.Generator().manual_seed(0), output_type="pt", **stated).images
    assert torch.equal(images, by_default)


def test_a_student_learns_its_teachers_images(teacher: Path) -> None:
    """One step a stage ends nearer to the teacher's 8 than the teacher's own one step does."""
    settings = ["--train_steps", "60", "--model.distillation.teacher_steps", "8", "--name", "learns"]
    lightning(
        ["distill", str(teacher), "--steps", "1", "1", "1", *settings, *SETTINGS, "--trainer.limit_val_batches=0"]
    )
    pipelines = [load_module(Run(folder)).pipeline() for folder in (teacher, teacher.parent / "learns")]
    prompts = ["red apple", "dog face", "house", "flag: France"]

    def draw(pipeline: NamiPipeline, steps: int) -> Tensor:
        states = load_module(Run(teacher)).encode_prompts(prompts)
        images: Tensor = pipeline(
            prompt_embeds=states.sequence,
            pooled_prompt_embeds=states.pooled,
            num_inference_steps=[steps] * 3,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
            output_type="latent",
        ).images
        return images

    wanted = draw(pipelines[0], 8)
    errors = [float((draw(pipeline, 1) - wanted).pow(2).mean()) for pipeline in pipelines]
    assert errors[1] < 0.8 * errors[0]


def test_resumed_it_ends_with_the_same_bits(teacher: Path, student: Path) -> None:
    settings = ["--guidance_scale", "2", "--model.distillation.teacher_steps", "2", "--name", "resumed"]
    rates = "learning_rate: 0.003, warmup_steps: 1"
    distill(teacher, *settings, "--curriculum.phases", f"[{{steps: 2, ratio: [4, 2, 2], {rates}}}]")
    distill(teacher, *settings)
    ends = [numbers(Run(folder).checkpoint()) for folder in (student, student.parent / "resumed")]
    assert same_numbers(*ends) == []


def test_two_processes_with_shards_train_as_one(teacher: Path, student: Path) -> None:
    shards = ["--trainer.devices", "2", "--trainer.strategy", "fsdp2", "--name", "shards"]
    distill(teacher, "--guidance_scale", "2", "--model.distillation.teacher_steps", "2", *shards)
    one, two = (load_module(Run(folder), ema=False).state_dict() for folder in (student, student.parent / "shards"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=5e-5, equal_nan=True, msg=name)


# --- what is refused, and what it costs ----------------------------------------------------------------


def student_recipe(teacher: Path, *more: str) -> Recipe:
    pipeline = teacher / "pipelines" / "step=0000002"
    return Recipe(TINY, ["--model.pretrained", str(pipeline), "--model.distillation.steps", "[1, 1, 1]", *more])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--model.distillation.steps", "[1, 1]"], r"steps \[1, 1\] must have one number for each of the 3 stages"),
        (["--model.distillation.steps", "[1, 0, 1]"], "of at least 1; got"),
        (["--model.distillation.guidance_scale", "0.5"], "of at least 1; got"),
        (["--model.pretrained", "null"], "model.distillation learns from a trained model: name that one"),
    ],
)
def test_settings_that_make_no_sense_are_refused(student: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        student_recipe(student.parent / "teacher", *settings).make_model()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--model.pretrained", "nowhere"], "model.pretrained nowhere is neither a pipeline's folder"),
        (["--model.transformer.init_args.num_single_layers", "[0, 1, 2]"], "num_single_layers is"),
        (
            ["--model.bridge.init_args.window_ratios", "[2, 1, 1]"],
            r"the bridges of its teacher\. .* bridge window_ratios \[1.0, 1.0, 1.0\]",
        ),
        (["--model.bridge.init_args.kernel_size", "3"], "holds no bridges of the recipe's model.bridge"),
    ],
)
def test_another_teacher_is_refused_before_the_first_step(student: Path, settings: list[str], message: str) -> None:
    module = student_recipe(student.parent / "teacher", *settings).make_model()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        module.configure_model()


def test_a_changed_teacher_does_not_resume(teacher: Path, student: Path, tmp_path: Path) -> None:
    moved = tmp_path / "pipeline"
    shutil.copytree(teacher / "pipelines" / "step=0000002", moved)
    file = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"x_embedder.bias": weights["x_embedder.bias"] + 0.01}, file, {"format": "pt"})
    settings = [
        "--recipe",
        str(teacher / "recipe.yaml"),
        "--name",
        student.name,
        "--model.distillation.teacher_steps=2",
    ]
    longer = ["--curriculum.phases", json.dumps([
        {"steps": 3, "ratio": [4, 2, 2], "learning_rate": 0.003, "warmup_steps": 1},
        {"steps": 4, "ratio": [4, 2, 2], "learning_rate": 0.0003, "warmup_steps": 3},
    ])]  # fmt: skip
    assert "does not hold the weights" in distill(moved, *settings, *longer, status=2)


def test_a_pipeline_needs_a_recipe_and_a_teacher_must_be_there(teacher: Path, student: Path) -> None:
    assert "name the recipe of its training by --recipe" in distill(teacher / "pipelines" / "step=0000002", status=2)
    assert "neither a run" in distill(teacher.parent / "teachr", status=2)


def test_the_teachers_work_and_memory_are_counted(student: Path) -> None:
    settings = ["--model.distillation.guidance_scale", "2", "--model.distillation.teacher_steps", "3"]
    recipe = student_recipe(student.parent / "teacher", *settings, "--model.distillation.solver", "heun")
    plain, module = Recipe(TINY).make_model(), recipe.make_model()
    for stage in range(3):
        one, both = sample_flops(plain, stage), sample_flops(module, stage)
        assert both.model == one.model + 12 * one.forward  # 3 steps, two calls a step, with and without the prompt
    options, _ = make_parser().parse_known_args(["plan", str(TINY), "--devices", "2"])
    plans = [
        make_plan(read_setup("tiny", one.parser.instantiate(one.config), options)) for one in (Recipe(TINY), recipe)
    ]
    assert plans[1].memory.frozen - plans[0].memory.frozen == plans[0].memory.weights
    assert plans[1].stages[2].flops.forward == 13 * plans[0].stages[2].flops.forward


def test_the_network_of_the_teacher_is_never_trained(teacher: Path, student: Path) -> None:
    module = student_recipe(teacher).make_model()
    module.configure_model()
    path = module.flow_loss.path
    assert isinstance(path, RectifiedPath)
    assert isinstance(path.teacher, NamiTransformer2DModel)
    assert not any(parameter.requires_grad for parameter in path.teacher.parameters())
    assert not any(parameter is mine for parameter in path.teacher.parameters() for mine in module.parameters())
