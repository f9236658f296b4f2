"""DPG-Bench's judge: a model answers questions about every image, for the scores of the paper's Table 4.

The benchmark's file, as published (github.com/TencentQQGYLab/ELLA, ``dpg_bench.csv``), has one question per line::

    item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language

``dependency`` lists the propositions of the same item without which this one makes no sense, or 0 if there is none.
``tuple`` begins with the category: ``attribute - color (cup, red)``.

The rules are those of the published script. The score of an image is the share of its questions that are answered yes;
a question that depends on another one counts 0 if that one counts 0. The overall score is the mean over all images. The
scores of the categories are shares of the plain answers, without dependencies: this is why the overall score in the
paper's Table 4 is below all five. Four things differ from the script:

- It skips the first question of the file, and with it the first item if another of its questions depends on that one.
- It computes the categories from the last of an item's images only.
- It reads the four images of an item from one picture of two by two; here each image is a file.
- It leaves out an image if a question depends on one that the file does not have. Here that question counts 0, and the
  number of such questions is printed next to the score.
"""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nami_lightning.evaluation.generate import GeneratedImages
from nami_lightning.evaluation.prompts import Item, check_id
from nami_lightning.evaluation.results import VerdictLog, bootstrap_interval, format_interval, format_percent
from nami_lightning.utils.text_files import read_text
from nami_lightning.utils.text_table import table

VERDICTS = "verdicts.jsonl"
CATEGORIES = {"global": "Gbl", "entity": "Ent", "attribute": "Attr", "relation": "Rel", "other": "Oth"}
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")

Answer = Callable[[Any, str], str]
"""A function that returns the answer to a question about a PIL image."""

Question = dict[str, Any]
"""The keys are ``id``, ``parents`` (ids of the questions that it depends on), ``category`` and ``question``."""


