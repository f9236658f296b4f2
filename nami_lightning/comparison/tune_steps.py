"""Find the solver steps of each stage that give the best images for their cost, on a trained run.

Images of the run's held-out captions are drawn at one setting after the other, with the seeds of its last evaluation,
and measured against the same real images. The search starts with one step a stage and adds steps where they lower the
distance most for their operations.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nami_lightning.metrics import distances
from nami_lightning.metrics.budget import sample_flops
from nami_lightning.metrics.record import EVALUATION, Evaluation
from nami_lightning.runs.load import load_module
from nami_lightning.runs.recipe import Recipe
from nami_lightning.runs.run_dir import Run
from nami_lightning.utils.atomic_write import write_text

GROWTH = 1.5
"""The factor by which the search raises a stage's steps, by at least one."""


@dataclass(frozen=True)
class Setting:
    """A setting of the sampler, and what it was measured at.

    Attributes:
        steps: solver steps of each stage.
        solver: of the steps.
        guidance_scale: one number, 1 being off.
        flops: operations of the network for one image.
        distance: the Frechet distance of the images to the held-out ones.
    """

    steps: tuple[int, ...]
    solver: str
    guidance_scale: float
    flops: float
    distance: float

    @property
    def name(self) -> str:
        """The steps as ``12+6+2``."""
        return "+".join(map(str, self.steps))


Measure = Callable[[tuple[int, ...], str], Setting]


class StepTuner:
    """Draws and measures a run's images at any setting.

    Args:
        run: a run with an evaluation of the callback Metrics.
        guidance_scale: of all settings.
        samples: captions, at most as many as the evaluation has.
        batch_size: images drawn at once.

    Raises:
        FileNotFoundError: the run was never evaluated.
    """

    def __init__(self, run: Run, guidance_scale: float, samples: int | None = None, batch_size: int = 16) -> None:
        evaluation = Evaluation.load(run.folder)
        if evaluation is None:
            raise FileNotFoundError(
                f"{run.folder} has no {EVALUATION}: lightning tune needs a run whose recipe has the callback Metrics"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module = load_module(run)
        self.pipeline = module.pipeline().to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.forward = [sample_flops(module, stage).forward for stage in range(module.num_stages)]
        self.features = _features(Recipe(run.recipe)).to(device)
        self.guidance_scale, self.batch_size, self.name = guidance_scale, batch_size, run.folder.name
        self.real = torch.from_numpy(evaluation.real)
        self.captions, self.seeds = evaluation.captions[:samples], evaluation.seeds[:samples]
        self.measured: dict[tuple[tuple[int, ...], str], Setting] = {}

    def flops(self, steps: Sequence[int], solver: str) -> float:
        """Return the network's operations for one image."""
        calls = (2 if solver == "heun" else 1) * (2 if self.guidance_scale > 1 else 1)
        return calls * sum(number * each for number, each in zip(steps, self.forward, strict=True))

    def __call__(self, steps: tuple[int, ...], solver: str) -> Setting:
        """Draw and measure at a setting, or return what was measured at it before."""
        if (steps, solver) not in self.measured:
            drawn = self._features_of_images(steps, solver)
            frechet = distances.frechet(drawn, self.real)
            distance = frechet(distances.unit_counts(drawn), distances.unit_counts(self.real))
            self.measured[steps, solver] = Setting(
                steps, solver, self.guidance_scale, self.flops(steps, solver), distance
            )
        return self.measured[steps, solver]

    def _features_of_images(self, steps: tuple[int, ...], solver: str) -> Tensor:
        parts = []
        batches = range(0, len(self.captions), self.batch_size)
        for first in tqdm(batches, f"{self.name} {'+'.join(map(str, steps))} {solver}", leave=False):
            batch = slice(first, first + self.batch_size)
            images = self.pipeline(
                list(self.captions[batch]),
                num_inference_steps=list(steps),
                guidance_scale=self.guidance_scale,
                solver=solver,
                generator=[torch.Generator().manual_seed(int(seed)) for seed in self.seeds[batch]],
                output_type="pt",
            ).images
            parts.append(self.features((images * 255).round().byte()).float().cpu())
        return torch.cat(parts)


def search(measure: Measure, stages: int, solvers: Sequence[str], most_steps: int) -> list[Setting]:
    """Raise the steps where they pay most, from one a stage up to a total; return all that was measured.

    Args:
        measure: draws and measures at steps and a solver.
        stages: K.
        solvers: to try at every setting.
        most_steps: of all stages together.
    """

    def best_of(steps: tuple[int, ...]) -> Setting:
        settings = [measure(steps, solver) for solver in solvers]
        seen.extend(settings)
        return min(settings, key=lambda setting: setting.distance)

    seen: list[Setting] = []
    current = best_of((1,) * stages)
    while True:
        raised = [
            tuple(max(n + 1, round(GROWTH * n)) if k == stage else n for k, n in enumerate(current.steps))
            for stage in range(stages)
        ]
        candidates = [best_of(steps) for steps in raised if sum(steps) <= most_steps]
        if not candidates:
            return seen
        before = current
        current = max(candidates, key=lambda one: (before.distance - one.distance) / (one.flops - before.flops))


def front(settings: Sequence[Setting]) -> list[Setting]:
    """Return the settings that no cheaper one is as good as, by their operations."""
    kept: list[Setting] = []
    for setting in sorted(settings, key=lambda one: (one.flops, one.distance)):
        if not kept or setting.distance < kept[-1].distance:
            kept.append(setting)
    return kept


def cheapest(settings: Sequence[Setting], tolerance: float, best: float | None = None) -> Setting | None:
    """Return the cheapest setting within ``tolerance`` of the best distance, of theirs if ``best`` is None."""
    best = min(one.distance for one in settings) if best is None else best
    good = [one for one in settings if one.distance <= best * (1 + tolerance)]
    return min(good, key=lambda one: one.flops) if good else None


def write_front(runs: Mapping[str, Sequence[Setting]], folder: Path) -> list[Path]:
    """Write ``steps.csv`` with all that was measured, and the plot ``steps.png`` and ``.svg`` of the fronts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    from nami_lightning.utils.image_grid import save_figure

    lines = ["run,steps,solver,guidance_scale,flops,frechet,on_front"]
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for number, (name, settings) in enumerate(runs.items()):
        best = front(settings)
        lines += [
            f"{name},{one.name},{one.solver},{one.guidance_scale},{one.flops:.6g},{one.distance:.4f},{one in best}"
            for one in sorted(settings, key=lambda one: one.flops)
        ]
        axes.plot([one.flops for one in best], [one.distance for one in best], "o-", color=f"C{number}", label=name)
        axes.scatter([one.flops for one in settings], [one.distance for one in settings], 8, f"C{number}", alpha=0.4)
        for one in best:
            axes.annotate(one.name, (one.flops, one.distance), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set(xscale="log", xlabel="FLOP an image", ylabel="Frechet distance")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "steps.csv", "\n".join(lines) + "\n")
    path = save_figure(figure, folder / "steps")
    pyplot.close(figure)
    return [folder / "steps.csv", path]


def _features(recipe: Recipe) -> nn.Module:
    """Return the network that the run was measured with."""
    from importlib import import_module

    from nami_lightning.metrics import EfficientNetLite0

    for callback in recipe.config.trainer.callbacks:
        features: Any = callback.init_args.get("features") if callback.class_path.endswith(".Metrics") else None
        if features is not None:
            module, _, name = features.class_path.rpartition(".")
            return getattr(import_module(module), name)(**(features.get("init_args") or {}))
    return EfficientNetLite0()
