"""GenEval's rules: whether an image is correct, given what a detector found in it. No model is used here.

The rules are those published (github.com/djghosh13/geneval, ``evaluate_images.py``):

- Detections with a confidence above 0.3 count, for the task counting above 0.9; at most 16 of a class. GenEval's
  overlap limit is 1, so no detection is dropped because it overlaps another.
- Every entry of ``include`` asks for a number of objects of one class. Colour and position are checked only on the most
  confident objects, as many as the entry asks for. More objects than that do no harm, except for the task counting,
  where ``exclude`` makes the number exact.
- A is left of B if the offset of their centres, shortened by 0.1 of the sum of both widths (heights), still points left
  by more than half of the offset's length. So two relations can hold at once, and none holds if the centres are too
  close.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
MAX_OVERLAP = 1.0
POSITION_MARGIN = 0.1

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """An object that a detector found.

    Args:
        label: name of its class, by GenEval's names.
        score: the detector's confidence, in [0, 1].
        box: left, top, right and bottom in px; right and bottom are the first px outside.
        mask: the object's pixels, bool ``(H, W)`` with the image's size.
    """

    label: str
    score: float
    box: Box
    mask: np.ndarray | None = None


Objects = Mapping[str, Sequence[Detection]]
"""Detections by class, the most confident first."""

ClassifyColors = Callable[[Sequence[Detection], str], Sequence[str]]
"""A function that returns the colour of each of some objects of one class."""


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows what was asked for, and the reasons if it doesn't."""

    correct: bool
    reasons: tuple[str, ...] = ()


def filter_detections(
    detections: Sequence[Detection], tag: str, max_overlap: float = MAX_OVERLAP
) -> dict[str, list[Detection]]:
    """Return the detections that count, by class, the most confident first.

    Args:
        detections: all detections of an image.
        tag: the task; counting needs more confidence.
        max_overlap: if two boxes of a class overlap (intersection over union) by this much or more, the less confident
            one is dropped; 1 drops none.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: dict[str, list[Detection]] = {}
    candidates = sorted((d for d in detections if d.score > threshold), key=lambda d: -d.score)
    for label in dict.fromkeys(d.label for d in candidates):
        for candidate in [d for d in candidates if d.label == label][:MAX_OBJECTS]:
            chosen = objects.setdefault(label, [])
            if max_overlap == 1 or all(overlap(other.box, candidate.box) < max_overlap for other in chosen):
                chosen.append(candidate)
    return objects


def overlap(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes, in [0, 1].

    As in GenEval, each box counts as one px wider and higher than it is.
    """
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def relations(a: Box, b: Box) -> set[str]:
    """Return the relations of box ``a`` to box ``b``: up to two of left of, right of, above and below."""
    corners = np.array([a, b], dtype=float).reshape(2, 2, 2)
    centers, sides = corners.mean(axis=1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    beyond = np.maximum(np.abs(offset) - POSITION_MARGIN * sides.sum(axis=0), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def judge_objects(metadata: Mapping[str, Any], objects: Objects, classify_colors: ClassifyColors) -> Verdict:
    """Return whether an image shows what its prompt asks for.

    Args:
        metadata: metadata of the prompt, see :mod:`~nami_lightning.evaluation.geneval.prompts`.
        objects: detections that :func:`filter_detections` returned.
        classify_colors: function that is called only if a colour matters.
    """
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for entry in metadata["include"]:
        name, count = entry["class"], entry["count"]
        found = objects.get(name, [])[:count]
        reason = None
        if len(found) < count:
            reason = f"expected {count} {name}, found {len(found)}"
        elif "color" in entry:
            reason = _wrong_color(entry, classify_colors(found, name))
        if reason is None and "position" in entry:
            reason = _wrong_position(entry, found, matched)
        if reason is not None:
            reasons.append(reason)
        matched.append(found if reason is None else None)
    for entry in metadata.get("exclude", []):
        number = len(objects.get(entry["class"], []))
        if number >= entry["count"]:
            reasons.append(f"expected fewer than {entry['count']} {entry['class']}, found {number}")
    return Verdict(not reasons, tuple(reasons))


def _wrong_color(entry: Mapping[str, Any], colors: Sequence[str]) -> str | None:
    if list(colors).count(entry["color"]) >= entry["count"]:
        return None
    return f"expected {entry['color']} {entry['class']}, found {', '.join(colors)}"


def _wrong_position(
    entry: Mapping[str, Any], found: Sequence[Detection], matched: Sequence[Sequence[Detection] | None]
) -> str | None:
    relation, target = entry["position"]
    others = matched[target]
    if others is None:
        return f"nothing for {entry['class']} to be {relation}"
    for here in found:
        for there in others:
            if relation not in (true := relations(here.box, there.box)):
                return (
                    f"expected {entry['class']} {relation} {there.label}, found {' and '.join(true) or 'neither side'}"
                )
    return None
