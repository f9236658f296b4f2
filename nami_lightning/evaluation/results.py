"""What the benchmarks share: a log of verdicts, confidence intervals, and how scores are printed."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from nami_lightning.utils.text_files import parse_json

Interval: TypeAlias = tuple[float, float] | None
"""The two ends of an interval; None if there are too few values to compute it."""

LEVEL = 0.95
RESAMPLES = 2000
MIN_VALUES = 5
"""Smallest number of values for a bootstrap. With a single value, for example, the interval would have no width."""


class VerdictLog:
    """A file of a judge's verdicts on images, one JSON line each, so that no image is judged twice.

    A verdict belongs to the bytes of an image: an image that is generated again is judged again.

    Args:
        path: the file; it is created with the first verdict.
        judge: names of the judge's models and settings; verdicts of other judges are ignored.

    Attributes:
        judged_on: the machines that gave the verdicts that were asked for.
    """

    def __init__(self, path: Path, judge: Mapping[str, Any]) -> None:
        self.path = path
        self.judge = hashlib.sha256(json.dumps(judge, sort_keys=True).encode()).hexdigest()[:12]
        self.verdicts: dict[str, tuple[Any, str]] = {}
        self.judged_on: set[str] = set()
        if path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        lost = 0
        for line in filter(None, path.read_bytes().split(b"\n")):
            try:
                entry = parse_json(line)
                judge, image, verdict = str(entry["judge"]), str(entry["image"]), entry["verdict"]
                machine = str(entry.get("hardware", "a machine not noted"))
            except (AttributeError, KeyError, TypeError, ValueError):  # an interrupted process wrote a part of it
                lost += 1
                continue
            if judge == self.judge:
                self.verdicts[image] = verdict, machine
        if lost:
            print(f"{path}: {lost:,} line(s) can't be read; their images are judged again")

    def get(self, image: Path, task: Any) -> Any:
        """Return the verdict on an image for a task (any JSON value), or None."""
        verdict, machine = self.verdicts.get(self._key(image, task), (None, None))
        if machine is not None:
            self.judged_on.add(machine)
        return verdict

    def add(self, image: Path, task: Any, verdict: Any) -> None:
        """Append a verdict to the file."""
        key = self._key(image, task)
        machine = describe_hardware()
        self.verdicts[key] = verdict, machine
        self.judged_on.add(machine)
        entry = {"judge": self.judge, "image": key, "file": str(image), "verdict": verdict, "hardware": machine}
        line = json.dumps(entry)
        with self.path.open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(f"{line}\n".encode())

    def _key(self, image: Path, task: Any) -> str:
        return hashlib.sha256(image.read_bytes() + json.dumps(task, sort_keys=True).encode()).hexdigest()


def bootstrap_interval(strata: Sequence[np.ndarray], resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Return a percentile bootstrap interval of the mean of the strata's means; None if one has under 5 values.

    The prompts of each stratum are resampled, and all strata have the same weight. The interval shows how far the score
    would move with other prompts of the same kind, not with another training run.

    Args:
        strata: for each stratum, one value per prompt, in 1 dimension.
        resamples: number of bootstrap resamples; they are the same on every call.
        level: confidence level, in (0, 1).
    """
    if min(map(len, strata)) < MIN_VALUES:
        return None
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1) for values in strata]
    low, high = np.quantile(np.mean(means, axis=0), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def format_percent(value: float) -> str:
    """Return a share in percent with one decimal, as in the paper's Table 4: 83.8."""
    return f"{100 * value:.1f}"


def format_interval(ends: Interval, form: str = ".2f", factor: float = 1) -> str:
    """Return an interval as text, ``0.61 to 0.66`` for example; ``-`` if it is None."""
    return "-" if ends is None else " to ".join(f"{factor * end:{form}}" for end in ends)


def require_package(package: str) -> None:
    """Check that a package of the extra ``evaluate`` is installed.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is needed: pip install 'nami_lightning[evaluate]'")


def describe_hardware() -> str:
    """Return the machine that judges, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
