"""The raters' answers: Table 5 of the paper, intervals, and how well the raters agree."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from nami_lightning.evaluation.nami1k.prompts import KINDS
from nami_lightning.evaluation.nami1k.rating_pages import DIMENSIONS, FORMAT, KEY, check_key
from nami_lightning.evaluation.results import bootstrap_interval, format_interval
from nami_lightning.utils.text_files import parse_json, read_text
from nami_lightning.utils.text_table import table

WEIGHTS = {"relevance": 0.3, "coherence": 0.3, "aesthetic": 0.2, "realism": 0.2}
HEADINGS = {"relevance": "Rele", "coherence": "Cohe", "aesthetic": "Aes", "realism": "Real", "overall": "Overall"}

Ratings = dict[str, dict[int, np.ndarray]]
"""For each image number and each rater, a score from 0 to 100 of each dimension, ``(4,)``."""


def overall_score(scores: Mapping[str, float]) -> float:
    """Return the weighted sum of the four dimensions' scores, on their scale."""
    return sum(weight * scores[name] for name, weight in WEIGHTS.items())


def read_key(folder: Path) -> dict[str, Any]:
    """Return the key of a rating: the model and the prompt of each image.

    Raises:
        FileNotFoundError: no pages were ever written there.
    """
    path = folder / KEY
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: answers can be summed up only where --annotate wrote the pages"
        )
    try:
        key = parse_json(read_text(path))
        check_key(key)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): write the pages again with --annotate") from error
    return dict(key)


def read_answers(paths: Sequence[Path], key: Mapping[str, Any]) -> Ratings:
    """Return the answers of all files.

    Raises:
        ValueError: a file is not of this rating, or has anything else than scores from 0 to 100, once for each image;
            the message names the file and the image.
        FileNotFoundError: a file does not exist.
    """
    ratings: Ratings = {}
    for path in paths:
        saved = _read(path, key)
        for answer in saved["answers"]:
            number = answer.get("image") if isinstance(answer, dict) else None
            if not isinstance(number, str) or number not in key["images"]:
                raise ValueError(f"{path}: there is no image {number} in this rating")
            image_ratings = ratings.setdefault(number, {})
            if saved["rater"] in image_ratings:
                raise ValueError(
                    f"{path}: rater {saved['rater']} has already rated image {number}: is a file given twice?"
                )
            image_ratings[saved["rater"]] = _scores(answer, f"{path}: image {number}")
    if not ratings:
        raise ValueError("the files hold no answers")
    return ratings


