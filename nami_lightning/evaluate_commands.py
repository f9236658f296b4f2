"""What ``lightning evaluate`` does; imported only when it runs."""

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nami_lightning.evaluation.dpg import judge as dpg
from nami_lightning.evaluation.generate import ImageFolder, Sampling, draw
from nami_lightning.evaluation.geneval import judge as geneval
from nami_lightning.evaluation.geneval.prompts import geneval_items
from nami_lightning.evaluation.nami1k import prompts as nami1k
from nami_lightning.evaluation.nami1k import ratings
from nami_lightning.evaluation.nami1k.rating_pages import Plan, write_pages
from nami_lightning.evaluation.options import check_options
from nami_lightning.evaluation.prompt_stats import describe
from nami_lightning.evaluation.prompts import Item, first_of_each_kind
from nami_lightning.evaluation.results import write_json
from nami_lightning.evaluation.side_by_side import side_by_side, spread
from nami_lightning.utils.image_grid import save_image

IMAGES = {"geneval": geneval.IMAGES, "dpg": dpg.IMAGES, "nami1k": nami1k.IMAGES}
GRID_SIDE = 384
RATINGS = "ratings"


def evaluate(options: Namespace) -> None:
    """Draw, then judge, or what the options ask for instead.

    Raises:
        ValueError: options that don't go together, and whatever the parts refuse.
        FileNotFoundError: a model or a file that isn't there.
    """
    check_options(options)
    out = Path(options.out) / options.benchmark
    if options.describe:
        print("\n".join(describe(_lists(options), out, options.topic_encoder)))
    elif options.ratings:
        gather(options, out)
    else:
        everything = read_items(options.benchmark, options)
        chosen = first_of_each_kind(everything, options.limit)
        if options.grid:
            chosen = spread(chosen, options.grid)
        folders = draw_all(options, out, everything, chosen)
        after = grid if options.grid else annotate if options.annotate else judge
        after(options, out, folders, chosen)


def read_items(benchmark: str, options: Namespace) -> list[Item]:
    """A benchmark's prompts."""
    prompts = Path(options.prompts) if options.prompts and benchmark == options.benchmark else None
    if benchmark == "geneval":
        return geneval_items()
    if benchmark == "dpg":
        return dpg.read_questions(Path(options.questions), prompts)
    return nami1k.read_prompts(prompts)


def _lists(options: Namespace) -> dict[str, list[Item]]:
    """The benchmark's prompts, beside those of the others that are at hand."""
    at_hand = {"geneval": True, "dpg": bool(options.questions), "nami1k": True}
    return {name: read_items(name, options) for name in IMAGES if at_hand[name]}


def draw_all(options: Namespace, out: Path, everything: Sequence[Item], chosen: Sequence[Item]) -> list[ImageFolder]:
    """Every model's images, one model after the other; the folders they are in."""
    steps = options.steps[0] if options.steps and len(options.steps) == 1 else options.steps
    settings = {"num_inference_steps": steps} | {
        name: getattr(options, name) for name in ("guidance_scale", "negative_prompt", "solver", "height", "width")
    }
    sampling = Sampling(settings, options.seed, options.dtype, options.batch_size or Sampling.batch_size)
    folders = [ImageFolder(out / name, name) for name in model_names(options.runs, options.names)]
    for run, folder in zip(options.runs, folders, strict=True):
        draw(run, folder, everything, chosen, _images(options), sampling)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return folders


def model_names(runs: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """What models are called: as given, or the last part of their paths.

    Raises:
        ValueError: another number of names, two of one name, or one that can't name a folder.
    """
    if names is not None and len(names) != len(runs):
        raise ValueError(f"--names has {len(names)} for {len(runs)} models")
    chosen = list(names or (Path(run).name for run in runs))
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"two models are called the same: {', '.join(chosen)}; tell them apart with --names")
    if wrong := [name for name in chosen if not re.fullmatch(r"\w[\w .+-]*", name) or name == RATINGS]:
        raise ValueError(f"{wrong[0]!r} can't be a model's folder: give another with --names")
    return chosen


