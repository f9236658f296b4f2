"""The evaluations of a run, as they are written into its folder for plots and comparisons.

runs/NAME/metrics.jsonl     one line per evaluation: the metrics, and the budget that training had used by then
runs/NAME/evaluation.npz    the newest evaluation's features and values per sample, for a bootstrap and a grid of images
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from nami_lightning.utils.atomic_write import replacing, write_text
from nami_lightning.utils.text_files import parse_json

METRICS = "metrics.jsonl"
EVALUATION = "evaluation.npz"


@dataclass(frozen=True)
class Entry:
    """One evaluation of a run, a line of ``metrics.jsonl``; the attributes are its keys.

    Attributes:
        step: number of optimizer steps done.
        samples: number of samples used until then, over all stages.
        flops: operations of the network's forward and backward passes until then.
        seconds: seconds of training alone, over all resumed parts: steps, waiting for data, fitting the bridges; None
            if unknown.
        drawn: number of images that were generated.
        metrics: value of each metric, by its name.
    """

    step: int
    samples: int
    flops: int
    seconds: float | None
    drawn: int
    metrics: dict[str, float]


def read_entries(folder: Path) -> list[Entry]:
    """Return all evaluations of the run in ``folder``, by step; an incomplete last line is left out.

    Raises:
        ValueError: a line isn't an evaluation.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    entries: dict[int, Entry] = {}
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = Entry(**parse_json(line))
            entry = replace(entry, metrics={name: float(value) for name, value in entry.metrics.items()})
            sum((entry.step, entry.samples, entry.flops, entry.drawn, entry.seconds or 0.0))
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines) > 1:
                break  # the process ended while it wrote this line
            raise ValueError(f"{path}, line {number} is not an evaluation: {error}") from error
        entries[entry.step] = entry
    return sorted(entries.values(), key=lambda entry: entry.step)


def write_entries(folder: Path, entries: list[Entry]) -> None:
    """Replace all evaluations of a run; the file is written completely or not at all."""
    text = "".join(f"{json.dumps(asdict(entry))}\n" for entry in entries)
    write_text(folder / METRICS, text)


@dataclass(frozen=True)
class Evaluation:
    """The features and values per sample that an evaluation was computed from.

    Attributes:
        step: number of optimizer steps done.
        features: name of the network of the features.
        drawn: features ``(n, d)`` of the generated images.
        real: features ``(m, d)`` of the held-out images.
        captions: n prompts.
        seeds: n seeds of the noise.
        real_ids: m names of the held-out images.
        of_drawn: metrics that are means over the generated images, with values ``(n,)`` each.
        of_real: metrics that are means over the held-out images, with values ``(m,)`` each.
        images: the first few generated images, uint8 ``(H, W, 3)``.
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
        """Write the evaluation into a run's folder, completely or not at all; it replaces an older one."""
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
        """Return the newest evaluation of the run in ``folder``; None if there is none.

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
