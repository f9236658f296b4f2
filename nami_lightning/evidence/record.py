"""What the evaluations of a run leave on disk, for plots and comparisons.

runs/NAME/metrics.jsonl     a line an evaluation: the metrics, and what the training had used by then
runs/NAME/evaluation.npz    the newest evaluation's numbers a sample: what a bootstrap and a grid need
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

METRICS = "metrics.jsonl"
EVALUATION = "evaluation.npz"


@dataclass(frozen=True)
class Entry:
    """One evaluation.

    Attributes:
        step: optimizer steps done.
        samples: of all stages, until then.
        flops: of the network's forward and backward passes, until then.
        seconds: of training alone, over all resumes: steps, waiting for data, fitting the bridges; None if unknown.
        drawn: images drawn.
        metrics: name to value.
    """

    step: int
    samples: int
    flops: int
    seconds: float | None
    drawn: int
    metrics: dict[str, float]


def read_entries(folder: Path) -> list[Entry]:
    """All evaluations of the run in ``folder``, by step; a last line that was cut off is left out.

    Raises:
        ValueError: a line that isn't an evaluation.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    entries: dict[int, Entry] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = Entry(**json.loads(line))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break  # the process ended while it wrote
            raise ValueError(f"{path}, line {number} is not an evaluation: {error}") from error
        entries[entry.step] = entry
    return sorted(entries.values(), key=lambda entry: entry.step)


def write_entries(folder: Path, entries: list[Entry]) -> None:
    """Replace all evaluations, whole or not at all."""
    text = "".join(f"{json.dumps(asdict(entry))}\n" for entry in entries)
    _replace(folder / METRICS, lambda path: path.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class Evaluation:
    """The numbers behind an evaluation.

    Attributes:
        step: when.
        features: the network's name.
        drawn: features ``(n, d)`` of the drawn images.
        real: features ``(m, d)`` of the held-out ones.
        captions: n prompts.
        seeds: n seeds of the noise.
        real_ids: m names.
        of_drawn: metrics that are means over the drawn images, ``(n,)`` each.
        of_real: metrics that are means over the held-out images, ``(m,)`` each.
        images: the first few drawn, uint8 ``(H, W, 3)``.
    """

    step: int
    features: str
    drawn: np.ndarray
    real: np.ndarray
    captions: list[str]
    seeds: list[int]
    real_ids: list[str]
    of_drawn: dict[str, np.ndarray] = field(default_factory=dict)
    of_real: dict[str, np.ndarray] = field(default_factory=dict)
    images: list[np.ndarray] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write it into a run's folder, over an older one, whole or not at all."""
        arrays: dict[str, Any] = {
            name: getattr(self, name) for name in ("step", "features", "captions", "seeds", "real_ids")
        }
        arrays |= {"drawn": self.drawn.astype(np.float32), "real": self.real.astype(np.float32)}
        for group in ("of_drawn", "of_real"):
            arrays |= {f"{group}/{name}": values for name, values in getattr(self, group).items()}
        arrays |= {f"images/{number:04d}": image for number, image in enumerate(self.images)}

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, **arrays)

        _replace(folder / EVALUATION, write)

    @classmethod
    def load(cls, folder: Path) -> "Evaluation | None":
        """The newest evaluation of the run in ``folder``; None if there is none."""
        path = folder / EVALUATION
        if not path.exists():
            return None
        with np.load(path) as arrays:

            def group(name: str) -> dict[str, np.ndarray]:
                return {key.partition("/")[2]: arrays[key] for key in sorted(arrays) if key.startswith(f"{name}/")}

            return cls(
                step=int(arrays["step"]),
                features=str(arrays["features"]),
                drawn=arrays["drawn"],
                real=arrays["real"],
                captions=arrays["captions"].tolist(),
                seeds=arrays["seeds"].tolist(),
                real_ids=arrays["real_ids"].tolist(),
                of_drawn=group("of_drawn"),
                of_real=group("of_real"),
                images=list(group("images").values()),
            )


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write(partial)
    partial.replace(path)
