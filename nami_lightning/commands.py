"""What the commands of ``lightning`` do; imported only when one runs, since it imports everything."""

import logging
import os
import shutil
import warnings
from argparse import Namespace
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from nami_lightning.models.pipeline import NamiPipeline
from nami_lightning.runs.load import load_pipeline
from nami_lightning.runs.lock import hold
from nami_lightning.runs.rank_logs import join_after_restart, output_of_rank
from nami_lightning.runs.recipe import Recipe
from nami_lightning.runs.run_dir import Run, find_run
from nami_lightning.training.curriculum import Curriculum
from nami_lightning.training.module import NamiModule
from nami_lightning.training.strategies import FSDP2Strategy
from nami_lightning.utils.atomic_write import replacing
from nami_lightning.utils.image_grid import caption_grid, save_image

NOISE = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers which may be a bottleneck.*",
    r".*Starting from v1.9.0, `tensorboardX` has been removed.*",
    r".*FSDP2-wrapped module .* returned a view tensor.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*`local_dir_use_symlinks` argument is deprecated.*",
    r".*your dataloader is not resumable.*",  # the position in the data is the step's number
)


def quieten_libraries() -> None:
    """Drop what libraries say of their own inner workings, and their advertisements."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(words in record.getMessage() for words in ("Tip:", "`max_epochs=1` reached"))
    )


def run(options: Namespace) -> None:
    """Train a recipe, from the newest checkpoint of its run if there is one."""
    quieten_libraries()
    recipe = Recipe(options.recipe, options.overrides)
    this = Run(recipe.folder)
    model, data, trainer = recipe.make()
    fresh = options.fresh and not is_restart()
    if fresh and (aside := set_aside(this)):
        rank_zero_info(f"Starting over; the old run is now {aside}")
    alone = hold(this.folder) if trainer.global_rank == 0 else nullcontext()
    with output_of_rank(trainer.global_rank, this.folder / "logs"), alone:
        train(this, recipe, model, data, trainer, fresh)


def train(
    this: Run, recipe: Recipe, model: NamiModule, data: L.LightningDataModule, trainer: L.Trainer, fresh: bool
) -> None:
    """Go on from the newest checkpoint, or begin."""
    # With --fresh another rank may not have renamed the old run yet: don't look at it.
    newest = None if fresh else this.load_newest()
    if newest is None:
        rank_zero_info(
            f"New run {this.folder}: {model.curriculum.total_steps} steps in {len(model.curriculum.phases)} phases"
        )
    else:
        path, checkpoint = newest
        model.check_checkpoint(checkpoint)
        where = describe(model.curriculum, checkpoint["nami"]["step"])
        if checkpoint["nami"]["step"] >= model.curriculum.total_steps:
            rank_zero_info(
                f"{this.folder} is finished ({where}). Draw with: lightning sample {this.folder} --prompt '...'"
            )
            return
        if path.is_dir() and not isinstance(trainer.strategy, FSDP2Strategy):
            raise ValueError(
                f"{path} was written by FSDP2Strategy: resume with it as trainer.strategy (on one device too)"
            )
        rank_zero_info(f"Resuming {this.folder} from {where}, checkpoint {path.name}")

    write_recipe(this, recipe.dump())
    join_after_restart(trainer.strategy)
    trainer.fit(model, data, ckpt_path=newest[0] if newest else None, weights_only=True)
    if model.step < model.curriculum.total_steps:
        rank_zero_info(f"Stopped at {describe(model.curriculum, model.step)}. The same command goes on.")
    else:
        rank_zero_info(f"Done. Samples: {this.folder / 'samples'}  Curves: tensorboard --logdir {this.folder.parent}")


def is_restart() -> bool:
    """Whether torchrun or SLURM started this job again after a failure: it must go on, whatever its command says."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(int(count) > 0 for count in counts)


@rank_zero_only
def set_aside(this: Run) -> Path | None:
    """Rename the old run, on the first rank alone."""
    return this.set_aside()


@rank_zero_only
def write_recipe(this: Run, text: str) -> None:
    """Write the resolved recipe, whole or not at all."""
    with replacing(this.recipe) as partial:
        partial.write_text(text)


def describe(curriculum: Curriculum, step: int) -> str:
    """``step 600 of 900, phase 2 of 3``."""
    phase = curriculum.phase_index(min(step, curriculum.total_steps - 1)) + 1
    return f"step {step} of {curriculum.total_steps}, phase {phase} of {len(curriculum.phases)}"


BENCH_OPTIONS: dict[str, dict[str, Any]] = {
    "step": {"steps": 20, "strategy": None, "devices": None},
    "sample": {"steps": 10, "batch_size": 1, "rounds": 5},
    "data": {"batch_size": 32, "workers": 2, "samples": 1024, "rounds": 5, "images": None},
}
"""The options of each benchmark, and their defaults; the paper's Table 2 draws one image with ten steps a stage."""


def bench(options: Namespace) -> None:
    """Measure; nothing is written but the data set, if it isn't there.

    Raises:
        ValueError: an option of another benchmark.
    """
    quieten_libraries()
    module = {"step": "train_step", "sample": "sampling", "data": "data_loading"}[options.what]
    own = BENCH_OPTIONS[options.what]
    for key in sorted({key for of_one in BENCH_OPTIONS.values() for key in of_one}):
        if getattr(options, key) is None:
            setattr(options, key, own.get(key))
        elif key not in own:
            raise ValueError(f"--{key} is not an option of: lightning bench {options.what}")
    getattr(import_module(f"nami_lightning.benchmarks.{module}"), options.what)(options)


