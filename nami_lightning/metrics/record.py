"""What the evaluations of a run leave on disk, for plots and comparisons.

runs/NAME/metrics.jsonl     a line an evaluation: the metrics, and what the training had used by then
runs/NAME/evaluation.npz    the newest evaluation's numbers a sample: what a bootstrap and a grid need
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from nami_lightning.utils.atomic_write import replacing

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
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = Entry(**json.loads(line))
            entry = replace(entry, metrics={name: float(value) for name, value in entry.metrics.items()})
            sum((entry.step, entry.samples, entry.flops, entry.drawn, entry.seconds or 0.0))
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines) > 1:
                break  # the process ended while it wrote
            raise ValueError(f"{path}, line {number} is not an evaluation: {error}") from error
        entries[entry.step] = entry
    return sorted(entries.values(), key=lambda entry: entry.step)


def write_entries(folder: Path, entries: list[Entry]) -> None:
    """Replace all evaluations, whole or not at all."""
    text = "".join(f"{json.dumps(asdict(entry))}\n" for entry in entries)
    with replacing(folder / METRICS) as partial:
        partial.write_text(text, encoding="utf-8")


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

        with replacing(folder / EVALUATION) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, folder: Path) -> "Evaluation | None":
        """The newest evaluation of the run in ``folder``; None if there is none.

        Raises:
            ValueError: its file is damaged.
        """
        path = folder / EVALUATION
        if not path.exists():
            return None
        try:
            return cls._read(path)
        except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it; the next evaluation writes it") from error

    @classmethod
    def _read(cls, path: Path) -> "Evaluation":
        with np.load(path) as arrays:

            def group(name: str) -> dict[str, np.ndarray]:
                return {key.partition("/")[2]: arrays[key] for key in sorted(arrays) if key.startswith(f"{name}/")}

            evaluation = cls(
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
        lengths = {len(evaluation.drawn), len(evaluation.captions), len(evaluation.seeds)}
        if len(lengths) > 1 or len(evaluation.real) != len(evaluation.real_ids):
            raise ValueError("its lists are of different lengths")
        return evaluation
