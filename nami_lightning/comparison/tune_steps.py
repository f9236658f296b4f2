"""Find the solver steps and the guidance of each stage that give the best images for their cost, on a trained run.

Images of the run's held-out captions are drawn at one setting after the other, with the seeds of its last evaluation,
and measured against the same real images. The search starts with one step a stage and makes the one change at a time
that lowers the distance most for its operations.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nami_lightning.metrics import distances
from nami_lightning.metrics.budget import sample_flops
from nami_lightning.metrics.record import EVALUATION, Evaluation
from nami_lightning.runs.export import Export
from nami_lightning.runs.load import load_module
from nami_lightning.runs.recipe import Recipe
from nami_lightning.runs.run_dir import Run, step_of
from nami_lightning.utils.atomic_write import write_json, write_text

GROWTH = 1.5
"""The factor by which the search raises a stage's steps, by at least one."""


@dataclass(frozen=True)
class Setting:
    """A setting of the sampler.

    Attributes:
        steps: solver steps of each stage.
        guidance_scale: of each stage, 1 being off.
        solver: of the steps.
        spacing: of a stage's steps, see :class:`BridgeFlow`'s ``timestep_spacing``.
    """

    steps: tuple[int, ...]
    guidance_scale: tuple[float, ...]
    solver: str
    spacing: str = "even"

    @property
    def name(self) -> str:
        """The steps as ``12+6+2``, and the guidance where a stage has some: ``12+6+2 guided 2+1+1``."""
        steps = "+".join(map(str, self.steps))
        guided = max(self.guidance_scale) > 1
        return f"{steps} guided {'+'.join(f'{scale:g}' for scale in self.guidance_scale)}" if guided else steps


@dataclass(frozen=True)
class Measured:
    """What a setting was measured at.

    Attributes:
        setting: of the sampler.
        flops: operations of the network for one image.
        distance: the Frechet distance of the images to the held-out ones.
    """

    setting: Setting
    flops: float
    distance: float


@dataclass(frozen=True)
class Choices:
    """What the search may choose among; it starts with the first of each.

    Attributes:
        solvers: of the steps.
        guidance_scales: ascending; each stage has one of them.
        spacings: of a stage's steps.
        most_steps: of all stages together.
    """

    solvers: Sequence[str] = ("multistep",)
    guidance_scales: Sequence[float] = (1.0,)
    spacings: Sequence[str] = ("even",)
    most_steps: int = 24

    def first(self, stages: int) -> Setting:
        """Return the cheapest setting: one step a stage."""
        return Setting((1,) * stages, (self.guidance_scales[0],) * stages, self.solvers[0], self.spacings[0])

    def changes(self, setting: Setting) -> Iterator[Setting]:
        """Yield the settings that differ in one thing: a stage's steps or guidance raised, a solver, a spacing."""
        for stage, (number, scale) in enumerate(zip(setting.steps, setting.guidance_scale, strict=True)):
            steps = _replaced(setting.steps, stage, max(number + 1, round(GROWTH * number)))
            if sum(steps) <= self.most_steps:
                yield replace(setting, steps=steps)
            for higher in [one for one in self.guidance_scales if one > scale][:1]:
                yield replace(setting, guidance_scale=_replaced(setting.guidance_scale, stage, higher))
        if max(setting.steps) > 1:  # one step is the same by all
            yield from (replace(setting, solver=one) for one in self.solvers if one != setting.solver)
            yield from (replace(setting, spacing=one) for one in self.spacings if one != setting.spacing)


def _replaced(values: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*values[:place], value, *values[place + 1 :])


Measure = Callable[[Setting], Measured]


class StepTuner:
    """Draws and measures a run's images at any setting.

    Args:
        run: a run with an evaluation of the callback Metrics.
        samples: captions, at most as many as the evaluation has.
        batch_size: images drawn at once.

    Raises:
        FileNotFoundError: the run was never evaluated.
    """

    def __init__(self, run: Run, samples: int | None = None, batch_size: int = 16) -> None:
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
        self.batch_size, self.name = batch_size, run.folder.name
        self.real = torch.from_numpy(evaluation.real)
        self.captions, self.seeds = evaluation.captions[:samples], evaluation.seeds[:samples]
        self.measured: dict[Setting, Measured] = {}

    def flops(self, setting: Setting) -> float:
        """Return the network's operations for one image."""
        calls = [
            (2 if setting.solver == "heun" else 1) * (2 if scale > 1 else 1) * number
            for number, scale in zip(setting.steps, setting.guidance_scale, strict=True)
        ]
        return sum(number * each for number, each in zip(calls, self.forward, strict=True))

    def __call__(self, setting: Setting) -> Measured:
        """Draw and measure at a setting, or return what was measured at it before."""
        if setting not in self.measured:
            drawn = self._features_of_images(setting)
            frechet = distances.frechet(drawn, self.real)
            distance = frechet(distances.unit_counts(drawn), distances.unit_counts(self.real))
            self.measured[setting] = Measured(setting, self.flops(setting), distance)
            place = f"{setting.name} steps, {setting.solver}, {setting.spacing}"
            tqdm.write(f"{self.name}: {place}: {self.flops(setting) / 1e9:.3g} GFLOP an image, distance {distance:.1f}")
        return self.measured[setting]

    def _features_of_images(self, setting: Setting) -> Tensor:
        self.pipeline.bridge.register_to_config(timestep_spacing=setting.spacing)
        parts = []
        batches = range(0, len(self.captions), self.batch_size)
        for first in tqdm(batches, f"{self.name} {setting.name} {setting.solver}", leave=False):
            batch = slice(first, first + self.batch_size)
            images = self.pipeline(
                list(self.captions[batch]),
                num_inference_steps=list(setting.steps),
                guidance_scale=list(setting.guidance_scale),
                solver=setting.solver,
                generator=[torch.Generator().manual_seed(int(seed)) for seed in self.seeds[batch]],
                output_type="pt",
            ).images
            parts.append(self.features((images * 255).round().byte()).float().cpu())
        return torch.cat(parts)


