"""GenEval's judge: a detector and CLIP look at every image, for the scores of the paper's Table 3."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nami_lightning.evaluation.generate import GeneratedImages
from nami_lightning.evaluation.geneval.prompts import TASKS
from nami_lightning.evaluation.geneval.rules import Detection, filter_detections, judge_objects
from nami_lightning.evaluation.prompts import Item
from nami_lightning.evaluation.results import VerdictLog, bootstrap_interval, format_interval
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
    """The models that look at the images.

    Args:
        detect: function that finds the objects in a PIL image.
        classify_colors: function that names the colour of each of some objects of one class in an image.
        names: names of the models, and their settings.
    """

    detect: Detect
    classify_colors: ClassifyColors
    names: Mapping[str, Any]


def judge_images(folder: GeneratedImages, items: Sequence[Item], images: int, judge: Judge) -> dict[str, Any]:
    """Judge the images of a model that were not judged yet, and return the scores; see :func:`scores`.

    Images that were not finite don't exist; prompts without any image are left out. ``judged_on`` in the result names
    the machines that judged.
    """
    log = VerdictLog(folder.folder / VERDICTS, judge.names)
    correct: dict[str, list[float]] = {}
    for item in tqdm(items, desc=f"judging {folder.name}"):
        verdicts = [_judge_image(log, folder, item, i, judge) for i in folder.samples(item, images)]
        if verdicts:
            correct.setdefault(item.kind, []).append(float(np.mean([verdict["correct"] for verdict in verdicts])))
    return scores(correct) | {"judged_on": sorted(log.judged_on)}


def _judge_image(log: VerdictLog, folder: GeneratedImages, item: Item, sample: int, judge: Judge) -> dict[str, Any]:
    path: Path = folder.path(item, sample)
    known = log.get(path, item.metadata)
    if isinstance(known, dict) and isinstance(known.get("correct"), bool):
        return known
    image = folder.open(item, sample)
    objects = filter_detections(judge.detect(image), item.kind)
    verdict = asdict(
        judge_objects(item.metadata, objects, lambda found, name: judge.classify_colors(image, found, name))
    )
    log.add(path, item.metadata, verdict)
    return verdict


def scores(correct: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the scores of the tasks and the overall score, with their intervals.

    Args:
        correct: by task, the share of correct images of each prompt.

    Returns:
        ``overall`` is the unweighted mean of ``tasks``; ``intervals`` has the same names;
        ``prompts`` counts the prompts of each task.
    """
    strata = {task: np.array(correct[task]) for task in TASKS if task in correct}
    tasks = {task: float(values.mean()) for task, values in strata.items()}
    intervals = {task: bootstrap_interval([values]) for task, values in strata.items()}
    return {
        "overall": float(np.mean(list(tasks.values()))),
        "tasks": tasks,
        "intervals": {"overall": bootstrap_interval(list(strata.values())), **intervals},
        "prompts": {task: len(values) for task, values in strata.items()},
    }


def score_table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return Table 3 of the paper for some models, as lines of text."""
    rows = [["", "Ovr", *HEADINGS.values(), "95% of Ovr"]]
    for name, result in results.items():
        tasks = [f"{result['tasks'][task]:.2f}" if task in result["tasks"] else "-" for task in HEADINGS]
        rows.append([name, f"{result['overall']:.2f}", *tasks, format_interval(result["intervals"]["overall"])])
    return table(rows, "<" + ">" * (len(HEADINGS) + 2))