def read_questions(path: Path, prompts: Path | None = None) -> list[Item]:
    """Return the items in the order of the file, with their questions in ``metadata["questions"]``.

    Args:
        path: the CSV file.
        prompts: folder with each item's prompt as ITEM_ID.txt; None: use the column ``text`` of the file.

    Raises:
        ValueError: the file has another format, or no question; the message names the line.
        FileNotFoundError: a file does not exist.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    if lacking := [column for column in COLUMNS if column not in (reader.fieldnames or [])]:
        raise ValueError(f"{path} lacks the columns {', '.join(lacking)} of DPG-Bench's question file")
    texts: dict[str, str] = {}
    questions: dict[str, list[Question]] = {}
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row.values():
            raise ValueError(f"{where}: the line has fewer columns than the first line")
        name = check_id(row["item_id"].strip(), where)
        texts[name] = texts.get(name) or row["text"].strip()
        questions.setdefault(name, []).append(_question(row, where))
    if not questions:
        raise ValueError(f"{path} holds no question")
    for name, in_item in questions.items():
        ids = [question["id"] for question in in_item]
        if len(set(ids)) < len(ids):
            raise ValueError(f"{path}: {name} has two propositions with the same number: {ids}")
    if prompts is not None:
        texts = {name: read_text(prompts / f"{name}.txt").strip() for name in questions}
    if empty := [name for name, text in texts.items() if not text]:
        raise ValueError(f"{prompts or path}: the prompt of {empty[0]} is empty")
    return [Item(name, texts[name], "all", {"questions": in_item}) for name, in_item in questions.items()]


def _question(row: Mapping[str, str], where: str) -> Question:
    category = row["tuple"].partition("(")[0].partition("-")[0].strip().lower()
    if category not in CATEGORIES:
        raise ValueError(f"{where}: the tuple begins with {category!r}, none of {', '.join(CATEGORIES)}")
    try:
        identifier = int(row["proposition_id"])
        parents = [int(parent) for parent in row["dependency"].split(",") if parent.strip()]
    except ValueError as error:
        raise ValueError(f"{where}: proposition_id and dependency must be numbers: {error}") from error
    if not row["question_natural_language"].strip():
        raise ValueError(f"{where}: the question is empty")
    return {
        "id": identifier,
        "parents": [parent for parent in parents if parent != 0],
        "category": category,
        "question": row["question_natural_language"].strip(),
    }


def image_score(questions: Sequence[Question], answers: Sequence[bool]) -> float:
    """Return the share of an image's questions that count 1, in [0, 1].

    A question counts 1 if it and all questions that it depends on are answered yes.

    Args:
        questions: questions of the item in the order of the file. The rule is applied in this order: a question that
            comes after those it depends on also fails with what they depend on.
        answers: one answer per question.
    """
    counts = {question["id"]: yes for question, yes in zip(questions, answers, strict=True)}
    for question in questions:
        counts[question["id"]] &= all(counts.get(parent, False) for parent in question["parents"])
    return sum(counts.values()) / len(counts)


def judge_images(
    folder: GeneratedImages, items: Sequence[Item], images: int, answer: Answer, judge: Mapping[str, Any]
) -> dict[str, Any]:
    """Ask about the images of a model that were not judged yet, and return the scores; see :func:`scores`.

    Images that were not finite don't exist; prompts without any image are left out.

    Args:
        folder: the images.
        items: items to judge.
        images: number of images of each item.
        answer: the model that answers.
        judge: names of that model and its settings.
    """
    log = VerdictLog(folder.folder / VERDICTS, judge)
    answers: dict[str, list[list[str]]] = {}
    for item in tqdm(items, desc=f"judging {folder.name}"):
        texts = [question["question"] for question in item.metadata["questions"]]
        for i in folder.samples(item, images):
            path = folder.path(item, i)
            answered = log.get(path, texts)
            if not is_answers(answered, len(texts)):
                image = folder.open(item, i)
                answered = [answer(image, text) for text in texts]
                log.add(path, texts, answered)
            answers.setdefault(item.id, []).append(answered)
    all_answers = (text for in_item in answers.values() for answered in in_item for text in answered)
    unclear = sum(not is_yes(text) and not is_no(text) for text in all_answers)
    yes = {name: [[is_yes(text) for text in answered] for answered in in_item] for name, in_item in answers.items()}
    return scores([item for item in items if item.id in yes], yes) | {
        "unclear_answers": unclear,
        "judged_on": sorted(log.judged_on),
    }


def is_answers(value: Any, count: int) -> bool:
    """Tell whether a value from a file of verdicts can be the answers to ``count`` questions."""
    return isinstance(value, list) and len(value) == count and all(isinstance(answer, str) for answer in value)


def is_yes(answer: str) -> bool:
    """Tell whether the first word of an answer is yes."""
    return re.findall(r"[a-z]+", answer.lower())[:1] == ["yes"]


def is_no(answer: str) -> bool:
    """Tell whether the first word of an answer is no."""
    return re.findall(r"[a-z]+", answer.lower())[:1] == ["no"]


def scores(items: Sequence[Item], answers: Mapping[str, Sequence[Sequence[bool]]]) -> dict[str, Any]:
    """Return the overall score and those of the categories, all in [0, 1].

    ``orphans`` is the number of questions that depend on a missing one.

    Args:
        items: items with their questions.
        answers: for each item and each of its images, one answer per question.
    """
    item_scores = []
    by_category: dict[str, list[bool]] = {}
    for item in items:
        questions = item.metadata["questions"]
        item_scores.append(np.mean([image_score(questions, answered) for answered in answers[item.id]]))
        for answered in answers[item.id]:
            for question, yes in zip(questions, answered, strict=True):
                by_category.setdefault(question["category"], []).append(yes)
    values = np.array(item_scores)
    orphans = sum(map(_orphans, items))
    return {
        "overall": float(values.mean()),
        "categories": {name: float(np.mean(by_category[name])) for name in CATEGORIES if name in by_category},
        "intervals": {"overall": bootstrap_interval([values])},
        "prompts": len(items),
        "questions": {name: len(by_category[name]) for name in CATEGORIES if name in by_category},
        "orphans": orphans,
    }


def _orphans(item: Item) -> int:
    """Return the number of an item's questions that depend on one that the file does not have."""
    ids = {question["id"] for question in item.metadata["questions"]}
    return sum(not ids.issuperset(question["parents"]) for question in item.metadata["questions"])


def score_table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return Table 4 of the paper for some models, as lines of text."""
    rows = [["", "Ovr", *CATEGORIES.values(), "95% of Ovr"]]
    for name, result in results.items():
        shares = result["categories"]
        cells = [format_percent(shares[category]) if category in shares else "-" for category in CATEGORIES]
        rows.append(
            [
                name,
                format_percent(result["overall"]),
                *cells,
                format_interval(result["intervals"]["overall"], ".1f", 100),
            ]
        )
    text = table(rows, "<" + ">" * (len(CATEGORIES) + 2))
    for name, result in results.items():
        if result.get("unclear_answers"):
            text.append(f"{name}: {result['unclear_answers']:,} answers began with neither yes nor no, and count as no")
    if orphans := max(result["orphans"] for result in results.values()):
        text.append(f"{orphans} question(s) depend on one that the file does not have, and count 0")
    return text
