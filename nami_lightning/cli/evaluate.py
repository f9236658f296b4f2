"""``lightning evaluate``: a benchmark's prompts to images, and images to scores."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nami_lightning.cli.argument_types import positive

if TYPE_CHECKING:
    from nami_lightning.evaluation.generate import ImageFolder
    from nami_lightning.evaluation.prompts import Item

IMAGES = {"geneval": 4, "dpg": 4, "nami1k": 1}
"""Images of each prompt, as the benchmarks' own rules say."""

GRID_SIDE = 384
RATINGS = "ratings"

DESCRIPTION = """\
Draw a benchmark's prompts and judge the images. RUN is a run (folder, or name below runs/), a saved pipeline's folder,
or any text-to-image pipeline of diffusers by its Hugging Face name. The same command again goes on where it stopped."""

EXAMPLES = """\
examples:
  lightning evaluate nami_2b black-forest-labs/FLUX.1-dev --benchmark geneval --dtype bfloat16     Table 3
  lightning evaluate nami_2b --benchmark dpg --questions dpg_bench.csv --judge Salesforce/blip-vqa-base    Table 4
  lightning evaluate nami_2b flux --benchmark nami1k --prompts prompts.jsonl --annotate            pages for raters
  lightning evaluate --benchmark nami1k --ratings answers-*.json                                  Table 5
  lightning evaluate nami_2b flux --benchmark nami1k --grid 6                                     Appendix D
  lightning evaluate --benchmark nami1k --describe                                                Figures 5, 9 and 10

Models that need other settings: one command each, then one for all, without settings: each keeps its own.
All is in OUT/BENCHMARK: images and results.json of each model, and what the options below write.
"""

OWN_OPTIONS = {
    "geneval": ("detector", "clip"),
    "dpg": ("questions", "judge"),
    "nami1k": ("annotate", "ratings", "raters", "raters_each", "page_images", "page_side"),
}
"""Options of one benchmark alone. ``--prompts`` is of two, and ``--questions`` may describe beside another."""

PROMPTS = ("prompts", "questions")
DRAWING = (
    *("names", "limit", "batch_size"),
    *("steps", "guidance_scale", "negative_prompt", "solver", "height", "width", "seed", "dtype"),
)
USES = {
    "describe": (*PROMPTS, "topic_encoder"),
    "ratings": (),
    "annotate": (*PROMPTS, *DRAWING, "images", "raters", "raters_each", "page_images", "page_side"),
    "grid": (*PROMPTS, *DRAWING, "grid_side"),
    "draw_only": (*PROMPTS, *DRAWING, "images"),
    "": (*PROMPTS, *DRAWING, "images", "detector", "clip", "judge"),
}
"""What may be asked for, and the options that it takes; nothing: draw and judge."""


