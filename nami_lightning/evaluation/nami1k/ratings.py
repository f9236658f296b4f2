"""Raters' answers gathered: Table 5, intervals, and how far the raters agree."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from nami_lightning.evaluation.nami1k.prompts import KINDS
from nami_lightning.evaluation.nami1k.rating_pages import DIMENSIONS, FORMAT, KEY
from nami_lightning.evaluation.prompts import read_text
from nami_lightning.evaluation.results import interval, span
from nami_lightning.utils.text_table import table

WEIGHTS = {"relevance": 0.3, "coherence": 0.3, "aesthetic": 0.2, "realism": 0.2}
HEADINGS = {"relevance": "Rele", "coherence": "Cohe", "aesthetic": "Aes", "realism": "Real", "overall": "Overall"}

Ratings = dict[str, dict[int, np.ndarray]]
"""By image's number and by rater: a score for each dimension, ``(4,)``, 0 to 100."""


def overall(scores: Mapping[str, float]) -> float:
    """The weighted sum of the four dimensions' scores, on their scale."""
    return sum(weight * scores[name] for name, weight in WEIGHTS.items())


def read_key(folder: Path) -> dict[str, Any]:
    """Which image is whose.

    Raises:
        FileNotFoundError: no pages were ever written there.
    """
    path = folder / KEY
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: answers can be gathered only where --annotate wrote the pages")
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): write the pages again with --annotate") from error


def read_answers(paths: Sequence[Path], key: Mapping[str, Any]) -> Ratings:
    """The answers of all files.

    Raises:
        ValueError: a file that is not of this rating, or holds anything else than scores from 0 to 100, once for each
            image; named with its file and image.
        FileNotFoundError: a file that isn't there.
    """
    ratings: Ratings = {}
    for path in paths:
        saved = _read(path, key)
        for answer in saved["answers"]:
            number = answer.get("image") if isinstance(answer, dict) else None
            if not isinstance(number, str) or number not in key["images"]:
                raise ValueError(f"{path}: there is no image {number} in this rating")
            of_image = ratings.setdefault(number, {})
            if saved["rater"] in of_image:
                raise ValueError(f"{path}: rater {saved['rater']} has rated image {number} before: a file given twice?")
            of_image[saved["rater"]] = _scores(answer, f"{path}: image {number}")
    if not ratings:
        raise ValueError("the files hold no answers")
    return ratings


