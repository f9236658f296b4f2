"""GenEval: a detector and CLIP look at every image; six tasks and their unweighted mean, as in the paper's Table 3."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nami_lightning.evaluation.generate import ImageFolder
from nami_lightning.evaluation.geneval.prompts import TASKS
from nami_lightning.evaluation.geneval.rules import Detection, judge, kept
from nami_lightning.evaluation.prompts import Item
from nami_lightning.evaluation.results import Ledger, interval, span
from nami_lightning.utils.text_table import table

VERDICTS = "verdicts.jsonl"
HEADINGS = {
    "single_object": "Sgl",
    "two_object": "Two",
    "counting": "Cnt",
    "colors": "Col",
    "position": "Pos",
    "color_attr": "CA",
}

Detect = Callable[[Any], Sequence[Detection]]
ClassifyColors = Callable[[Any, Sequence[Detection], str], Sequence[str]]


@dataclass(frozen=True)
class Judge:
    """What looks at images.

    Args:
        detect: finds objects in a PIL image.
        classify_colors: names the colour of each of some objects of a class in an image.
        names: of its models and their settings.
    """

    detect: Detect
    classify_colors: ClassifyColors
    names: Mapping[str, Any]


def judge_images(folder: ImageFolder, items: Sequence[Item], images: int, judge_of_images: Judge) -> dict[str, Any]:
    """Judge a model's images, those that were not judged yet, and sum up: see :func:`scores`; ``judged_on`` names the
    machines."""
    ledger = Ledger(folder.folder / VERDICTS, judge_of_images.names)
    correct: dict[str, list[float]] = {}
    for item in tqdm(items, desc=f"judging {folder.name}"):
        verdicts = [_judged(ledger, folder, item, i, judge_of_images) for i in range(images)]
        correct.setdefault(item.kind, []).append(float(np.mean([verdict["correct"] for verdict in verdicts])))
    return scores(correct) | {"judged_on": sorted(ledger.judged_on)}


def _judged(ledger: Ledger, folder: ImageFolder, item: Item, sample: int, judge_of_images: Judge) -> dict[str, Any]:
    path: Path = folder.path(item, sample)
    if (known := ledger.get(path, item.metadata)) is not None:
        return known
    image = folder.open(item, sample)
    objects = kept(judge_of_images.detect(image), item.kind)
    verdict = asdict(
        judge(item.metadata, objects, lambda found, name: judge_of_images.classify_colors(image, found, name))
    )
    ledger.add(path, item.metadata, verdict)
    return verdict


def scores(correct: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Scores of the tasks and overall, with intervals.

    Args:
        correct: by task, each prompt's share of right images.

    Returns:
        ``overall`` is the unweighted mean of ``tasks``; ``intervals`` are of the same names; ``prompts`` counts.
    """
    strata = {task: np.array(correct[task]) for task in TASKS if task in correct}
    tasks = {task: float(values.mean()) for task, values in strata.items()}
    intervals = {task: interval([values]) for task, values in strata.items()}
    return {
        "overall": float(np.mean(list(tasks.values()))),
        "tasks": tasks,
        "intervals": {"overall": interval(list(strata.values())), **intervals},
        "prompts": {task: len(values) for task, values in strata.items()},
    }


def lines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Table 3 of some models' scores."""
    rows = [["", "Ovr", *HEADINGS.values(), "95% of Ovr"]]
    for name, result in results.items():
        tasks = [f"{result['tasks'][task]:.2f}" if task in result["tasks"] else "-" for task in HEADINGS]
        rows.append([name, f"{result['overall']:.2f}", *tasks, span(result["intervals"]["overall"])])
    return table(rows, "<" + ">" * (len(HEADINGS) + 2))