def add_command(commands: Any) -> None:
    """Add ``evaluate`` to the command line; an option that was not given is None, or False."""
    parser = commands.add_parser(
        "evaluate",
        help="benchmarks of generation: GenEval, DPG-Bench, NAMI-1K, grids",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(execute=evaluate)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="models to evaluate")
    parser.add_argument("--benchmark", required=True, choices=list(IMAGES))
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the models, in tables and folders (RUN's own)")
    parser.add_argument("--out", default="evaluation", metavar="DIR", help="where all goes (default: evaluation)")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N prompts of each kind, for a quick look"
    )

    drawing = parser.add_argument_group("drawing", "What is left out is the pipeline's own default.")
    drawing.add_argument(
        "--images", type=positive, metavar="N", help="of each prompt (geneval 4, dpg 4, nami1k 1; a grid shows 1)"
    )
    drawing.add_argument("--steps", type=positive, nargs="+", help="one number; for a NAMI also one a stage")
    drawing.add_argument("--guidance_scale", type=float)
    drawing.add_argument("--negative_prompt", metavar="TEXT")
    drawing.add_argument("--solver", choices=["euler", "heun", "multistep"], help="of a NAMI")
    drawing.add_argument("--height", type=positive, metavar="PX")
    drawing.add_argument("--width", type=positive, metavar="PX")
    drawing.add_argument("--seed", type=int, help="of each prompt's first image; the next has the next (default 42)")
    drawing.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="number type of the network")
    drawing.add_argument("--batch_size", type=positive, help="images drawn at once (default 4)")
    drawing.add_argument("--draw_only", action="store_true", help="draw, and judge another time")

    geneval = parser.add_argument_group("geneval")
    geneval.add_argument(
        "--detector", metavar="NAME", help="a Mask2Former of COCO's instances (Facebook's, with Swin-S)"
    )
    geneval.add_argument("--clip", metavar="NAME", help="for colours (OpenAI's ViT-L/14)")

    dpg = parser.add_argument_group("dpg")
    dpg.add_argument("--questions", metavar="FILE", help="the benchmark's dpg_bench.csv")
    dpg.add_argument("--judge", metavar="NAME", help="a model of transformers that answers questions about images")

    nami1k = parser.add_argument_group("nami1k")
    nami1k.add_argument(
        "--prompts",
        metavar="FILE",
        help='JSON lines with "id", "kind" (open, human, long), "prompt", "topic" (the paper\'s 15 examples); '
        "for dpg a folder of ITEM.txt, instead of the question file's texts",
    )
    nami1k.add_argument("--annotate", action="store_true", help="write pages on which people rate the images")
    nami1k.add_argument("--raters", type=positive, metavar="N", help="people who rate (default 5)")
    nami1k.add_argument("--raters_each", type=positive, metavar="N", help="of them, for each image (all)")
    nami1k.add_argument("--page_images", type=positive, metavar="N", help="images on a page (default 100)")
    nami1k.add_argument(
        "--page_side", type=positive, metavar="PX", help="longest side of an image on a page (default 768)"
    )
    nami1k.add_argument("--ratings", nargs="+", metavar="FILE", help="gather the raters' answers, and print Table 5")

    pictures = parser.add_argument_group("pictures")
    pictures.add_argument(
        "--grid", type=positive, metavar="N", help="N prompts with every model's image, in one picture"
    )
    pictures.add_argument(
        "--grid_side", type=positive, metavar="PX", help="longest side of an image in it (default 384)"
    )
    pictures.add_argument("--describe", action="store_true", help="how long the prompts are, and what about")
    pictures.add_argument("--topic_encoder", metavar="NAME", help="finds topics that aren't stated: all-MiniLM-L6-v2")


def check_options(options: Namespace) -> None:
    """Refuse options that don't go together: none is silently ignored.

    Raises:
        ValueError: naming them.
    """
    for benchmark, names in OWN_OPTIONS.items():
        described = ("questions",) if options.describe else ()
        for name in names:
            if benchmark != options.benchmark and name not in described:
                _refuse(options, name, f"is of --benchmark {benchmark}")
    if options.benchmark == "geneval":
        _refuse(options, "prompts", "is of nami1k and dpg: GenEval's prompts are fixed")
    if options.benchmark == "dpg" and not options.questions:
        raise ValueError("--benchmark dpg needs --questions dpg_bench.csv, from github.com/TencentQQGYLab/ELLA")
    chosen = [name for name in USES if name and getattr(options, name)]
    if len(chosen) > 1:
        raise ValueError(f"--{chosen[0]} and --{chosen[1]} are two commands: give them one after the other")
    mode = chosen[0] if chosen else ""
    for name in sorted({name for names in USES.values() for name in names} - set(USES[mode])):
        goes_with = " or ".join(f"--{other}" for other in USES if other and name in USES[other])
        _refuse(options, name, f"is not used with --{mode}" if mode else f"goes with {goes_with}")
    without_models = options.describe or options.ratings
    if bool(options.runs) == bool(without_models):
        raise ValueError(
            "no RUN goes with --describe or --ratings" if options.runs else "which RUN is to be evaluated?"
        )


def _refuse(options: Namespace, name: str, why: str) -> None:
    value = getattr(options, name)
    if value is not None and value is not False:
        raise ValueError(f"--{name} {why}")