def _read(path: Path, key: Mapping[str, Any]) -> dict[str, Any]:
    try:
        saved = parse_json(read_text(path))
        format_, study, rater, answers = (saved[name] for name in ("format", "study", "rater", "answers"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of answers: {error!r}") from error
    if format_ != FORMAT or study != key["study"]:
        raise ValueError(f"{path} is of rating {study} (format {format_}), not of {key['study']} (format {FORMAT})")
    if (
        not isinstance(rater, int)
        or isinstance(rater, bool)
        or not 1 <= rater <= key["raters"]
        or not isinstance(answers, list)
    ):
        raise ValueError(
            f"{path}: rater {rater!r} is none of the {key['raters']} raters of this rating, or it has no answers"
        )
    return saved


def _scores(answer: Mapping[str, Any], where: str) -> np.ndarray:
    values = [answer.get(name) for name in DIMENSIONS]
    for name, value in zip(DIMENSIONS, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise ValueError(f"{where}: {name} is {value!r}, not a number from 0 to 100")
    return np.array(values, dtype=float)


def summarize(ratings: Ratings, key: Mapping[str, Any]) -> dict[str, Any]:
    """Return the models' scores with intervals, their differences, the agreement of raters, and what is unrated.

    The score of an image is the mean over its raters, the score of a prompt the mean over its images, and the score of
    a model the mean over its prompts. Intervals are bootstraps over prompts. A difference uses the prompts that both
    models have.

    Args:
        ratings: see :func:`read_answers`.
        key: see :func:`read_key`.
    """
    by_model = _by_prompt(ratings, key)
    kinds = {entry["item"]: entry["kind"] for entry in key["images"].values()}
    models = {name: _model_summary(by_model[name], kinds) for name in key["models"] if name in by_model}
    wanted = len(key["images"]) * key["each"]
    return {
        "models": models,
        "differences": [_difference(a, b, by_model) for a, b in combinations(models, 2)],
        "agreement": agreement(ratings),
        "ratings": sum(map(len, ratings.values())),
        "ratings_wanted": wanted,
        "raters": sorted({rater for image_ratings in ratings.values() for rater in image_ratings}),
        "weights": WEIGHTS,
    }


def _by_prompt(ratings: Ratings, key: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Return, by model and prompt, the means of the four dimensions and the overall score, ``(5,)``."""
    images: dict[str, dict[str, list[np.ndarray]]] = {}
    for number, image_ratings in ratings.items():
        entry = key["images"][number]
        scores = np.mean(list(image_ratings.values()), axis=0)
        images.setdefault(entry["model"], {}).setdefault(entry["item"], []).append(scores)
    return {
        model: {item: _with_overall(np.mean(scores, axis=0)) for item, scores in by_prompt.items()}
        for model, by_prompt in images.items()
    }


def _with_overall(scores: np.ndarray) -> np.ndarray:
    return np.append(scores, overall_score(dict(zip(DIMENSIONS, scores, strict=True))))


def _model_summary(by_prompt: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> dict[str, Any]:
    values = np.stack(list(by_prompt.values()))
    by_kind = {
        kind: float(np.mean([scores[-1] for item, scores in by_prompt.items() if kinds[item] == kind]))
        for kind in KINDS
        if any(kinds[item] == kind for item in by_prompt)
    }
    return {
        **dict(zip(HEADINGS, values.mean(axis=0).tolist(), strict=True)),
        "intervals": {name: bootstrap_interval([values[:, i]]) for i, name in enumerate(HEADINGS)},
        "overall_by_kind": by_kind,
        "prompts": len(values),
    }


def _difference(a: str, b: str, by_model: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    both = [item for item in by_model[a] if item in by_model[b]]
    if not both:
        return {"models": [a, b], "prompts": 0}
    values = np.array([by_model[a][item][-1] - by_model[b][item][-1] for item in both])
    ends = bootstrap_interval([values])
    return {
        "models": [a, b],
        "overall": float(values.mean()),
        "interval": ends,
        "within_noise": None if ends is None else ends[0] <= 0 <= ends[1],
        "prompts": len(both),
    }


def agreement(ratings: Ratings) -> dict[str, float | None]:
    """Return Krippendorff's alpha of each dimension and of the overall score; None if no image has two raters."""
    raters = sorted({rater for image_ratings in ratings.values() for rater in image_ratings})
    scores = np.full((len(raters), len(ratings), len(HEADINGS)), np.nan)
    for column, image_ratings in enumerate(ratings.values()):
        for rater, values in image_ratings.items():
            scores[raters.index(rater), column] = _with_overall(values)
    return {name: krippendorff_alpha(scores[:, :, i]) for i, name in enumerate(HEADINGS)}


def krippendorff_alpha(scores: np.ndarray) -> float | None:
    """Return Krippendorff's alpha for interval data: 1 is full agreement, 0 is as good as chance, below 0 is worse.

    It is one minus the squared differences within units over those among all values (Krippendorff 2011, "Computing
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
    all_values = np.concatenate(units)
    # A set of m values has squared differences of 2 m^2 var over its ordered pairs.
    within = sum(2 * len(unit) ** 2 * unit.var() / (len(unit) - 1) for unit in units) / len(all_values)
    among = 2 * len(all_values) * all_values.var() / (len(all_values) - 1)
    return float(1 - within / among) if among > 0 else None


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return Table 5 of the paper as lines of text, and what the differences mean."""
    rows = [["", *HEADINGS.values(), "95% of Overall", *(f"Overall, {kind}" for kind in KINDS), "prompts"]]
    for name, model in summary["models"].items():
        by_kind = [
            f"{model['overall_by_kind'][kind]:.2f}" if kind in model["overall_by_kind"] else "-" for kind in KINDS
        ]
        scores = [f"{model[heading]:.2f}" for heading in HEADINGS]
        rows.append([name, *scores, format_interval(model["intervals"]["overall"]), *by_kind, str(model["prompts"])])
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
        False: "more than the noise of the prompts",
    }
    return (
        f"{a} minus {b}: {difference['overall']:+.2f} on {difference['prompts']} prompts, "
        f"95% {format_interval(difference['interval'], '+.2f')}: {verdicts[difference['within_noise']]}"
    )
