"""``lightning evaluate``: generate the images of a benchmark's prompts, and compute their scores."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nami_lightning.cli.argument_types import one_or_all
from nami_lightning.cli.evaluate_options import IMAGES_PER_PROMPT, add_options, check_options

if TYPE_CHECKING:
    from nami_lightning.evaluation.generate import GeneratedImages
    from nami_lightning.evaluation.prompts import Item

GRID_SIDE = 384
RATINGS = "ratings"

DESCRIPTION = """\
Generate the images of a benchmark's prompts and judge them. RUN is a run (its folder, or its name below runs/), the
folder of a saved pipeline, or the Hugging Face name of any text-to-image pipeline of diffusers. If the command is
interrupted, run it again to resume."""

EXAMPLES = """\
examples:
  lightning evaluate nami_2b black-forest-labs/FLUX.1-dev --benchmark geneval --dtype bfloat16     Table 3
  lightning evaluate nami_2b --benchmark dpg --questions dpg_bench.csv --judge Salesforce/blip-vqa-base    Table 4
  lightning evaluate nami_2b flux --benchmark nami1k --prompts prompts.jsonl --annotate            pages for raters
  lightning evaluate --benchmark nami1k --ratings answers-*.json                                  Table 5
  lightning evaluate nami_2b flux --benchmark nami1k --grid 6                                     Appendix D
  lightning evaluate --benchmark nami1k --describe                                                Figures 5, 9 and 10

If models need different settings, run one command for each of them first, and then one command for all of them
without settings: each model keeps the settings of its images.
All files are written to OUTPUT/BENCHMARK: the images and results.json of each model, and what the options below write.
"""


def add_command(commands: Any) -> None:
    """Add ``evaluate`` to the command line."""
    parser = commands.add_parser(
        "evaluate",
        help="evaluate models on GenEval, DPG-Bench or NAMI-1K, or show them in a grid",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.set_defaults(execute=evaluate)


def evaluate(options: Namespace) -> None:
    """Generate images and judge them, or do what the options ask for instead.

    Raises:
        ValueError: the options don't fit together, or a part refuses its input.
        FileNotFoundError: a model or a file does not exist.
    """
    from nami_lightning.evaluation.prompt_stats import describe_prompts
    from nami_lightning.evaluation.prompts import first_of_each_kind
    from nami_lightning.evaluation.side_by_side import evenly_spaced

    check_options(options)
    out = Path(options.output) / options.benchmark
    if options.describe:
        print("\n".join(describe_prompts(_prompt_lists(options), out, options.topic_encoder)))
    elif options.ratings:
        summarize_ratings(options, out)
    else:
        all_items = read_items(options.benchmark, options)
        chosen = first_of_each_kind(all_items, options.limit)
        if options.grid:
            chosen = evenly_spaced(chosen, options.grid)
        folders = generate_all(options, out, all_items, chosen)
        next_step = grid if options.grid else annotate if options.annotate else judge
        next_step(options, out, folders, chosen)


def read_items(benchmark: str, options: Namespace) -> list[Item]:
    """Return the prompts of a benchmark as items."""
    from nami_lightning.evaluation.dpg.judge import read_questions
    from nami_lightning.evaluation.geneval.prompts import geneval_items
    from nami_lightning.evaluation.nami1k.prompts import read_prompts

    prompts = Path(options.prompts) if options.prompts and benchmark == options.benchmark else None
    if benchmark == "geneval":
        return geneval_items()
    if benchmark == "dpg":
        return read_questions(Path(options.questions), prompts)
    return read_prompts(prompts)


def _prompt_lists(options: Namespace) -> dict[str, list[Item]]:
    """Return the prompts of all benchmarks whose prompts are available, by the benchmarks' names."""
    at_hand = {"geneval": True, "dpg": bool(options.questions), "nami1k": True}
    return {name: read_items(name, options) for name in IMAGES_PER_PROMPT if at_hand[name]}


