"""What the fields of a sample mean: a table's columns, the keys of a JSON file, the members of a tar."""

import codecs
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nami_lightning.datamodules.sources.base import Skipped, SourceSample

CAPTIONS = ("caption", "text", "txt", "TEXT", "prompt")
AESTHETIC = ("aesthetic", "aesthetic_score", "AESTHETIC_SCORE", "aesthetic_score_laion_v2")
SIMILARITY = (
    "similarity",
    "SIMILARITY",
    "clip_similarity_vitl14",
    "clip_similarity_vitb32",
    "clip_l14_similarity_score",
    "clip_b32_similarity_score",
)
"""The usual names, of img2dataset, LAION, COYO, DataComp and Hugging Face; the first that holds something is taken."""


class BadText(ValueError):
    """A text that can't be used; the message says why."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a source hold what besides the image; where null or empty, the usual names are looked for.

    Args:
        captions: columns of captions, and how often training draws each: ``{caption: 1, synthetic_caption: 3}``. A
            column may hold a list of captions, which share its weight. In folders and tars, ``txt`` is the text file.
        aesthetic: column of the aesthetic score.
        similarity: column of the text-image similarity.
        group: column that says which samples stay in one split; null: each is its own.

    Raises:
        ValueError: a weight that is not positive.
    """

    captions: dict[str, float] = field(default_factory=dict)
    aesthetic: str | None = None
    similarity: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if bad := {name: weight for name, weight in self.captions.items() if not 0 < weight < math.inf}:
            raise ValueError(f"columns.captions: weights must be positive; got {bad}")

    def wanted(self, names: Collection[str]) -> list[str]:
        """Those of a table's columns that are read.

        Raises:
            ValueError: a column that was asked for is not among ``names``, or none of them holds captions.
        """
        asked = [*self.captions, *filter(None, (self.aesthetic, self.similarity, self.group))]
        if missing := [name for name in asked if name not in names]:
            raise ValueError(f"no column {', '.join(missing)} among {', '.join(names)}")
        if not self.captions and not set(CAPTIONS) & set(names):
            raise ValueError(
                f"no column of captions among {', '.join(names)} (looked for {', '.join(CAPTIONS)}): "
                "name it, --source.columns.captions '{NAME: 1}'"
            )
        return [name for name in names if name in {*asked, *CAPTIONS, *AESTHETIC, *SIMILARITY}]

    def sample(self, id: str, image: bytes, row: Mapping[str, Any]) -> SourceSample | Skipped:
        """A sample of a source.

        Args:
            id: any text.
            image: the encoded file.
            row: all else that the source has of it, by column.
        """
        try:
            captions, weights = self._captions(row)
        except BadText as error:
            return Skipped(printable(id), str(error))
        if not captions:
            return Skipped(printable(id), "no caption")
        scores = {
            "aesthetic": _number(row, (self.aesthetic,) if self.aesthetic else AESTHETIC),
            "similarity": _number(row, (self.similarity,) if self.similarity else SIMILARITY),
        }
        return SourceSample(
            printable(id),
            image,
            captions,
            weights,
            group=printable(str(row[self.group])) if self.group and row.get(self.group) is not None else "",
            scores={name: value for name, value in scores.items() if value is not None},
        )

    def _captions(self, row: Mapping[str, Any]) -> tuple[list[str], list[float]]:
        if not self.captions:
            return next((texts for name in CAPTIONS if (texts := _texts(row.get(name)))), []), []
        captions, weights = [], []
        for name, weight in self.captions.items():
            texts = _texts(row.get(name))
            captions += texts
            weights += [weight / len(texts) for _ in texts]
        return captions, weights


COLUMNS = Columns()
"""The usual names alone."""


def decode(data: bytes) -> str:
    """A text file's text: UTF-8, or UTF-16 that starts with its mark.

    Raises:
        BadText: it is neither.
    """
    try:
        return data.decode(encoding_of(data))
    except UnicodeDecodeError as error:
        raise BadText(f"caption is not UTF-8: {error.reason} at byte {error.start}") from error


def encoding_of(data: bytes) -> str:
    """UTF-16 where ``data`` starts with its mark, else UTF-8, with or without one."""
    return "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decode_object(data: bytes) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        BadText: it is something else.
    """
    try:
        value = json.loads(decode(data))
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadText):
            raise
        raise BadText(f"its .json is damaged: {error}") from error
    if not isinstance(value, dict):
        raise BadText(f"its .json is damaged: a {type(value).__name__}, not an object")
    return value


def printable(text: str) -> str:
    """The text itself, but for what is no Unicode (bytes of a file name, say), which is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _texts(value: object) -> list[str]:
    """The captions in a column's value: a text, encoded or not, or a list of them."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, bytes):
        value = decode(value)
    if isinstance(value, str):
        # A NUL betrays UTF-16 without a mark, and half a surrogate pair other bytes; neither could be stored.
        if "\0" in value or printable(value) != value:
            raise BadText("caption is not UTF-8")
        return [text] if (text := value.strip()) else []
    if isinstance(value, Sequence):
        return [text for item in value for text in _texts(item)]
    raise BadText(f"caption is not a text: {type(value).__name__}")


def _number(row: Mapping[str, Any], names: Sequence[str]) -> float | None:
    for name in names:
        try:
            return float(row[name])
        except (KeyError, TypeError, ValueError):
            continue
    return None