def evaluate(options: Namespace) -> None:
    """Draw, then judge, or what the options ask for instead.

    Raises:
        ValueError: options that don't go together, and whatever the parts refuse.
        FileNotFoundError: a model or a file that isn't there.
    """
    from nami_lightning.evaluation.prompt_stats import describe
    from nami_lightning.evaluation.prompts import first_of_each_kind
    from nami_lightning.evaluation.side_by_side import spread

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
    from nami_lightning.evaluation.dpg.judge import read_questions
    from nami_lightning.evaluation.geneval.prompts import geneval_items
    from nami_lightning.evaluation.nami1k.prompts import read_prompts

    prompts = Path(options.prompts) if options.prompts and benchmark == options.benchmark else None
    if benchmark == "geneval":
        return geneval_items()
    if benchmark == "dpg":
        return read_questions(Path(options.questions), prompts)
    return read_prompts(prompts)


def _lists(options: Namespace) -> dict[str, list[Item]]:
    """The benchmark's prompts, beside those of the others that are at hand."""
    at_hand = {"geneval": True, "dpg": bool(options.questions), "nami1k": True}
    return {name: read_items(name, options) for name in IMAGES if at_hand[name]}


def draw_all(options: Namespace, out: Path, everything: Sequence[Item], chosen: Sequence[Item]) -> list[ImageFolder]:
    """Every model's images, one model after the other; the folders they are in."""
    import torch

    from nami_lightning.evaluation.generate import ImageFolder, Sampling, draw

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
    from nami_lightning.evaluation.nami1k.prompts import shares
    from nami_lightning.evaluation.results import write_json

    if options.benchmark == "nami1k" or options.draw_only:
        print(f"{len(items)} prompts are drawn: {', '.join(str(folder.folder) for folder in folders)}")
        if options.benchmark == "nami1k":
            print(f"{shares(items)}\nPeople judge them: the same command with --annotate writes their pages.")
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


def _judges(
    options: Namespace,
) -> tuple[Callable[[ImageFolder, Sequence[Item]], dict[str, Any]], dict[str, str], Callable[[Any], list[str]]]:
    """A benchmark's judge, the names of its models, and its table."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = _images(options)
    if options.benchmark == "dpg":
        from nami_lightning.evaluation.dpg import judge as dpg
        from nami_lightning.evaluation.dpg.models import QuestionJudge

        if not options.judge:
            raise ValueError("the images are drawn; give --judge, a model that answers questions about images")
        names = {"judge": options.judge}
        answer = QuestionJudge(options.judge, device)
        kept = names | {"answers": "text"}
        return lambda folder, items: dpg.judge_images(folder, items, images, answer, kept), names, dpg.lines
    from nami_lightning.evaluation.geneval import judge as geneval
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
    from nami_lightning.evaluation.nami1k.rating_pages import Plan, write_pages

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
    from nami_lightning.evaluation.nami1k import ratings
    from nami_lightning.evaluation.results import write_json

    key = ratings.read_key(out / RATINGS)
    answers = ratings.read_answers([Path(path) for path in options.ratings], key)
    summary = ratings.summarise(answers, key)
    write_json(out / RATINGS / "results.json", summary)
    print("\n".join(ratings.lines(summary)))
    print(f"{out / RATINGS / 'results.json'} holds all")


def grid(options: Namespace, out: Path, folders: Sequence[ImageFolder], items: Sequence[Item]) -> None:
    """One picture: a row a prompt, a column a model."""
    from nami_lightning.evaluation.side_by_side import side_by_side
    from nami_lightning.utils.image_grid import save_image

    seeds = {(folder.drawing or {}).get("seed") for folder in folders}
    if len(seeds) > 1:
        raise ValueError(f"the models' images were drawn from different seeds {seeds}: draw them anew with one --seed")
    path = out / "grid.png"
    save_image(side_by_side(folders, items, options.grid_side or GRID_SIDE), path)
    print(f"{len(items)} prompts of {len(folders)} models: {path}")


def _images(options: Namespace) -> int:
    return 1 if options.grid else options.images or IMAGES[options.benchmark]