def judge(options: Namespace, out: Path, folders: Sequence[ImageFolder], items: Sequence[Item]) -> None:
    """Let the benchmark's models look at the images; one results.json a model, and a table of all."""
    if options.benchmark == "nami1k" or options.draw_only:
        print(f"{len(items)} prompts are drawn: {', '.join(str(folder.folder) for folder in folders)}")
        if options.benchmark == "nami1k":
            print(f"{nami1k.shares(items)}\nPeople judge them: the same command with --annotate writes their pages.")
        return
    score, names, lines = _judges(options)
    file = f"results-first-{options.limit}.json" if options.limit else "results.json"
    results: dict[str, Any] = {}
    for folder in folders:
        results[folder.name] = score(folder, items)
        about = {"benchmark": options.benchmark, "model": folder.name, "judge": names}
        whole = {"images_a_prompt": _images(options), "drawing": folder.drawing}
        write_json(folder.folder / file, about | whole | {"scores": results[folder.name]})
    print("\n".join(lines(results)))
    machines = sorted({machine for scores in results.values() for machine in scores["judged_on"]})
    print(f"{len(items):,} prompts, {_images(options)} image(s) each. Judged by", end=" ")
    print(", ".join(f"{role} {name}" for role, name in names.items()), f"on {'; '.join(machines)}")
    print(f"{file} is in each model's folder in {out}")


Score = Callable[[ImageFolder, Sequence[Item]], dict[str, Any]]


def _judges(options: Namespace) -> tuple[Score, dict[str, str], Callable[[Any], list[str]]]:
    """A benchmark's judge, the names of its models, and its table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = _images(options)
    if options.benchmark == "dpg":
        from nami_lightning.evaluation.dpg.models import QuestionJudge

        if not options.judge:
            raise ValueError("the images are drawn; give --judge, a model that answers questions about images")
        names = {"judge": options.judge}
        answer = QuestionJudge(options.judge, device)
        kept = names | {"answers": "text"}
        return lambda folder, items: dpg.judge_images(folder, items, images, answer, kept), names, dpg.lines
    from nami_lightning.evaluation.geneval.models import CLIP, DETECTOR, LONGEST, SHORTEST, ColorClassifier, Detector

    names = {"detector": options.detector or DETECTOR, "CLIP": options.clip or CLIP}
    models = geneval.Judge(
        Detector(names["detector"], device),
        ColorClassifier(names["CLIP"], device),
        names | {"sides": [SHORTEST, LONGEST]},
    )
    return lambda folder, items: geneval.judge_images(folder, items, images, models), names, geneval.lines


def annotate(options: Namespace, out: Path, folders: Sequence[ImageFolder], items: Sequence[Item]) -> None:
    """Write the raters' pages."""
    given = {"raters": options.raters, "page_images": options.page_images, "side": options.page_side}
    settings = {name: value for name, value in given.items() if value is not None}
    raters = settings.get("raters", Plan.raters)
    plan = Plan(**settings, each=raters if options.raters_each is None else options.raters_each)
    pages = write_pages(folders, items, _images(options), plan, out / RATINGS)
    print(
        f"{len(pages)} pages in {out / RATINGS / 'pages'}: give rater N the files rater-N-part-*.html, and nothing else"
    )
    print(f"Then: lightning evaluate --benchmark nami1k --out {options.out} --ratings answers-*.json")


def gather(options: Namespace, out: Path) -> None:
    """Sum up the raters' answers."""
    key = ratings.read_key(out / RATINGS)
    answers = ratings.read_answers([Path(path) for path in options.ratings], key)
    summary = ratings.summarise(answers, key)
    write_json(out / RATINGS / "results.json", summary)
    print("\n".join(ratings.lines(summary)))
    print(f"{out / RATINGS / 'results.json'} holds all")


def grid(options: Namespace, out: Path, folders: Sequence[ImageFolder], items: Sequence[Item]) -> None:
    """One picture: a row a prompt, a column a model."""
    seeds = {(folder.drawing or {}).get("seed") for folder in folders}
    if len(seeds) > 1:
        raise ValueError(f"the models' images were drawn from different seeds {seeds}: draw them anew with one --seed")
    path = out / "grid.png"
    save_image(side_by_side(folders, items, options.grid_side or GRID_SIDE), path)
    print(f"{len(items)} prompts of {len(folders)} models: {path}")


def _images(options: Namespace) -> int:
    return 1 if options.grid else options.images or IMAGES[options.benchmark]