def generate_all(
    options: Namespace, out: Path, all_items: Sequence[Item], chosen: Sequence[Item]
) -> list[GeneratedImages]:
    """Generate the images of one model after the other, and return their folders."""
    import torch

    from nami_lightning.evaluation.generate import GeneratedImages, GenerationSettings, generate
    from nami_lightning.pipelines.sampler_settings import SamplerSettings

    sampler = SamplerSettings(
        *(one_or_all(options.steps), one_or_all(options.guidance_scale), options.solver),
        *(options.negative_prompt, options.height, options.width),
    )
    batch_size = options.batch_size or GenerationSettings.batch_size
    ema = options.ema is not False
    settings = GenerationSettings(
        *(sampler, options.seed, options.dtype, batch_size, options.step, ema, options.device),
        retry_not_finite=bool(options.retry_not_finite),
    )
    folders = [GeneratedImages(out / name, name) for name in model_names(options.runs, options.names)]
    for run, folder in zip(options.runs, folders, strict=True):
        generate(run, folder, all_items, chosen, _images_per_prompt(options), settings)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return folders


def model_names(runs: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """Return the names of the models: as given, or else the last part of their paths.

    An export in its run's own folder is named after both: ``openmoji-step=0001050``.

    Raises:
        ValueError: there are more or fewer names than models, two names are equal, or a name can't name a folder.
    """
    if names is not None and len(names) != len(runs):
        raise ValueError(f"--names gives {len(names)} names for {len(runs)} models")
    chosen = list(names or map(_own_name, runs))
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"two models have the same name: {', '.join(chosen)}; give them different ones with --names")
    if wrong := [name for name in chosen if not re.fullmatch(r"\w[^/\\\x00-\x1f]*", name) or name == RATINGS]:
        raise ValueError(f"{wrong[0]!r} can't be the name of a model's folder: give another name with --names")
    return chosen


def _own_name(run: str) -> str:
    path = Path(run).resolve() if Path(run).exists() else Path(run)
    return f"{path.parent.parent.name}-{path.name}" if path.parent.name == "pipelines" else path.name


def judge(options: Namespace, out: Path, folders: Sequence[GeneratedImages], items: Sequence[Item]) -> None:
    """Judge the images, write a results.json for each model, and print a table of all."""
    from nami_lightning.evaluation.nami1k.prompts import count_kinds
    from nami_lightning.utils.atomic_write import write_json

    if options.benchmark == "nami1k" or options.draw_only:
        print(
            f"The images of {len(items)} prompts are generated: {', '.join(str(folder.folder) for folder in folders)}"
        )
        if options.benchmark == "nami1k":
            print(f"{count_kinds(items)}\nPeople rate the images: the same command with --annotate writes their pages.")
        return
    score, names, lines = _load_judge(options)
    file = f"results-first-{options.limit}.json" if options.limit else "results.json"
    results: dict[str, Any] = {}
    for folder in folders:
        recorded = folder.recorded_settings
        remembered = folder.not_finite(recorded)
        not_finite = [
            {"image": str(folder.path(item, i)), "seed": remembered.get((item.id, i), {}).get("seed")}
            for item, i in folder.missing(items, _images_per_prompt(options))
        ]
        if len(not_finite) == len(items) * _images_per_prompt(options):
            print(f"{folder.name} has no image to judge: all have NaN or infinite values")
            continue
        results[folder.name] = score(folder, items)
        header = {"benchmark": options.benchmark, "model": folder.name, "judge": names, "not_finite": not_finite}
        generation = {"images_a_prompt": _images_per_prompt(options), "drawing": recorded}
        if not_finite:
            print(f"{folder.name}: {len(not_finite)} image(s) with NaN or infinite values don't count in its scores")
        write_json(folder.folder / file, header | generation | {"scores": results[folder.name]})
    if not results:
        raise ValueError("no model has an image to judge")
    print("\n".join(lines(results)))
    machines = sorted({machine for scores in results.values() for machine in scores["judged_on"]})
    print(f"{len(items):,} prompts, {_images_per_prompt(options)} image(s) each. Judged by", end=" ")
    print(", ".join(f"{role} {name}" for role, name in names.items()), f"on {'; '.join(machines)}")
    print(f"Each model's folder in {out} has its {file}.")