def _read(path: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    try:
        saved = json.loads(read_text(path))
        format_, study, rater, answers = (saved[name] for name in ("format", "study", "rater", "answers"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of answers: {error!r}") from error
    if format_ != FORMAT or study != key["study"]:
        raise ValueError(f"{path} is of rating {study} (format {format_}), not of {key['study']} (format {FORMAT})")
    if not isinstance(rater, int) or not 1 <= rater <= key["raters"] or not isinstance(answers, list):
        raise ValueError(f"{path}: rater {rater!r} is none of the {key['raters']} of this rating, or it has no answers")
    return saved


def _scores(answer: Mapping[str, Any], where: str) -> np.ndarray:
    values = [answer.get(name) for name in DIMENSIONS]
    for name, value in zip(DIMENSIONS, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise ValueError(f"{where}: {name} is {value!r}, not a number from 0 to 100")
    return np.array(values, dtype=float)


def summarise(ratings: Ratings, key: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of the models, with intervals, differences, agreement, and what is still unrated.

    An image's score is the mean over its raters, a prompt's the mean over its images, a model's the mean over its
    prompts. Intervals are bootstraps over prompts; a difference is taken on the prompts that both models have.

    Args:
        ratings: see :func:`read_answers`.
        key: see :func:`read_key`.
    """
    of_prompts = _by_prompt(ratings, key)
    kinds = {about["item"]: about["kind"] for about in key["images"].values()}
    models = {name: _model(of_prompts[name], kinds) for name in key["models"] if name in of_prompts}
    wanted = len(key["images"]) * key["each"]
    return {
        "models": models,
        "differences": [_difference(a, b, of_prompts) for a, b in combinations(models, 2)],
        "agreement": agreement(ratings),
        "ratings": sum(map(len, ratings.values())),
        "ratings_wanted": wanted,
        "raters": sorted({rater for of_image in ratings.values() for rater in of_image}),
        "weights": WEIGHTS,
    }


def _by_prompt(ratings: Ratings, key: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """By model and prompt: the four dimensions' means and the overall score, ``(5,)``."""
    images: dict[str, dict[str, list[np.ndarray]]] = {}
    for number, of_image in ratings.items():
        about = key["images"][number]
        scores = np.mean(list(of_image.values()), axis=0)
        images.setdefault(about["model"], {}).setdefault(about["item"], []).append(scores)
    return {
        model: {item: _with_overall(np.mean(scores, axis=0)) for item, scores in of_model.items()}
        for model, of_model in images.items()
    }


def _with_overall(scores: np.ndarray) -> np.ndarray:
    return np.append(scores, overall(dict(zip(DIMENSIONS, scores, strict=True))))


def _model(of_model: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> dict[str, Any]:
    values = np.stack(list(of_model.values()))
    by_kind = {
        kind: float(np.mean([scores[-1] for item, scores in of_model.items() if kinds[item] == kind]))
        for kind in KINDS
        if any(kinds[item] == kind for item in of_model)
    }
    return {
        **dict(zip(HEADINGS, values.mean(axis=0).tolist(), strict=True)),
        "intervals": {name: interval([values[:, i]]) for i, name in enumerate(HEADINGS)},
        "overall_by_kind": by_kind,
        "prompts": len(values),
    }


def _difference(a: str, b: str, of_prompts: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    both = [item for item in of_prompts[a] if item in of_prompts[b]]
    if not both:
        return {"models": [a, b], "prompts": 0}
    values = np.array([of_prompts[a][item][-1] - of_prompts[b][item][-1] for item in both])
    ends = interval([values])
    return {
        "models": [a, b],
        "overall": float(values.mean()),
        "interval": ends,
        "within_noise": None if ends is None else ends[0] <= 0 <= ends[1],
        "prompts": len(both),
    }


def agreement(ratings: Ratings) -> dict[str, float | None]:
    """Krippendorff's alpha of each dimension and of the overall score; None where no image has two raters' scores."""
    raters = sorted({rater for of_image in ratings.values() for rater in of_image})
    scores = np.full((len(raters), len(ratings), len(HEADINGS)), np.nan)
    for column, of_image in enumerate(ratings.values()):
        for rater, values in of_image.items():
            scores[raters.index(rater), column] = _with_overall(values)
    return {name: krippendorff_alpha(scores[:, :, i]) for i, name in enumerate(HEADINGS)}


def krippendorff_alpha(scores: np.ndarray) -> float | None:
    """Krippendorff's alpha for interval data: 1 is full agreement, 0 what chance gives, below 0 is worse.

    One minus the squared differences within units over those among all values (Krippendorff 2011, "Computing
    Krippendorff's Alpha-Reliability").

    Args:
        scores: ``(raters, units)``, NaN where a rater has not rated.

    Returns:
        alpha; None if no unit has two values, or all values are equal.
    """
    units = [unit[~np.isnan(unit)] for unit in scores.T]
    units = [unit for unit in units if len(unit) > 1]
    if not units:
        return None
    everything = np.concatenate(units)
    # A set of m values has squared differences of 2 m^2 var over its ordered pairs.
    within = sum(2 * len(unit) ** 2 * unit.var() / (len(unit) - 1) for unit in units) / len(everything)
    among = 2 * len(everything) * everything.var() / (len(everything) - 1)
    return float(1 - within / among) if among > 0 else None


def lines(summary: Mapping[str, Any]) -> list[str]:
    """Table 5, and what to think of it."""
    rows = [["", *HEADINGS.values(), "95% of Overall", *(f"Overall, {kind}" for kind in KINDS), "prompts"]]
    for name, model in summary["models"].items():
        by_kind = [
            f"{model['overall_by_kind'][kind]:.2f}" if kind in model["overall_by_kind"] else "-" for kind in KINDS
        ]
        scores = [f"{model[heading]:.2f}" for heading in HEADINGS]
        rows.append([name, *scores, span(model["intervals"]["overall"]), *by_kind, str(model["prompts"])])
    alphas = {name: "-" if alpha is None else f"{alpha:.2f}" for name, alpha in summary["agreement"].items()}
    rows.append(["agreement (alpha)", *(alphas[name] for name in HEADINGS), *[""] * (len(KINDS) + 2)])
    text = table(rows, "<" + ">" * (len(rows[0]) - 1))
    for difference in summary["differences"]:
        text.append(_in_words(difference))
    missing = summary["ratings_wanted"] - summary["ratings"]
    raters = len(summary["raters"])
    return [
        *text,
        f"{summary['ratings']:,} rating{'s' * (summary['ratings'] != 1)} of {raters} rater{'s' * (raters != 1)}"
        + (f", {missing:,} to come" if missing else ""),
    ]


def _in_words(difference: Mapping[str, Any]) -> str:
    a, b = difference["models"]
    if not difference["prompts"]:
        return f"{a} and {b} have no prompt in common yet"
    verdicts = {
        None: "too few prompts to tell",
        True: "within the noise of the prompts",
        False: "more than their noise",
    }
    return (
        f"{a} less {b}: {difference['overall']:+.2f} on {difference['prompts']} prompts, "
        f"95% {span(difference['interval'], '+.2f')}: {verdicts[difference['within_noise']]}"
    )