def plan(options: Namespace) -> None:
    """Say what a recipe needs."""
    from nami_lightning.planning import command

    quieten_libraries()
    command.plan(options)


def data(options: Namespace) -> None:
    """Run a command of ``lightning data``."""
    from nami_lightning import data_commands

    quieten_libraries()
    getattr(data_commands, options.what)(options)


def evaluate(options: Namespace) -> None:
    """Run benchmarks of generation."""
    from nami_lightning import evaluate_commands

    quieten_libraries()
    evaluate_commands.evaluate(options)


def compare(options: Namespace) -> None:
    """Put runs side by side."""
    write_comparison([find_run(name).folder for name in options.runs], options, options.by, options.output)


def sweep(options: Namespace) -> None:
    """Train a list of recipes, then compare those that left a run.

    Raises:
        RuntimeError: naming the runs that failed.
    """
    from nami_lightning.comparison.sweep import find_sweep, train_all

    path = find_sweep(options.file)
    file, failed = train_all(path)
    folders = [Path(file.output_dir) / run.name for run in file.runs]
    there = [folder for folder in folders if Run(folder).recipe.exists()]
    if there:
        output = options.output or str(Path(file.output_dir) / "comparisons" / path.stem)
        write_comparison(there, options, file.by, output)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}; the same command goes on with what isn't finished")


def write_comparison(folders: list[Path], options: Namespace, by: str, output: str | None) -> None:
    """Compare the runs in ``folders``, print the tables, and say where the rest is."""
    from nami_lightning.comparison.compare import differences, load_records
    from nami_lightning.comparison.page import write

    target = Path(output or "comparison")
    target.mkdir(parents=True, exist_ok=True)
    records = load_records(folders)
    tables = write(records, by, target, differences(records, options.resamples) if options.resamples else [])
    print("\n\n".join(table.text() for table in tables))
    print(f"\nPage: {target / 'index.html'}  Overlay: tensorboard --logdir {target / 'tensorboard'}")


def export(options: Namespace) -> None:
    """Write a checkpoint as a pipeline's folder."""
    from nami_lightning.export import export

    quieten_libraries()
    folder = export(options)
    print(
        f"{folder}: load it with NamiPipeline.from_pretrained, or draw with: lightning sample {folder} --prompt '...'"
    )


def launch(options: Namespace) -> None:
    """Write the script that starts a recipe on a cluster."""
    from nami_lightning.launch import slurm

    script = slurm(options)
    if options.output is None:
        print(script, end="")
    else:
        Path(options.output).write_text(script)
        print(f"Submit it with: sbatch {options.output}")


def sample(options: Namespace) -> None:
    """Draw prompts with a run's or a saved pipeline's model; one PNG an image, and a grid of all."""
    prompts = list(options.prompt)
    if options.prompts:
        prompts += [
            line.strip() for line in Path(options.prompts).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    if not prompts:
        raise ValueError("nothing to draw: give --prompt TEXT, or --prompts FILE with one prompt a line")
    pipeline = load_pipeline(options.run)
    if not isinstance(pipeline, NamiPipeline):
        raise ValueError(f"{options.run} is a {type(pipeline).__name__}; only a NAMI can be sampled here")
    prompts = [prompt for prompt in prompts for _ in range(options.images)]
    pictures: list[Any] = []
    for first in range(0, len(prompts), options.batch_size):
        batch = prompts[first : first + options.batch_size]
        seeds = range(options.seed + first, options.seed + first + len(batch))
        pictures += pipeline(
            batch,
            negative_prompt=options.negative_prompt,
            num_inference_steps=options.steps[0] if len(options.steps) == 1 else options.steps,
            guidance_scale=options.guidance_scale,
            solver=options.solver,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
    out = Path(options.out)
    for i, picture in enumerate(pictures):
        save_image(picture, out / f"{i:05d}.png")
    save_image(caption_grid(pictures, prompts, options.columns), out / "grid.png")
    print(f"{len(pictures)} image(s) and grid.png in {out}")


def show(options: Namespace) -> None:
    """Print what a run is: how far it is, its last losses, where its files lie."""
    this = find_run(options.run)
    recipe = Recipe(this.recipe)
    newest = this.load_newest()
    curriculum = recipe.parser.instantiate(recipe.config).curriculum
    rows = {"run": str(this.folder), "model": recipe.config.model.transformer.class_path}
    rows["progress"] = describe(curriculum, newest[1]["nami"]["step"] if newest else 0)
    rows |= {tag: f"{value:.4f} (step {step})" for tag, (step, value) in last_scalars(this.folder).items()}
    rows["checkpoints"] = ", ".join(path.name for path in this.checkpoints) or "none yet"
    samples = sorted((this.folder / "samples").glob("*.png"))
    rows["newest samples"] = str(samples[-1]) if samples else "none yet"
    rows["recipe"] = str(this.recipe)
    rows["curves"] = f"tensorboard --logdir {this.folder.parent}"
    width = min(max(map(len, rows)), shutil.get_terminal_size().columns // 2)
    for key, value in rows.items():
        print(f"{key:{width}}  {value}")


def last_scalars(folder: Path) -> dict[str, tuple[int, float]]:
    """The newest loss and metric of each name in a run's TensorBoard events: (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 1, "images": 1})
    events.Reload()
    kinds = ("train/loss", "val/", "metrics/", "probe/")
    tags = [tag for tag in sorted(events.Tags()["scalars"]) if tag.startswith(kinds) and "_tau_" not in tag]
    return {tag: (newest.step, newest.value) for tag in tags for newest in events.Scalars(tag)[-1:]}
