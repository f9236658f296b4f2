"""Compares what runs have recorded: final values, values at an equal budget, and the budget to reach another's best.

It also computes which differences are more than the noise of the metric. Only numbers are here; ``report`` prints them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm.auto import tqdm

from nami_lightning.errors import one_line
from nami_lightning.metrics import distances
from nami_lightning.metrics.record import METRICS, Entry, Evaluation, read_entries
from nami_lightning.runs.lock import is_held
from nami_lightning.runs.old_recipes import upgrade, upgrade_saved
from nami_lightning.runs.run_dir import Run, step_of
from nami_lightning.runs.tensorboard import read_scalars
from nami_lightning.training.rng import derive_seed

AXES: Mapping[str, Callable[[Entry], float | None]] = {
    "steps": lambda entry: entry.step,
    "samples": lambda entry: entry.samples,
    "flops": lambda entry: entry.flops,
    "time": lambda entry: entry.seconds,
}
"""The budgets that runs can be compared by."""

SMALLER_IS_BETTER = tuple(distances.DISTANCES)
LARGER_IS_BETTER = ("precision", "recall", "clip_score", "retrieval")
HEADLINE_METRICS = (*distances.DISTANCES, "clip_score", "retrieval_at_1")
"""Metrics for which a table lists what it takes to reach another run's best value."""

