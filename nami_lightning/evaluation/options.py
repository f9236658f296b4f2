"""The options of ``lightning evaluate``, and which of them go together. Imports nothing heavy."""

import argparse
from argparse import Namespace

from nami_lightning.numbers import positive

BENCHMARKS = ("geneval", "dpg", "nami1k")

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


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """All options; one that was not given is None, or False."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="models to evaluate")
    parser.add_argument("--benchmark", required=True, choices=BENCHMARKS)
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
