"""Images to draw, a row each: from text, JSON lines or CSV."""

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any, get_args

from nami_lightning.models.flow import SolverKind
from nami_lightning.utils.text_files import parse_json, read_lines, read_text


@dataclass(frozen=True)
class ImageRow:
    """An image to draw; what is None is left to the command, and then to the pipeline.

    Attributes:
        prompt: what to draw.
        seed: of the image's noise.
        negative_prompt: what guidance leads away from.
        height: in px.
        width: in px.
        steps: solver steps: a total, or one number a stage.
        guidance_scale: one number, or one a stage.
        solver: of the steps.
        place: file and line that it was read from, for messages; empty if it comes from no file.
    """

    prompt: str
    seed: int | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    steps: int | list[int] | None = None
    guidance_scale: float | list[float] | None = None
    solver: str | None = None
    place: str = field(default="", compare=False)

    def over(self, defaults: dict[str, Any]) -> "ImageRow":
        """Return the row with ``defaults`` where it says nothing."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    @property
    def asked(self) -> dict[str, Any]:
        """The row by the names of a file's keys; what is left to the pipeline is None."""
        values = asdict(self)
        del values["place"]
        return values

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of a pipeline's call that images of one batch share; what is None is left out."""
        values = {"num_inference_steps" if name == "steps" else name: value for name, value in self.asked.items()}
        own = ("prompt", "seed", "negative_prompt")
        return {name: value for name, value in values.items() if value is not None and name not in own}


# --- files of rows -----------------------------------------------------------------------------


def read_rows(path: Path) -> list[ImageRow]:
    """Return the rows of a file: ``.jsonl``, ``.csv`` with a header, or text with one prompt a line.

    A list of one number a stage is ``[12, 6, 2]`` in JSON and ``12+6+2`` in CSV.

    Raises:
        ValueError: a line is no row; the message names the file, the line and the key. Or the file has another ending.
        OSError: the file can't be read.
    """
    match path.suffix.lower():
        case ".jsonl":
            lines = enumerate(read_lines(path), 1)
            return [_row(f"{path}, line {n}", _json(path, n, line)) for n, line in lines if line.strip()]
        case ".csv":
            return [_row(f"{path}, line {number}", values) for number, values in _csv(path)]
        case "" | ".txt":
            lines = enumerate(read_lines(path), 1)
            return [ImageRow(line.strip(), place=f"{path}, line {n}") for n, line in lines if line.strip()]
    raise ValueError(f"{path}: prompts are read from .txt, .jsonl or .csv, not from {path.suffix}")


def _json(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} is not a JSON object")
    return {name: value for name, value in row.items() if value is not None}


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a CSV with the numbers of their first lines; cells that are empty are left out."""
    reader = csv.reader(StringIO(read_text(path), newline=""), strict=True)
    header: list[str] = []
    first = 1
    try:
        for cells in reader:
            if not header:
                header = [cell.strip() for cell in cells]
                _check_header(f"{path}, line {first}", header)
            elif len(cells) > len(header):
                raise ValueError(f"{path}, line {first} has {len(cells)} values, but the header {len(header)}")
            elif any(cells):
                yield first, {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}
            first = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {first} is not CSV: {error}") from error


def _check_header(place: str, header: Sequence[str]) -> None:
    _check_keys(place, header)
    if "prompt" not in header or len(set(header)) < len(header):
        raise ValueError(f"{place}: the header must name prompt, and each column once; got {', '.join(header)}")


def _check_keys(place: str, names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in KEYS]:
        raise ValueError(f"{place}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(KEYS)}")


def _row(place: str, values: dict[str, Any]) -> ImageRow:
    _check_keys(place, list(values))
    if not str(values.get("prompt", "")).strip():
        raise ValueError(f"{place}: prompt must be a text that is not empty")
    return ImageRow(**{name: _value(place, name, value) for name, value in values.items()}, place=place)


def _value(place: str, name: str, value: Any) -> Any:
    """Return a row's value with its type; texts of a CSV are read as numbers."""
    read, what = READERS[name]
    try:
        parts = value.split("+") if isinstance(value, str) else value
        if name not in SEVERAL or not isinstance(parts, list) or (isinstance(value, str) and len(parts) == 1):
            return read(value)
        if not parts:
            raise ValueError(value)
        return [read(part) for part in parts]
    except (TypeError, ValueError, OverflowError) as error:
        several = ", or one a stage" if name in SEVERAL else ""
        raise ValueError(f"{place}: {name} must be {what}{several}; got {value!r}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise TypeError(value)
    value.encode()  # half of a pair of surrogates can't be
    return value


def _solver(value: Any) -> str:
    if value not in get_args(SolverKind):
        raise ValueError(value)
    return str(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError(value)
    return number


def _whole(value: Any) -> int:
    """Return a whole number; tables with empty cells write 512 as 512.0."""
    number = int(value) if isinstance(value, int | str) and "." not in str(value) else _number(value)
    if isinstance(value, bool) or number != int(number) or not -(2**63) <= number < 2**63:
        raise ValueError(value)
    return int(number)


def _count(value: Any) -> int:
    if (number := _whole(value)) < 1:
        raise ValueError(value)
    return number


COUNT = (_count, "a whole number of at least 1")
READERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "prompt": (_text, "a text"),
    "seed": (_whole, "a whole number of 64 bits"),
    "negative_prompt": (_text, "a text"),
    "height": COUNT,
    "width": COUNT,
    "steps": COUNT,
    "guidance_scale": (_number, "a number"),
    "solver": (_solver, f"one of {', '.join(get_args(SolverKind))}"),
}
"""The keys of a row in a file: how their values are read, and what they must be."""

KEYS = tuple(READERS)
SEVERAL = ("steps", "guidance_scale")
"""Numbers of which there may be one a stage."""


# --- batches -----------------------------------------------------------------------------------


def batches(rows: Sequence[tuple[int, ImageRow]], size: int) -> Iterator[list[tuple[int, ImageRow]]]:
    """Yield rows in batches of equal settings, in their order as far as that allows."""
    waiting: dict[str, list[tuple[int, ImageRow]]] = {}
    for number, row in rows:
        key = json.dumps([row.settings, row.negative_prompt is None])
        group = waiting.setdefault(key, [])
        group.append((number, row))
        if len(group) == size:
            yield waiting.pop(key)
    yield from waiting.values()
