"""What the fields of a sample mean: the columns of a table, the keys of a JSON file, the files in a tar."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nami_lightning.datamodules.sources.base import Skipped, SourceSample
from nami_lightning.utils.text_files import encoding_of

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
"""The usual names, from img2dataset, LAION, COYO, DataComp and Hugging Face; the first with a value is used."""


NO_CAPTION = "no caption"


class BadText(ValueError):
    """An error for a text that can't be used; the message says why."""


class Unusable(str):
    """Stands for a value that can't be used; it is the reason why."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a source hold captions, scores and groups; null or empty: the usual names are tried.

    Args:
        captions: columns of captions, with how often training uses each: ``{caption: 1, synthetic_caption: 3}``. A
            column may hold a list of captions, which share its weight. In folders and tars, ``txt`` is the text file.
        aesthetic: column of the aesthetic score.
        similarity: column of the text-image similarity.
        group: column whose value decides which samples stay in one split; null: each sample is its own group.

    Raises:
        ValueError: a weight is not positive.
    """

    captions: dict[str, float] = field(default_factory=dict)
    aesthetic: str | None = None
    similarity: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if bad := {name: weight for name, weight in self.captions.items() if not 0 < weight < math.inf}:
            raise ValueError(f"columns.captions: weights must be positive; got {bad}")

    def wanted(self, names: Collection[str]) -> list[str]:
        """Return those of a table's columns that must be read.

        Raises:
            ValueError: a requested column is not among ``names``, or none of them holds captions.
        """
        requested = [*self.captions, *filter(None, (self.aesthetic, self.similarity, self.group))]
        if missing := [name for name in requested if name not in names]:
            raise ValueError(f"no column {', '.join(missing)} among {', '.join(names)}")
        if not self.captions and not set(CAPTIONS) & set(names):
            raise ValueError(
                f"no column of captions among {', '.join(names)} (looked for {', '.join(CAPTIONS)}): "
                "name it, --source.columns.captions '{NAME: 1}'"
            )
        return [name for name in names if name in {*requested, *CAPTIONS, *AESTHETIC, *SIMILARITY}]

    def sample(
        self, id: str, image: bytes, row: Mapping[str, Any], places: Mapping[str, Any] | None = None
    ) -> SourceSample | Skipped:
        """Return a sample of a source, or the reason why it is skipped.

        Args:
            id: its name, which may be any text.
            image: the image file.
            row: everything else that the source has for it, by column.
            places: where its caption may stand, the most trusted place first, with what stands there; None: the columns
                with the usual names.
        """
        if places is None:
            places = {name: row[name] for name in CAPTIONS if name in row}
        notes: list[str] = []
        try:
            captions, weights = self._weighted(row, notes) if self.captions else (_first_captions(places, notes), [])
        except BadText as error:
            return Skipped(printable(id), str(error))
        if not captions:
            return Skipped(printable(id), NO_CAPTION)
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
            notes=notes,
        )

    def sample_of_files(
        self,
        id: str,
        image: bytes,
        texts: Mapping[str, Any],
        json_file: bytes | Unusable | None,
        row: Mapping[str, Any] | None = None,
    ) -> SourceSample | Skipped:
        """Return a sample whose captions stand in files of its own, or the reason why it is skipped.

        The most trusted caption is used: that of ``.txt``, then of ``.caption``, of the metadata, and of ``.json``. A
        file that can't be used costs nothing if there is another caption.

        Args:
            id: its name, which may be any text.
            image: the image file.
            texts: what its text files hold, or why they can't be used, under ``txt`` and ``caption``.
            json_file: its JSON file, or why it can't be used.
            row: its row in a metadata file.
        """
        row = row or {}
        fields, problem = {}, ""
        try:
            if isinstance(json_file, Unusable):
                raise BadText(json_file)
            fields = decode_object(json_file) if json_file else {}
        except BadText as error:
            problem = str(error)
        places = {f".{name}": texts[name] for name in ("txt", "caption") if texts.get(name)}
        for place, values in (("the metadata", row), (".json", fields)):
            places |= {f"{name} in {place}": values[name] for name in CAPTIONS if name in values}
        sample = self.sample(id, image, {**fields, **texts, **row}, places)
        if not problem:
            return sample
        if isinstance(sample, Skipped):
            return sample if sample.reason != NO_CAPTION else Skipped(sample.id, problem)
        state = "a .json that can't be read" if isinstance(json_file, Unusable) else "a damaged .json"
        return replace(sample, notes=[*sample.notes, f"{state}, which is ignored"])

    def _weighted(self, row: Mapping[str, Any], notes: list[str]) -> tuple[list[str], list[float]]:
        """Return the captions of the requested columns of a row, with their weights; note those that can't be used.

        Raises:
            BadText: a column can't be used, and no other has a caption.
        """
        captions, weights, problems = list[str](), list[float](), dict[str, BadText]()
        for name, weight in self.captions.items():
            try:
                texts = _texts(row.get(name))
            except BadText as error:
                problems[name] = error
                continue
            captions += texts
            weights += [weight / len(texts) for _ in texts]
        _note_problems(problems, captions, notes)
        return captions, weights


