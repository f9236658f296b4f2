"""What runs have shown, side by side: final values, values at an equal budget, what one needs to reach another's best,
and which differences are more than the noise of the metric. Numbers only; ``report`` shows them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm.auto import tqdm

from nami_lightning.metrics import distances
from nami_lightning.metrics.record import METRICS, Entry, Evaluation, read_entries
from nami_lightning.runs.lock import is_held
from nami_lightning.runs.run_dir import Run, step_of
from nami_lightning.training.rng import seed_of

AXES: Mapping[str, Callable[[Entry], float | None]] = {
    "steps": lambda entry: entry.step,
    "samples": lambda entry: entry.samples,
    "flops": lambda entry: entry.flops,
    "time": lambda entry: entry.seconds,
}
"""What runs can be compared by."""

SMALLER_IS_BETTER = tuple(distances.DISTANCES)
LARGER_IS_BETTER = ("precision", "recall", "clip_score", "retrieval")
HEADLINES = (*distances.DISTANCES, "clip_score", "retrieval_at_1")
"""The metrics whose budgets to reach another run's best are listed."""

APART = (
    *("name", "output_dir", "data.init_args.num_workers", "data.init_args.prefetch_factor", "data.init_args.cache"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.max_time"),
)
"""Keys that tell apart runs of one recipe: they change nothing of what is trained."""

AT_REST = 600
"""Seconds without a new file after which an unfinished run is taken for stopped, if its lock does not tell."""

NORMAL_95 = 1.96

FEWEST_THAT_TELL = 6
"""Of a metric that is a yes or no for each image, a difference that fewer images make is never beyond the noise: of
five, all on one side, the sign test still says one chance in sixteen."""


@dataclass(frozen=True)
class RunRecord:
    """A run as far as it has come.

    Attributes:
        name: unique among the compared.
        folder: of the run.
        state: for people: finished, running or stopped, and where.
        recipe: the resolved recipe, without what tells apart runs of one: name, folder and seed.
        seed: of its training; None if its recipe states none.
        entries: its evaluations, by step.
        evaluation: the numbers behind the newest; None if there is none.
    """

    name: str
    folder: Path
    state: str
    recipe: str
    seed: int | None
    entries: list[Entry]
    evaluation: Evaluation | None

    def value(self, metric: str) -> float | None:
        """At the last evaluation."""
        return self.entries[-1].metrics.get(metric) if self.entries else None

    def points(self, metric: str, by: str) -> dict[int, tuple[float, float]]:
        """Step to ``(x, value)``, of the evaluations that have both."""
        points = {entry.step: (AXES[by](entry), entry.metrics.get(metric)) for entry in self.entries}
        return {step: (x, y) for step, (x, y) in points.items() if x is not None and y is not None and y == y}

    def curve(self, metric: str, by: str) -> list[tuple[float, float]]:
        """``(x, value)`` of the evaluations that have both."""
        return list(self.points(metric, by).values())

    def end(self, by: str) -> float | None:
        """What it had used at its last evaluation."""
        return AXES[by](self.entries[-1]) if self.entries else None


def load_records(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in ``folders``, named by their folders, and by more of the path where two are called the same.

    A run that is given twice is taken once.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in folders]
    records = []
    for folder, name in zip(folders, names, strict=True):
        entries, evaluation = read_entries(folder), Evaluation.load(folder)
        if not entries or evaluation is None or evaluation.step != entries[-1].step:
            evaluation = None  # of steps that a resume has not reached again
        unique = str(folder) if names.count(name) > 1 else name
        recipe, total = read_recipe(Run(folder))
        seed = recipe.pop("seed", None)
        for path in APART:
            _remove(recipe, path.split("."))
        state = state_of(Run(folder), total)
        records.append(RunRecord(unique, folder, state, yaml.safe_dump(recipe), seed, entries, evaluation))
    return records


def _remove(recipe: Any, keys: Sequence[str]) -> None:
    """A key of a recipe, if it is there."""
    if isinstance(recipe, dict) and len(keys) > 1:
        _remove(recipe.get(keys[0]), keys[1:])
    elif isinstance(recipe, dict):
        recipe.pop(keys[0], None)


def read_recipe(run: Run) -> tuple[dict[str, Any], int]:
    """A run's resolved recipe, and how many steps it asks for.

    Raises:
        ValueError: its file isn't one.
    """
    try:
        recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
        return recipe, sum(phase["steps"] for phase in recipe["curriculum"]["phases"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{run.recipe} can't be read as a resolved recipe: {' '.join(str(error).split())}") from error


def state_of(run: Run, total: int) -> str:
    """``finished, 60 steps``, ``running, step 20 of 60`` or ``stopped at step 20 of 60 (last written ...)``."""
    entries = read_entries(run.folder)
    steps = [step_of(path) for path in run.checkpoints[-1:]] + [entry.step for entry in entries[-1:]]
    step = max(steps, default=0)
    if step >= total:
        return f"finished, {total} steps"
    files = [run.recipe, run.folder / METRICS, *run.checkpoints, *run.folder.glob("events.out.tfevents.*")]
    newest = max(path.stat().st_mtime for path in files if path.exists())
    held = is_held(run.folder)
    if held or (held is None and datetime.now().timestamp() - newest < AT_REST):
        return f"running, step {step} of {total}"
    return f"stopped at step {step} of {total} (last written {datetime.fromtimestamp(newest):%Y-%m-%d %H:%M})"


# --- one metric along one axis ---------------------------------------------------------------------


def direction(metric: str) -> int:
    """-1 where smaller is better, 1 where larger is, 0 for a check that has no better."""
    name = metric.partition("/")[2]
    if name.endswith("_of_real"):
        return 0
    return -1 if name.startswith(SMALLER_IS_BETTER) else int(name.startswith(LARGER_IS_BETTER))


def metrics_of(records: Sequence[RunRecord]) -> list[str]:
    """All metrics that any run has, in the order they were written."""
    return list(dict.fromkeys(name for record in records for entry in record.entries for name in entry.metrics))


def value_at(curve: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value at a budget, straight between the evaluations around it; None outside them."""
    if not curve or not curve[0][0] <= x <= curve[-1][0]:
        return None
    xs, ys = zip(*curve, strict=True)
    return float(np.interp(x, xs, ys))


def best(curve: Sequence[tuple[float, float]], sign: int) -> tuple[float, float] | None:
    """The first ``(x, value)`` with the best value."""
    return max(curve, key=lambda point: sign * point[1], default=None)


def reached(curve: Sequence[tuple[float, float]], target: float, sign: int) -> float | None:
    """The budget at which the curve first is as good as ``target``, straight between evaluations; None if never.

    Where already the first evaluation is, that one's: an upper bound.
    """
    if curve and sign * curve[0][1] >= sign * target:
        return curve[0][0]
    for (x, y), (x_next, y_next) in pairwise(curve):
        if sign * y_next >= sign * target:
            return x + (x_next - x) * (target - y) / (y_next - y)
    return None


def equal_budget(records: Sequence[RunRecord], by: str) -> float | None:
    """The largest budget that all runs with evaluations have used, those left aside that ended before another's first
    evaluation: nothing is known of that one there."""
    ends = [x for record in records if (x := record.end(by)) is not None]
    starts = [x for record in records if record.entries and (x := AXES[by](record.entries[0])) is not None]
    return min((x for x in ends if x >= max(starts)), default=None)


# --- noise -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The last evaluations of two runs in one metric.

    Attributes:
        metric: which.
        one: name of a run.
        other: name of another.
        value: one's less the other's.
        margin: half of the 95% interval of it, when the drawn and held-out images are resampled.
    """

    metric: str
    one: str
    other: str
    value: float
    margin: float

    @property
    def within_noise(self) -> bool:
        """Whether other images of the same two models might well show no difference, or the opposite one."""
        return not abs(self.value) > self.margin


def differences(records: Sequence[RunRecord], resamples: int = 200, quiet: bool = False) -> list[Difference]:
    """The difference of every two runs in every metric that has a better, with its margin.

    A bootstrap over drawn and held-out images. Runs that drew the same prompts from the same noise, or were measured
    against the same held-out images, are resampled together, so what they share cancels. What is one number an image
    (precision, say) is resampled as such, with the neighbourhoods that it was found with.
    """
    measured = [record for record in records if record.evaluation is not None and record.entries]
    values = [estimators(record.evaluation) for record in measured if record.evaluation is not None]
    samples: list[dict[str, list[float]]] = [{name: [] for name in estimate} for estimate in values]
    for number in tqdm(range(resamples), "bootstrap", leave=False, disable=quiet or len(measured) < 2):
        for record, estimate, kept in zip(measured, values, samples, strict=True):
            counts = _counts(record.evaluation, number)
            for name, function in estimate.items():
                kept[name].append(function(*counts))
    found = []
    for i, one in enumerate(measured):
        for j, other in list(enumerate(measured))[i + 1 :]:
            for metric in (name for name in values[i] if name in values[j] and direction(name)):
                spread = np.std(np.subtract(samples[i][metric], samples[j][metric]), ddof=1)
                value = _at_evaluation(one, values[i][metric]) - _at_evaluation(other, values[j][metric])
                margin = max(NORMAL_95 * float(spread), _least_margin(one, metric), _least_margin(other, metric))
                found.append(Difference(metric, one.name, other.name, value, margin))
    return found


def _least_margin(record: RunRecord, metric: str) -> float:
    """Of a metric that is a yes or no for each image, what so few images make that no test could tell."""
    assert record.evaluation is not None
    numbers = (record.evaluation.of_drawn | record.evaluation.of_real).get(metric)
    if numbers is None or not np.isin(numbers, (0, 1)).all():
        return 0.0
    return (FEWEST_THAT_TELL - 0.5) / len(numbers)


def comparable(records: Sequence[RunRecord]) -> str:
    """What keeps the runs' last evaluations from being compared; nothing if all is well."""
    measured = [record.evaluation for record in records if record.evaluation is not None and record.entries]
    if len({len(one.drawn) for one in measured}) > 1:
        return "The runs drew different numbers of images, on which distances depend: they can't be compared."
    if len({(*one.real_ids,) for one in measured}) > 1:
        return "The runs were measured against different held-out images: they can't be compared."
    if len({(*one.captions, *one.seeds) for one in measured}) > 1:
        return "The runs drew different prompts, or from different noise: chance has a larger part in differences."
    settings = {_measuring(record) for record in records if record.entries}
    if len(settings) > 1:
        return "The runs' Metrics have different settings (guidance, solver, training images, ...): see their recipes."
    return ""


def _measuring(record: RunRecord) -> str:
    """How a run is measured, but for when, and with how many steps: one stage takes as many as three have in all."""
    for callback in (yaml.safe_load(record.recipe).get("trainer") or {}).get("callbacks") or []:
        if str(callback.get("class_path")).endswith("callbacks.Metrics"):
            settings = dict(callback.get("init_args") or {})
            drawing = {**(settings.pop("drawing", None) or {}), "num_inference_steps": None}
            for key in ("every_n_steps", "batch_size", "shown"):
                settings.pop(key, None)
            return yaml.safe_dump([settings, drawing])
    return ""


Estimator = Callable[[torch.Tensor, torch.Tensor], float]


def estimators(evaluation: Evaluation) -> dict[str, Estimator]:
    """Each metric as a function of how often each drawn and each held-out image counts."""
    drawn, real = torch.from_numpy(evaluation.drawn), torch.from_numpy(evaluation.real)
    found: dict[str, Estimator] = {
        f"metrics/{kind}_{evaluation.features}": distance(drawn, real) for kind, distance in distances.DISTANCES.items()
    }
    found |= {name: _mean(numbers, 0) for name, numbers in evaluation.of_drawn.items()}
    return found | {name: _mean(numbers, 1) for name, numbers in evaluation.of_real.items()}


def _mean(numbers: np.ndarray, side: int) -> Estimator:
    """Of one number a drawn image (side 0) or a held-out one (side 1)."""
    return lambda *counts: float(np.average(numbers, weights=counts[side]))


def _at_evaluation(record: RunRecord, estimate: Estimator) -> float:
    assert record.evaluation is not None
    return estimate(*(torch.ones(len(part)) for part in (record.evaluation.drawn, record.evaluation.real)))


def _counts(evaluation: Any, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for the same images, whichever run they are of."""
    keys = (str(list(zip(evaluation.captions, evaluation.seeds, strict=True))), str(evaluation.real_ids))
    sizes = (len(evaluation.drawn), len(evaluation.real))
    draws = (
        np.random.default_rng(seed_of("bootstrap", number, key)).multinomial(size, np.full(size, 1 / size))
        for key, size in zip(keys, sizes, strict=True)
    )
    drawn, real = (torch.from_numpy(counts) for counts in draws)
    return drawn, real