def search(measure: Measure, stages: int, choices: Choices) -> list[Measured]:
    """Make the change that pays most, again and again, until there is none left; return all that was measured.

    A change that costs nothing is made only if it lowers the distance. One that costs operations is made even if it
    does not, for the next one may.

    Args:
        measure: draws and measures at a setting.
        stages: K.
        choices: what there is to choose.
    """
    current = measure(choices.first(stages))
    seen = [current]
    while True:
        found = [measure(setting) for setting in choices.changes(current.setting)]
        seen += found
        free = [one for one in found if one.flops <= current.flops and one.distance < current.distance]
        dearer = [one for one in found if one.flops > current.flops]
        if free:
            current = min(free, key=lambda one: one.distance)
        elif dearer:
            before = current
            current = max(dearer, key=lambda one: (before.distance - one.distance) / (one.flops - before.flops))
        else:
            return list(dict.fromkeys(seen))


def front(settings: Sequence[Measured]) -> list[Measured]:
    """Return the settings that no cheaper one is as good as, by their operations."""
    kept: list[Measured] = []
    for setting in sorted(settings, key=lambda one: (one.flops, one.distance)):
        if not kept or setting.distance < kept[-1].distance:
            kept.append(setting)
    return kept


def cheapest(settings: Sequence[Measured], tolerance: float, best: float | None = None) -> Measured | None:
    """Return the cheapest setting within ``tolerance`` of the best distance, of theirs if ``best`` is None."""
    best = min(one.distance for one in settings) if best is None else best
    good = [one for one in settings if one.distance <= best * (1 + tolerance)]
    return min(good, key=lambda one: one.flops) if good else None


def write_front(runs: Mapping[str, Sequence[Measured]], folder: Path) -> list[Path]:
    """Write ``steps.csv`` with all that was measured, and the plot ``steps.png`` and ``.svg`` of the fronts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    from nami_lightning.utils.image_grid import save_figure

    lines = ["run,steps,guidance_scale,solver,spacing,flops,frechet,on_front"]
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for number, (name, settings) in enumerate(runs.items()):
        best = front(settings)
        lines += [
            f"{name},{_row(one)},{one in best}" for one in sorted(settings, key=lambda one: (one.flops, one.distance))
        ]
        axes.plot([one.flops for one in best], [one.distance for one in best], "o-", color=f"C{number}", label=name)
        axes.scatter([one.flops for one in settings], [one.distance for one in settings], 8, f"C{number}", alpha=0.4)
        for one in best:
            axes.annotate(
                one.setting.name.replace(" guided ", "\nguided "),
                (one.flops, one.distance),
                fontsize=6,
                xytext=(3, 3),
                textcoords="offset points",
            )
    axes.set(xscale="log", xlabel="FLOP an image", ylabel="Frechet distance")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "steps.csv", "\n".join(lines) + "\n")
    path = save_figure(figure, folder / "steps")
    pyplot.close(figure)
    return [folder / "steps.csv", path]


def export(run: Run, setting: Setting, folder: Path) -> None:
    """Write a run's newest checkpoint as a pipeline with the setting as the default of its calls.

    Raises:
        FileExistsError: the folder exists.
    """
    Export(run, step_of(run.checkpoint(None))).write(folder)
    scales = setting.guidance_scale
    defaults = {
        "num_inference_steps": list(setting.steps),
        "guidance_scale": list(scales) if len(set(scales)) > 1 else scales[0],
        "solver": setting.solver,
    }
    files = {"model_index.json": defaults, "bridge/config.json": {"timestep_spacing": setting.spacing}}
    for name, values in files.items():
        written = json.loads((folder / name).read_text(encoding="utf-8"))
        write_json(folder / name, written | values)


def _row(one: Measured) -> str:
    setting = one.setting
    steps, scales = "+".join(map(str, setting.steps)), "+".join(f"{scale:g}" for scale in setting.guidance_scale)
    return f"{steps},{scales},{setting.solver},{setting.spacing},{one.flops:.6g},{one.distance:.4f}"


def _features(recipe: Recipe) -> nn.Module:
    """Return the network that the run was measured with, the first of several."""
    from importlib import import_module

    from nami_lightning.metrics import EfficientNetLite0

    for callback in recipe.config.trainer.callbacks:
        features: Any = callback.init_args.get("features") if callback.class_path.endswith(".Metrics") else None
        features = features[0] if isinstance(features, list) and features else features
        if features:
            module, _, name = features.class_path.rpartition(".")
            return getattr(import_module(module), name)(**(features.get("init_args") or {}))
    return EfficientNetLite0()