COLUMNS = Columns()
"""Columns that are found by the usual names alone."""


def decode(data: bytes) -> str:
    """Return the text of a text file: UTF-8, or UTF-16 that starts with a byte order mark.

    Raises:
        BadText: the file has another encoding.
    """
    try:
        return data.decode(encoding_of(data))
    except UnicodeDecodeError as error:
        raise BadText(f"caption is not UTF-8: {error.reason} at byte {error.start}") from error


def decode_object(data: bytes) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        BadText: the file holds something else.
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
    """Return the text, with anything that is not valid Unicode (for example, bytes of a file name) escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def _first_captions(places: Mapping[str, Any], notes: list[str]) -> list[str]:
    """Return the captions of the first place that has any; note each later place that has none of them.

    Places that can't be used are noted too.

    Raises:
        BadText: a place can't be used, and no other has a caption.
    """
    used, captions, problems = "", list[str](), dict[str, BadText]()
    for place, value in places.items():
        try:
            texts = _texts(value)
        except BadText as error:
            problems[place] = error
            continue
        if not captions:
            used, captions = place, texts
        elif texts and not set(texts) & set(captions):
            notes.append(f"captions differ: {used} is used, not {place}")
    _note_problems(problems, captions, notes)
    return captions


def _note_problems(problems: Mapping[str, BadText], captions: Sequence[str], notes: list[str]) -> None:
    """Note the places whose captions can't be used.

    Raises:
        BadText: there are no other captions.
    """
    if problems and not captions:
        raise next(iter(problems.values()))
    notes += [f"a caption that can't be used, in {place}: another is used" for place in problems]


def _texts(value: object) -> list[str]:
    """Return the captions in a column's value: one text, as str or bytes, or a list of texts.

    Raises:
        BadText: it holds something else.
    """
    try:
        return _flat_texts(value)
    except RecursionError as error:
        raise BadText("caption is not a text: lists in lists, without an end") from error


def _flat_texts(value: object) -> list[str]:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, Unusable):
        raise BadText(value)
    if isinstance(value, bytes):
        value = decode(value)
    if isinstance(value, str):
        # A NUL comes from UTF-16 without a byte order mark, a lone surrogate from other bytes; neither can be stored.
        if "\0" in value or printable(value) != value:
            raise BadText("caption is not UTF-8")
        return [text] if (text := value.strip()) else []
    if isinstance(value, Sequence):
        return [text for item in value for text in _flat_texts(item)]
    raise BadText(f"caption is not a text: {type(value).__name__}")


def _number(row: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """Return the first value in the columns ``names`` that is a finite number, or None."""
    for name in names:
        try:
            number = float(row[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(number):
            return number
    return None
