"""Images to draw, a row each: from text, JSON lines or CSV; and the settings of an image, kept in its PNG."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from nami_lightning.utils.atomic_write import replacing
from nami_lightning.utils.text_files import read_lines, read_text

CHUNK = "nami_lightning"
"""The text chunk of a PNG that holds the settings as JSON."""


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
    """

    prompt: str
    seed: int | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    steps: int | list[int] | None = None
    guidance_scale: float | list[float] | None = None
    solver: str | None = None

    def over(self, defaults: dict[str, Any]) -> "ImageRow":
        """Return the row with ``defaults`` where it says nothing."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of a pipeline's call that images of one batch share; what is None is left out."""
        values = asdict(self)
        del values["prompt"], values["seed"], values["negative_prompt"]
        values["num_inference_steps"] = values.pop("steps")
        return {name: value for name, value in values.items() if value is not None}


KINDS: dict[str, tuple[type, bool]] = {
    "seed": (int, False),
    "height": (int, False),
    "width": (int, False),
    "steps": (int, True),
    "guidance_scale": (float, True),
}
"""Numbers of a row: their type, and whether there may be one a stage."""


def read_rows(path: Path) -> list[ImageRow]:
    """Return the rows of a file: ``.jsonl``, ``.csv`` with a header, or text with one prompt a line.

    A list of one number a stage is ``[12, 6, 2]`` in JSON and ``12+6+2`` in CSV.

    Raises:
        ValueError: a line is no row; the message names the file, the line and the key.
        OSError: the file can't be read.
    """
    match path.suffix.lower():
        case ".jsonl":
            lines = [(number, line) for number, line in enumerate(read_lines(path), 1) if line.strip()]
            return [_row(path, number, _json(path, number, line)) for number, line in lines]
        case ".csv":
            reader = csv.DictReader(StringIO(read_text(path)), restkey="")
            rows = [(reader.line_num, {key: value for key, value in row.items() if value}) for row in reader]
            return [_row(path, number, row) for number, row in rows]
    return [ImageRow(line.strip()) for line in read_lines(path) if line.strip()]


def _json(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number} is not a JSON object")
    return row


def _row(path: Path, number: int, values: dict[str, Any]) -> ImageRow:
    where = f"{path}, line {number}"
    known = [one.name for one in fields(ImageRow)]
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{where}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
    prompt = values.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: prompt must be a text that is not empty")
    return ImageRow(**{name: _number(where, name, value) for name, value in values.items()})


def _number(where: str, name: str, value: Any) -> Any:
    """Return a row's value with its type; texts of a CSV are read as numbers."""
    if name not in KINDS or value is None:
        return value
    kind, several = KINDS[name]
    parts = value.split("+") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        numbers = [kind(part) for part in parts]
        exact = all(float(part) == number for part, number in zip(parts, numbers, strict=True))
        if (
            not exact
            or any(isinstance(part, bool) for part in parts)
            or not numbers
            or (len(numbers) > 1 and not several)
        ):
            raise ValueError(value)
    except (TypeError, ValueError) as error:
        what = "a number, or one a stage" if several else "a whole number"
        raise ValueError(f"{where}: {name} must be {what}; got {value!r}") from error
    return numbers if isinstance(value, list) or len(numbers) > 1 else numbers[0]


def batches(rows: Sequence[tuple[int, ImageRow]], size: int) -> Iterator[list[tuple[int, ImageRow]]]:
    """Yield rows in batches of equal settings, in their order as far as that allows."""
    waiting: dict[str, list[tuple[int, ImageRow]]] = {}
    for number, row in rows:
        group = waiting.setdefault(json.dumps(row.settings), [])
        group.append((number, row))
        if len(group) == size:
            yield waiting.pop(json.dumps(row.settings))
    yield from waiting.values()


def save_with_settings(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG that holds the prompt and all settings as text, completely or not at all."""
    info = PngInfo()
    info.add_itxt("prompt", settings["prompt"])
    info.add_itxt(CHUNK, json.dumps(settings, ensure_ascii=False))
    with replacing(path) as partial:
        image.save(partial, "PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings that a PNG holds; None if there are none, or it isn't a whole picture."""
    try:
        with Image.open(path) as image:
            image.load()
            return json.loads(getattr(image, "text", {})[CHUNK])
    except (OSError, UnidentifiedImageError, KeyError, ValueError, SyntaxError):
        return None
