"""DPG-Bench: a model that answers questions looks at every image; five categories and a mean, as in Table 4.

The benchmark's file, as published (github.com/TencentQQGYLab/ELLA, ``dpg_bench.csv``), one question a line::

    item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language

``dependency`` lists the propositions (of the same item) without which this one makes no sense, 0 for none. ``tuple``
begins with the category: ``attribute - color (cup, red)``.

The rules are the published script's. An image's score is its share of questions answered yes, where a question counts 0
if one that it depends on counts 0; the mean over images is the overall score. The categories are shares of plain
answers, dependencies left out: this is why the overall score in the paper's Table 4 lies below all five. Two things
differ: that script skips the file's first question (and with it the first item, if another of its questions depends on
that one), and takes the categories from the last of an item's images alone. It reads an item's four images from one
picture of two by two; here they are files of their own. A question that depends on one which the file does not have
counts 0, where that script leaves the image out; how many there are is said beside the score.
"""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nami_lightning.evaluation.generate import ImageFolder
from nami_lightning.evaluation.prompts import Item, checked_id, read_text
from nami_lightning.evaluation.results import Ledger, interval, percent, span
from nami_lightning.utils.text_table import table

VERDICTS = "verdicts.jsonl"
CATEGORIES = {"global": "Gbl", "entity": "Ent", "attribute": "Attr", "relation": "Rel", "other": "Oth"}
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")

Answer = Callable[[Any, str], str]
"""What is answered to a question about a PIL image."""

Question = dict[str, Any]
"""``id``, ``parents`` (ids), ``category`` and ``question``."""


def read_questions(path: Path, prompts: Path | None = None) -> list[Item]:
    """The benchmark's items in the file's order, their questions in ``metadata["questions"]``.

    Args:
        path: the CSV file.
        prompts: a folder with each item's prompt as ITEM_ID.txt; None: the file's column ``text``.

    Raises:
        ValueError: another format, or no question. Named with its line.
        FileNotFoundError: a file that isn't there.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    if lacking := [column for column in COLUMNS if column not in (reader.fieldnames or [])]:
        raise ValueError(f"{path} lacks the columns {', '.join(lacking)} of DPG-Bench's question file")
    texts: dict[str, str] = {}
    questions: dict[str, list[Question]] = {}
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row.values():
            raise ValueError(f"{where}: it has fewer columns than the first")
        name = checked_id(row["item_id"].strip(), where)
        texts[name] = texts.get(name) or row["text"].strip()
        questions.setdefault(name, []).append(_question(row, where))
    if not questions:
        raise ValueError(f"{path} holds no question")
    for name, of_item in questions.items():
        ids = [question["id"] for question in of_item]
        if len(set(ids)) < len(ids):
            raise ValueError(f"{path}: {name} has two propositions of one number: {ids}")
    if prompts is not None:
        texts = {name: read_text(prompts / f"{name}.txt").strip() for name in questions}
    if empty := [name for name, text in texts.items() if not text]:
        raise ValueError(f"{prompts or path}: the prompt of {empty[0]} is empty")
    return [Item(name, texts[name], "all", {"questions": of_item}) for name, of_item in questions.items()]


def _question(row: Mapping[str, str], where: str) -> Question:
    category = row["tuple"].partition("(")[0].partition("-")[0].strip().lower()
    if category not in CATEGORIES:
        raise ValueError(f"{where}: the tuple begins with {category!r}, none of {', '.join(CATEGORIES)}")
    try:
        number = int(row["proposition_id"])
        parents = [int(parent) for parent in row["dependency"].split(",") if parent.strip()]
    except ValueError as error:
        raise ValueError(f"{where}: proposition_id and dependency must be numbers: {error}") from error
    if not row["question_natural_language"].strip():
        raise ValueError(f"{where}: the question is empty")
    return {
        "id": number,
        "parents": [parent for parent in parents if parent != 0],
        "category": category,
        "question": row["question_natural_language"].strip(),
    }


def image_score(questions: Sequence[Question], answers: Sequence[bool]) -> float:
    """An image's share of questions that count 1: answered yes, as are all that they depend on; in [0, 1].

    Args:
        questions: of its item, in the file's order, which the rule is applied in: a question that comes after those it
            depends on falls with them, and with what they depend on.
        answers: one a question.
    """
    counts = {question["id"]: yes for question, yes in zip(questions, answers, strict=True)}
    for question in questions:
        counts[question["id"]] &= all(counts.get(parent, False) for parent in question["parents"])
    return sum(counts.values()) / len(counts)


def judge_images(
    folder: ImageFolder, items: Sequence[Item], images: int, answer: Answer, judge: Mapping[str, Any]
) -> dict[str, Any]:
    """Ask about a model's images what was not asked yet, and sum up: see :func:`scores`.

    Args:
        folder: the images.
        items: to look at.
        images: of each item.
        answer: the judge.
        judge: names of its model and settings.
    """
    ledger = Ledger(folder.folder / VERDICTS, judge)
    answers: dict[str, list[list[str]]] = {}
    for item in tqdm(items, desc=f"judging {folder.name}"):
        texts = [question["question"] for question in item.metadata["questions"]]
        for i in range(images):
            path = folder.path(item, i)
            if (said := ledger.get(path, texts)) is None:
                image = folder.open(item, i)
                said = [answer(image, text) for text in texts]
                ledger.add(path, texts, said)
            answers.setdefault(item.id, []).append(said)
    every = (text for of_item in answers.values() for said in of_item for text in said)
    unclear = sum(not is_yes(text) and not is_no(text) for text in every)
    yes = {name: [[is_yes(text) for text in said] for said in of_item] for name, of_item in answers.items()}
    return scores(items, yes) | {"unclear_answers": unclear, "judged_on": sorted(ledger.judged_on)}


def is_yes(answer: str) -> bool:
    """Whether an answer's first word is yes."""
    return re.findall(r"[a-z]+", answer.lower())[:1] == ["yes"]