def _load_judge(
    options: Namespace,
) -> tuple[Callable[[GeneratedImages, Sequence[Item]], dict[str, Any]], dict[str, str], Callable[[Any], list[str]]]:
    """Return the judge of a benchmark, the names of its models, and the function that makes its table."""
    from nami_lightning.runs.load import find_device

    device = str(find_device(options.device))
    images = _images_per_prompt(options)
    if options.benchmark == "dpg":
        from nami_lightning.evaluation.dpg import judge as dpg
        from nami_lightning.evaluation.dpg.models import QuestionJudge

        if not options.judge:
            raise ValueError("the images are generated; to judge them, give --judge, a model that answers questions")
        names = {"judge": options.judge}
        answer = QuestionJudge(options.judge, device)
        kept = names | {"answers": "text"}
        return lambda folder, items: dpg.judge_images(folder, items, images, answer, kept), names, dpg.score_table
    from nami_lightning.evaluation.geneval import judge as geneval
    from nami_lightning.evaluation.geneval.models import (
        CLIP,
        DETECTOR,
        LONGEST_SIDE,
        SHORTEST_SIDE,
        ColorClassifier,
        Detector,
    )

    names = {"detector": options.detector or DETECTOR, "CLIP": options.clip or CLIP}
    models = geneval.Judge(
        Detector(names["detector"], device),
        ColorClassifier(names["CLIP"], device),
        names | {"sides": [SHORTEST_SIDE, LONGEST_SIDE]},
    )
    return lambda folder, items: geneval.judge_images(folder, items, images, models), names, geneval.score_table


def annotate(options: Namespace, out: Path, folders: Sequence[GeneratedImages], items: Sequence[Item]) -> None:
    """Write the pages on which people rate the images."""
    from nami_lightning.evaluation.nami1k.rating_pages import RatingSettings, write_pages

    given = {"raters": options.raters, "page_images": options.page_images, "side": options.page_side}
    settings = {name: value for name, value in given.items() if value is not None}
    raters = settings.get("raters", RatingSettings.raters)
    plan = RatingSettings(**settings, each=raters if options.raters_each is None else options.raters_each)
    pages = write_pages(folders, items, _images_per_prompt(options), plan, out / RATINGS)
    print(f"{len(pages)} pages are in {out / RATINGS / 'pages'}: give rater N only the files rater-N-part-*.html")
    print(f"Then: lightning evaluate --benchmark nami1k --output {options.output} --ratings answers-*.json")


def summarize_ratings(options: Namespace, out: Path) -> None:
    """Read the raters' answers, write results.json, and print Table 5."""
    from nami_lightning.evaluation.nami1k import ratings
    from nami_lightning.utils.atomic_write import write_json

    key = ratings.read_key(out / RATINGS)
    answers = ratings.read_answers([Path(path) for path in options.ratings], key)
    summary = ratings.summarize(answers, key)
    write_json(out / RATINGS / "results.json", summary)
    print("\n".join(ratings.summary_lines(summary)))
    print(f"{out / RATINGS / 'results.json'} has all of it.")


def grid(options: Namespace, out: Path, folders: Sequence[GeneratedImages], items: Sequence[Item]) -> None:
    """Write one picture with a row for each prompt and a column for each model."""
    from nami_lightning.evaluation.side_by_side import side_by_side
    from nami_lightning.utils.image_grid import save_image

    seeds = {(folder.recorded_settings or {}).get("seed") for folder in folders}
    if len(seeds) > 1:
        raise ValueError(f"the models' images have different seeds {seeds}: generate them again with one --seed")
    path = out / "grid.png"
    save_image(side_by_side(folders, items, options.grid_side or GRID_SIDE), path)
    print(f"{len(items)} prompts of {len(folders)} models: {path}")


def _images_per_prompt(options: Namespace) -> int:
    return 1 if options.grid else options.images or IMAGES_PER_PROMPT[options.benchmark]
