"""What an evaluation leaves for programs and people: JSON files, a ledger of verdicts, tables, intervals."""

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

from nami_lightning.utils.atomic_write import replacing

Interval: TypeAlias = tuple[float, float] | None
"""Its ends; None if there is too little to tell."""

LEVEL = 0.95
ROUNDS = 2000
FEWEST = 5
"""Values below which a bootstrap says nothing: of one value it would make an interval without width."""


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


class Ledger:
    """A judge's verdicts on images, one JSON line each, so that none is judged twice, whatever interrupts.

    A verdict holds for an image's bytes: an image that was drawn anew is judged anew.

    Args:
        path: the file; made when the first verdict comes.
        judge: names of the judge's models and settings; another judge's verdicts don't count.

    Attributes:
        judged_on: the machines that gave the verdicts which were asked for.
    """

    def __init__(self, path: Path, judge: Mapping[str, Any]) -> None:
        self.path = path
        self.judge = hashlib.sha256(json.dumps(judge, sort_keys=True).encode()).hexdigest()[:12]
        self.verdicts: dict[str, tuple[Any, str]] = {}
        self.judged_on: set[str] = set()
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # a line that a kill cut short
                    continue
                if entry["judge"] == self.judge:
                    self.verdicts[entry["image"]] = entry["verdict"], entry.get("hardware", "a machine not noted")

    def get(self, image: Path, task: Any) -> Any:
        """The verdict on an image for a task (any JSON value), or None."""
        verdict, machine = self.verdicts.get(self._key(image, task), (None, None))
        if machine is not None:
            self.judged_on.add(machine)
        return verdict

    def add(self, image: Path, task: Any, verdict: Any) -> None:
        """Write a verdict down."""
        key = self._key(image, task)
        machine = hardware()
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


def interval(strata: Sequence[np.ndarray], rounds: int = ROUNDS, level: float = LEVEL) -> Interval:
    """Percentile bootstrap interval of the unweighted mean of the strata's means, prompts drawn anew in each; None if
    any holds fewer than 5.

    It tells how far the score would move with other prompts of the kind, not with another training run.

    Args:
        strata: one value a prompt in each, in 1 dimension.
        rounds: of the bootstrap; always the same draws.
        level: probability.
    """
    if min(map(len, strata)) < FEWEST:
        return None
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=(rounds, len(values)))].mean(axis=1) for values in strata]
    low, high = np.quantile(np.mean(means, axis=0), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def percent(value: float) -> str:
    """A share as Table 4 prints it: 83.8."""
    return f"{100 * value:.1f}"


def span(ends: Interval, form: str = ".2f", times: float = 1) -> str:
    """An interval as text: ``0.61 to 0.66``."""
    return "-" if ends is None else " to ".join(f"{times * end:{form}}" for end in ends)


def need(package: str) -> None:
    """Refuse to go on without a package of the extra ``evaluate``.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is needed: pip install 'nami_lightning[evaluate]'")


def hardware() -> str:
    """The machine that judges, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