def is_no(answer: str) -> bool:
    """Whether an answer's first word is no."""
    return re.findall(r"[a-z]+", answer.lower())[:1] == ["no"]


def scores(items: Sequence[Item], answers: Mapping[str, Sequence[Sequence[bool]]]) -> dict[str, Any]:
    """The overall score and the categories', all in [0, 1]; ``orphans`` counts questions whose parents are missing.

    Args:
        items: with their questions.
        answers: by item, for each of its images, one a question.
    """
    of_items = []
    plain: dict[str, list[bool]] = {}
    for item in items:
        questions = item.metadata["questions"]
        of_items.append(np.mean([image_score(questions, said) for said in answers[item.id]]))
        for said in answers[item.id]:
            for question, yes in zip(questions, said, strict=True):
                plain.setdefault(question["category"], []).append(yes)
    values = np.array(of_items)
    orphans = sum(map(_orphans, items))
    return {
        "overall": float(values.mean()),
        "categories": {name: float(np.mean(plain[name])) for name in CATEGORIES if name in plain},
        "intervals": {"overall": interval([values])},
        "prompts": len(items),
        "questions": {name: len(plain[name]) for name in CATEGORIES if name in plain},
        "orphans": orphans,
    }


def _orphans(item: Item) -> int:
    """Questions that depend on one that isn't there."""
    there = {question["id"] for question in item.metadata["questions"]}
    return sum(not there.issuperset(question["parents"]) for question in item.metadata["questions"])


def lines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Table 4 of some models' scores."""
    rows = [["", "Ovr", *CATEGORIES.values(), "95% of Ovr"]]
    for name, result in results.items():
        shares = result["categories"]
        cells = [percent(shares[category]) if category in shares else "-" for category in CATEGORIES]
        rows.append([name, percent(result["overall"]), *cells, span(result["intervals"]["overall"], ".1f", 100)])
    text = table(rows, "<" + ">" * (len(CATEGORIES) + 2))
    for name, result in results.items():
        if result.get("unclear_answers"):
            text.append(f"{name}: {result['unclear_answers']:,} answers began with neither yes nor no, and count as no")
    if orphans := max(result["orphans"] for result in results.values()):
        text.append(f"{orphans} question(s) depend on one that the file does not have, and count 0")
    return text
