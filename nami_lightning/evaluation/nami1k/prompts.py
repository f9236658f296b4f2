"""NAMI-1K's prompt file: three kinds of prompts, one JSON object per line.

    {"id": "human-003", "kind": "human", "topic": "fantasy and stories", "prompt": "A man hugging a tiger ..."}

``id`` is the name of the prompt's folder of images. ``kind`` is ``open`` (from open benchmarks), ``human`` (written by
people) or ``long`` (written by a model). ``topic`` may be left out. The paper prints 15 of its 1,000 prompts, five of
each kind: they come with the package (``examples.jsonl``). Their topics are our own choice.
"""

from collections import Counter
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from nami_lightning.evaluation.prompts import Item, check_id
from nami_lightning.utils.text_files import is_text, parse_json, read_lines

KINDS = {"open": 360, "human": 320, "long": 320}
"""The kinds of prompts, and how many the paper has of each."""

TOPICS = {
    "people": "a person, a man, a woman, a child, a portrait, a face, clothing, a couple",
    "animals": "an animal, a pet, wildlife, a bird, a fish, a dog, a horse",
    "food": "food, a drink, fruit, vegetables, a meal, a cake",
    "plants": "a plant, flowers, a tree, a garden, a forest",
    "landscapes": "a landscape, mountains, the sea, the sky, a sunset, weather, a field",
    "architecture": "a building, architecture, a city, a street, a castle, a house, a room",
    "vehicles": "a vehicle, a car, a train, a ship, an airplane, a bicycle, traffic",
    "objects": "furniture, a tool, a household item, kitchenware, an electronic device, luggage, a toy, a book",
    "art and design": "a painting, an illustration, a logo, a pattern, graphic design, a sculpture",
    "fantasy and stories": "fantasy, a fairy tale, magic, a dragon, a dream, a fictional character",
    "space and science": "outer space, a planet, an astronaut, a rocket, a robot, a laboratory",
    "sports and leisure": "sports equipment, a ball game, skiing, surfing, music, dancing, a hobby",
    "events and culture": "a festival, a ceremony, a wedding, the news, history, a celebrity",
    "text and ideas": "written text, a proverb, advice, an abstract idea, an emotion",
}
"""14 topics, and what a picture of each may show. Figures 9 and 10 of the paper have 14 too, but its text names none.
"""


def read_prompts(path: Path | None = None) -> list[Item]:
    """Return the prompts of a file, or the paper's 15 examples if ``path`` is None.

    Raises:
        ValueError: a line has another format, or an id occurs twice; the message names the line.
        FileNotFoundError: the file does not exist.
    """
    if path is None:
        with as_file(files("nami_lightning.evaluation.nami1k").joinpath("examples.jsonl")) as examples:
            return read_prompts(examples)
    items: dict[str, Item] = {}
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            item = _item(line, f"{path}, line {number}")
            if item.id in items:
                raise ValueError(f"{path}, line {number}: the id {item.id} is used twice")
            items[item.id] = item
    if not items:
        raise ValueError(f"{path} holds no prompt")
    return list(items.values())


def _item(line: str, where: str) -> Item:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("id", "kind", "prompt")):
        raise ValueError(f'{where}: must be an object with the strings "id", "kind" and "prompt"')
    check_id(entry["id"], where)
    if not isinstance(entry.get("topic", ""), str):
        raise ValueError(f"{where}: the topic must be a string")
    if entry["kind"] not in KINDS:
        raise ValueError(f"{where}: kind {entry['kind']!r} is none of {', '.join(KINDS)}")
    if not entry["prompt"].strip() or not is_text(entry["prompt"]):
        raise ValueError(f"{where}: the prompt is empty, or has characters that are no text")
    topic = {"topic": entry["topic"]} if entry.get("topic") else {}
    return Item(entry["id"], entry["prompt"].strip(), entry["kind"], {"kind": entry["kind"], **topic})


def count_kinds(items: Sequence[Item]) -> str:
    """Return how many prompts of each kind there are, next to the paper's number: ``open 5 of 360, ...``."""
    counts = Counter(item.kind for item in items)
    return ", ".join(f"{kind} {counts[kind]} of {number}" for kind, number in KINDS.items())
