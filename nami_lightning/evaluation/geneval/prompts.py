"""GenEval's 553 prompts, made anew by its published rules (github.com/djghosh13/geneval, ``create_prompts.py``).

Every draw comes from one NumPy generator in a fixed order, so the list is a pure function of the seed. What an image
must show is in an item's metadata in GenEval's own format, so that its own judge can read it too::

    {"tag": "position", "prompt": "a photo of a dog right of a teddy bear",
     "include": [{"class": "teddy bear", "count": 1},
                 {"class": "dog", "count": 1, "position": ["right of", 0]}]}

``position`` names a relation and the number of the entry that it relates to; ``exclude`` lists counts that must not be
reached.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from nami_lightning.evaluation.prompts import Item, prompts_hash

SEED = 43
DRAWS = 100
"""Prompts drawn of each task but the first; a double is dropped, so one task has 99."""

SHA256 = "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"
"""Of the published list."""

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four")

Metadata = dict[str, Any]


@cache
def object_names() -> tuple[str, ...]:
    """The 80 classes of COCO in COCO's order, by GenEval's names."""
    text = files("nami_lightning.evaluation.geneval").joinpath("objects.txt").read_text(encoding="utf-8")
    return tuple(text.split("\n")[:80])


def geneval_items() -> list[Item]:
    """The published prompts in the published order.

    Raises:
        RuntimeError: the installed NumPy draws other numbers than those of the published list.
    """
    samples = _samples(np.random.default_rng(SEED))
    unique = {json.dumps(sample, sort_keys=True): sample for sample in samples}.values()
    items = [Item(f"{i:05d}", sample["prompt"], sample["tag"], sample) for i, sample in enumerate(unique)]
    if prompts_hash(items) != SHA256:
        raise RuntimeError(
            f"numpy {np.__version__} draws other prompts than GenEval's published list: install the version that "
            "nami_lightning was tested with"
        )
    return items


def _samples(rng: np.random.Generator) -> list[Metadata]:
    """All draws, doubles included; the order of the calls to ``rng`` makes the list what it is."""
    names = object_names()
    samples = [_single_object(names[i]) for i in rng.choice(len(names), size=len(names), replace=False)]
    for draw in (_two_object, _counting, _colors, _position, _color_attr):
        samples += [draw(rng, names) for _ in range(DRAWS)]
    return samples


def _single_object(name: str) -> Metadata:
    return _sample("single_object", _a(name), [_require(name)])


def _two_object(rng: np.random.Generator, names: tuple[str, ...]) -> Metadata:
    a, b = (names[i] for i in rng.choice(len(names), size=2, replace=False))
    return _sample("two_object", f"{_a(a)} and {_a(b)}", [_require(a), _require(b)])


def _counting(rng: np.random.Generator, names: tuple[str, ...]) -> Metadata:
    name = names[rng.choice(len(names))]
    count = int(rng.integers(2, 4, endpoint=True))
    plural = f"{name}es" if name.endswith("s") else f"{name}s"
    sample = _sample("counting", f"{NUMBERS[count]} {plural}", [_require(name, count)])
    return sample | {"exclude": [_require(name, count + 1)]}


def _colors(rng: np.random.Generator, names: tuple[str, ...]) -> Metadata:
    name = names[_not_a_person(rng.choice(len(names) - 1), names)]
    color = COLORS[rng.choice(len(COLORS))]
    return _sample("colors", f"{_a(color)} {name}", [_require(name, color=color)])


def _position(rng: np.random.Generator, names: tuple[str, ...]) -> Metadata:
    a, b = (names[i] for i in rng.choice(len(names), size=2, replace=False))
    relation = POSITIONS[rng.choice(len(POSITIONS))]
    return _sample("position", f"{_a(a)} {relation} {_a(b)}", [_require(b), _require(a, position=[relation, 0])])


def _color_attr(rng: np.random.Generator, names: tuple[str, ...]) -> Metadata:
    drawn = rng.choice(len(names) - 1, size=2, replace=False)
    a, b = (names[_not_a_person(i, names)] for i in drawn)
    color_a, color_b = (COLORS[i] for i in rng.choice(len(COLORS), size=2, replace=False))
    requirements = [_require(a, color=color_a), _require(b, color=color_b)]
    return _sample("color_attr", f"{_a(color_a)} {a} and {_a(color_b)} {b}", requirements)


def _not_a_person(index: int, names: tuple[str, ...]) -> int:
    """One of the other 79 names' numbers: no person is asked for in a colour."""
    return int(index + 1 + names.index("person")) % len(names)


def _sample(tag: str, what: str, include: list[Metadata]) -> Metadata:
    return {"tag": tag, "include": include, "prompt": f"a photo of {what}"}


def _require(name: str, count: int = 1, **more: Any) -> Metadata:
    return {"class": name, "count": count, **more}


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