IRRELEVANT_KEYS = (
    *(
        "name",
        "output_dir",
        "import_from",
        "data.init_args.num_workers",
        "data.init_args.prefetch_factor",
        "data.init_args.cache",
    ),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.max_time"),
    *("trainer.logger", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
)
"""Recipe keys that don't change what is trained; two runs that differ only in these have the same recipe."""

STOPPED_AFTER = 600
"""Seconds without a new file after which an unfinished run counts as stopped, if its lock doesn't tell."""

NORMAL_95 = 1.96

MIN_DECISIVE_IMAGES = 6
"""Smallest number of images whose difference can be more than noise, for a metric that is yes or no per image. With
five images, all on one side, the sign test still gives a probability of one in sixteen."""


@dataclass(frozen=True)
class RunRecord:
    """What a run has recorded so far.

    Attributes:
        name: name of the run, unique among the compared runs.
        folder: folder of the run.
        state: state of the run in words: finished, running or stopped, and at which step.
        recipe: the resolved recipe without the keys that don't matter here: name, folder, seed and the like.
        seed: seed of the training; None if the recipe states none.
        entries: evaluations of the run, by step.
        evaluation: data of the newest evaluation; None if there is none.
        losses: validation losses of the run, as (step, value) by name.
    """

    name: str
    folder: Path
    state: str
    recipe: str
    seed: int | None
    entries: list[Entry]
    evaluation: Evaluation | None
    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def value(self, metric: str) -> float | None:
        """Return the value of a metric at the last evaluation; None if there is none."""
        return self.entries[-1].metrics.get(metric) if self.entries else None

    def points(self, metric: str, by: str) -> dict[int, tuple[float, float]]:
        """Return ``(x, value)`` by step, for the evaluations that have both."""
        points = {entry.step: (AXES[by](entry), entry.metrics.get(metric)) for entry in self.entries}
        return {step: (x, y) for step, (x, y) in points.items() if x is not None and y is not None and y == y}

    def curve(self, metric: str, by: str) -> list[tuple[float, float]]:
        """Return ``(x, value)`` of the evaluations that have both."""
        return list(self.points(metric, by).values())

    def loss_curve(self, name: str, by: str) -> list[tuple[float, float]]:
        """Return ``(x, value)`` of a validation loss; nothing if the run doesn't know the budget of its steps.

        The budget is known at the evaluations, and interpolated linearly between them. Losses after the last are left
        out.
        """
        losses = self.losses.get(name, [])
        if by == "steps":
            return [(float(step), value) for step, value in losses]
        known = [(0, 0.0), *((entry.step, x) for entry in self.entries if (x := AXES[by](entry)) is not None)]
        # Lightning logs a validation under the number of the step before it, which starts at 0.
        found = ((value_at(known, step + 1), value) for step, value in losses) if len(known) > 1 else ()
        return [(x, value) for x, value in found if x is not None]

    def budget_used(self, by: str) -> float | None:
        """Return the budget that the run had used at its last evaluation; None if there is none."""
        return AXES[by](self.entries[-1]) if self.entries else None


def load_records(folders: Sequence[Path]) -> list[RunRecord]:
    """Return the records of the runs in ``folders``; a run that is given twice is returned once.

    A run is named by its folder. If two folders have the same name, the whole path is used.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in folders]
    records = []
    for folder, name in zip(folders, names, strict=True):
        entries, evaluation = read_entries(folder), Evaluation.load(folder)
        if not entries or evaluation is None or evaluation.step != entries[-1].step:
            evaluation = None  # it is from a step that a resumed run has not reached again
        unique = str(folder) if names.count(name) > 1 else name
        recipe, total = read_resolved_recipe(Run(folder))
        seed = recipe.pop("seed", None)
        remove_irrelevant(recipe)
        state = describe_state(Run(folder), total)
        losses = read_scalars(folder, lambda tag: tag.startswith("val/") and "_tau_" not in tag)
        records.append(RunRecord(unique, folder, state, yaml.safe_dump(recipe), seed, entries, evaluation, losses))
    return records


def remove_irrelevant(recipe: dict[str, Any]) -> None:
    """Remove from a recipe the keys that don't change what is trained."""
    for path in IRRELEVANT_KEYS:
        _remove(recipe, path.split("."))


def _remove(recipe: Any, keys: Sequence[str]) -> None:
    """Remove a key of a recipe if it is there."""
    if isinstance(recipe, dict) and len(keys) > 1:
        _remove(recipe.get(keys[0]), keys[1:])
    elif isinstance(recipe, dict):
        recipe.pop(keys[0], None)


def read_resolved_recipe(run: Run) -> tuple[dict[str, Any], int]:
    """Return the resolved recipe of a run, and its number of steps.

    Raises:
        ValueError: the file is not a resolved recipe.
    """
    try:
        recipe = upgrade_saved(upgrade(yaml.safe_load(run.recipe.read_text(encoding="utf-8"))))
        return recipe, sum(phase["steps"] for phase in recipe["curriculum"]["phases"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{run.recipe} is not a resolved recipe: {one_line(error)}") from error


def describe_state(run: Run, total: int) -> str:
    """Return the state of a run in words.

    It is ``finished, 60 steps``, ``running, step 20 of 60`` or ``stopped at step 20 of 60 (last written ...)``.
    """
    entries = read_entries(run.folder)
    steps = [step_of(path) for path in run.checkpoints[-1:]] + [entry.step for entry in entries[-1:]]
    step = max(steps, default=0)
    if step >= total:
        return f"finished, {total} steps"
    files = [run.recipe, run.folder / METRICS, *run.checkpoints, *run.folder.glob("events.out.tfevents.*")]
    newest = max(path.stat().st_mtime for path in files if path.exists())
    held = is_held(run.folder)
    if held or (held is None and datetime.now().timestamp() - newest < STOPPED_AFTER):
        return f"running, step {step} of {total}"
    return f"stopped at step {step} of {total} (last written {datetime.fromtimestamp(newest):%Y-%m-%d %H:%M})"


# --- one metric along one axis ---------------------------------------------------------------------


def direction(metric: str) -> int:
    """Return -1 if smaller values of a metric are better, 1 if larger ones are, 0 if neither is."""
    name = metric.partition("/")[2]
    if name.endswith("_of_real"):
        return 0
    return -1 if name.startswith(SMALLER_IS_BETTER) else int(name.startswith(LARGER_IS_BETTER))


def metric_names(records: Sequence[RunRecord]) -> list[str]:
    """Return the names of all metrics that any run has, in the order that they were written."""
    return list(dict.fromkeys(name for record in records for entry in record.entries for name in entry.metrics))


def value_at(curve: Sequence[tuple[float, float]], x: float) -> float | None:
    """Return the value at a budget, interpolated between the evaluations around it; None outside of all evaluations."""
    if not curve or not curve[0][0] <= x <= curve[-1][0]:
        return None
    xs, ys = zip(*curve, strict=True)
    return float(np.interp(x, xs, ys))


def best_point(curve: Sequence[tuple[float, float]], sign: int) -> tuple[float, float] | None:
    """Return the first ``(x, value)`` with the best value; None for an empty curve."""
    return max(curve, key=lambda point: sign * point[1], default=None)


def budget_to_reach(curve: Sequence[tuple[float, float]], target: float, sign: int) -> float | None:
    """Return the smallest budget at which the curve is as good as ``target``; None if it never is.

    It is interpolated between two evaluations. If the first evaluation is already as good, its budget is returned,
    which is an upper bound.
    """
    if curve and sign * curve[0][1] >= sign * target:
        return curve[0][0]
    for (x, y), (x_next, y_next) in pairwise(curve):
        if sign * y_next >= sign * target:
            return x + (x_next - x) * (target - y) / (y_next - y)
    return None


def equal_budget(records: Sequence[RunRecord], by: str) -> float | None:
    """Return the largest budget that all runs with evaluations have used.

    Runs that ended before another run's first evaluation are left out: the other run's value at that budget is unknown.
    """
    ends = [x for record in records if (x := record.budget_used(by)) is not None]
    starts = [x for record in records if record.entries and (x := AXES[by](record.entries[0])) is not None]
    return min((x for x in ends if x >= max(starts)), default=None)


# --- noise -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The difference of two runs in one metric, at their last evaluations.

    Attributes:
        metric: name of the metric.
        one: name of a run.
        other: name of another run.
        value: value of ``one`` minus value of ``other``.
        margin: half of the difference's 95% interval when the generated and held-out images are resampled.
    """

    metric: str
    one: str
    other: str
    value: float
    margin: float

    @property
    def within_noise(self) -> bool:
        """Whether other images of the same two models might show no difference, or the opposite one."""
        return not abs(self.value) > self.margin


def differences(records: Sequence[RunRecord], resamples: int = 200, quiet: bool = False) -> list[Difference]:
    """Return the difference of every two runs, with its margin, in every metric that has a better direction.

    The margin is a bootstrap over generated and held-out images. If two runs have generated the same prompts from the
    same noise, or were measured against the same held-out images, these are resampled together, so that what the runs
    share cancels. Metrics with one value per image (precision, for example) resample these values, with the
    neighbourhoods that they were computed with.
    """
    measured = [record for record in records if record.evaluation is not None and record.entries]
    values = [estimators(record.evaluation) for record in measured if record.evaluation is not None]
    samples: list[dict[str, list[float]]] = [{name: [] for name in estimate} for estimate in values]
    for number in tqdm(range(resamples), "bootstrap", leave=False, disable=quiet or len(measured) < 2):
        for record, estimate, kept in zip(measured, values, samples, strict=True):
            counts = _resample_counts(record.evaluation, number)
            for name, function in estimate.items():
                kept[name].append(function(*counts))
    found = []
    for i, one in enumerate(measured):
        for j, other in list(enumerate(measured))[i + 1 :]:
            for metric in (name for name in values[i] if name in values[j] and direction(name)):
                deviation = np.std(np.subtract(samples[i][metric], samples[j][metric]), ddof=1)
                value = _unweighted(one, values[i][metric]) - _unweighted(other, values[j][metric])
                margin = max(NORMAL_95 * float(deviation), _least_margin(one, metric), _least_margin(other, metric))
                found.append(Difference(metric, one.name, other.name, value, margin))
    return found


def _least_margin(record: RunRecord, metric: str) -> float:
    """Return the smallest margin of a metric that is yes or no for each image; 0 for other metrics."""
    assert record.evaluation is not None
    values_per_image = (record.evaluation.of_drawn | record.evaluation.of_real).get(metric)
    if values_per_image is None or not np.isin(values_per_image, (0, 1)).all():
        return 0.0
    return (MIN_DECISIVE_IMAGES - 0.5) / len(values_per_image)


def comparability_warning(records: Sequence[RunRecord]) -> str:
    """Return why the last evaluations of the runs can't or can hardly be compared; an empty string if they can."""
    measured = [record.evaluation for record in records if record.evaluation is not None and record.entries]
    if len({len(one.drawn) for one in measured}) > 1:
        return "The runs generated different numbers of images, on which distances depend: they can't be compared."
    if len({(*one.real_ids,) for one in measured}) > 1:
        return "The runs were measured against different held-out images: they can't be compared."
    if len({(*one.captions, *one.seeds) for one in measured}) > 1:
        return "The runs generated different prompts, or from different noise: their differences are more random."
    settings = {_measurement_settings(record) for record in records if record.entries}
    if len(settings) > 1:
        return "The runs' Metrics have different settings (guidance, solver, training images, ...): see their recipes."
    return ""


def _measurement_settings(record: RunRecord) -> str:
    """Return a run's settings of the callback Metrics, as text.

    Left out are when it measures, and the number of solver steps: one stage takes as many steps as three stages
    together.
    """
    for callback in (yaml.safe_load(record.recipe).get("trainer") or {}).get("callbacks") or []:
        if str(callback.get("class_path")).endswith("callbacks.Metrics"):
            settings = dict(callback.get("init_args") or {})
            sampler = {**(settings.pop("sampler", None) or {}), "num_inference_steps": None}
            for key in ("every_n_steps", "batch_size", "shown"):
                settings.pop(key, None)
            return yaml.safe_dump([settings, sampler])
    return ""


Estimator = Callable[[torch.Tensor, torch.Tensor], float]


def estimators(evaluation: Evaluation) -> dict[str, Estimator]:
    """Return each metric as a function of how often each generated and each held-out image counts."""
    drawn, real = torch.from_numpy(evaluation.drawn), torch.from_numpy(evaluation.real)
    found: dict[str, Estimator] = {
        f"metrics/{kind}_{evaluation.features}": distance(drawn, real) for kind, distance in distances.DISTANCES.items()
    }
    found |= {name: _mean_estimator(values_per_image, 0) for name, values_per_image in evaluation.of_drawn.items()}
    return found | {name: _mean_estimator(values_per_image, 1) for name, values_per_image in evaluation.of_real.items()}


def _mean_estimator(values_per_image: np.ndarray, side: int) -> Estimator:
    """Return the estimator of a metric with one value per generated image (side 0) or per held-out image (side 1)."""
    return lambda *counts: float(np.average(values_per_image, weights=counts[side]))


def _unweighted(record: RunRecord, estimate: Estimator) -> float:
    assert record.evaluation is not None
    return estimate(*(torch.ones(len(part)) for part in (record.evaluation.drawn, record.evaluation.real)))


def _resample_counts(evaluation: Any, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how often each image counts in a resample; equal for equal images, in whichever run."""
    keys = (str(list(zip(evaluation.captions, evaluation.seeds, strict=True))), str(evaluation.real_ids))
    sizes = (len(evaluation.drawn), len(evaluation.real))
    multinomials = (
        np.random.default_rng(derive_seed("bootstrap", number, key)).multinomial(size, np.full(size, 1 / size))
        for key, size in zip(keys, sizes, strict=True)
    )
    drawn, real = (torch.from_numpy(counts) for counts in multinomials)
    return drawn, real
