"""The options of ``lightning evaluate``, and which of them fit together."""

import argparse
from argparse import Namespace

from nami_lightning.cli.argument_types import (
    add_checkpoint_options,
    add_device_options,
    add_size_options,
    positive_int,
)

IMAGES_PER_PROMPT = {"geneval": 4, "dpg": 4, "nami1k": 1}
"""Number of images of each prompt, by the benchmarks' own rules."""

OWN_OPTIONS = {
    "geneval": ("detector", "clip"),
    "dpg": ("questions", "judge"),
    "nami1k": ("annotate", "ratings", "raters", "raters_each", "page_images", "page_side"),
}
"""Options of one benchmark alone; ``--prompts`` belongs to two, and ``--describe`` takes ``--questions`` too."""

PROMPT_OPTIONS = ("prompts", "questions")
GENERATION_OPTIONS = (
    *("names", "limit", "batch_size"),
    *("steps", "guidance_scale", "negative_prompt", "solver", "height", "width", "seed", "retry_not_finite"),
    *("step", "ema", "dtype", "device"),
)
OPTIONS_OF_ACTIONS = {
    "describe": (*PROMPT_OPTIONS, "topic_encoder"),
    "ratings": (),
    "annotate": (*PROMPT_OPTIONS, *GENERATION_OPTIONS, "images", "raters", "raters_each", "page_images", "page_side"),
    "grid": (*PROMPT_OPTIONS, *GENERATION_OPTIONS, "grid_side"),
    "draw_only": (*PROMPT_OPTIONS, *GENERATION_OPTIONS, "images"),
    "": (*PROMPT_OPTIONS, *GENERATION_OPTIONS, "images", "detector", "clip", "judge"),
}
"""For each option that chooses what to do, the options that go with it; "" is to generate and judge images."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of ``evaluate`` to its parser.

    An option that is not given has the value None.
    """
    parser.add_argument("runs", nargs="*", metavar="RUN", help="models to evaluate")
    parser.add_argument("--benchmark", required=True, choices=list(IMAGES_PER_PROMPT), help="the benchmark to use")
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="names of the models in tables and folders (default: each RUN's own name)",
    )
    parser.add_argument(
        "--output",
        default="evaluation",
        metavar="DIR",
        help="folder of all files that are written (default: evaluation)",
    )
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="use only the first N prompts of each kind, for a quick look"
    )
    _add_generation_options(parser)
    _add_judge_options(parser)
    _add_rating_options(parser)
    _add_picture_options(parser)


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    generation = parser.add_argument_group(
        "generation", "If an option is left out, the pipeline's own default applies."
    )
    generation.add_argument(
        "--images",
        type=positive_int,
        metavar="N",
        help="number of images per prompt (default: geneval 4, dpg 4, nami1k 1; a grid shows 1)",
    )
    generation.add_argument(
        "--steps",
        type=positive_int,
        nargs="+",
        help="solver steps: their number, which a NAMI shares out over its stages, or for a NAMI one number per stage",
    )
    generation.add_argument(
        "--guidance_scale",
        type=float,
        nargs="+",
        help="weight of classifier-free guidance, for a NAMI also one number per stage; 1 is off",
    )
    generation.add_argument("--negative_prompt", metavar="TEXT", help="prompt that guidance leads away from")
    generation.add_argument("--solver", choices=["euler", "heun", "multistep"], help="ODE solver of a NAMI")
    add_size_options(generation)
    generation.add_argument(
        "--seed", type=int, help="seed of each prompt's first image; image i uses seed + i (default 42)"
    )
    generation.add_argument(
        "--batch_size",
        type=positive_int,
        help="number of images generated at once (default 4). It does not change the noise of an image; rounding may "
        "change a pixel by 1 of 255 levels in float32, by more in half precision",
    )
    generation.add_argument(
        "--retry_not_finite",
        action="store_true",
        default=None,
        help="generate those images again that had NaN or infinite values before, on another device for example",
    )
    add_checkpoint_options(generation)
    add_device_options(generation)
    generation.add_argument(
        "--draw_only", action="store_true", default=None, help="generate the images, but don't judge them"
    )


def _add_judge_options(parser: argparse.ArgumentParser) -> None:
    geneval = parser.add_argument_group("geneval")
    geneval.add_argument(
        "--detector",
        metavar="NAME",
        help="detector, a Mask2Former for COCO's instances (default: Facebook's, with Swin-S)",
    )
    geneval.add_argument("--clip", metavar="NAME", help="CLIP that classifies the colours (default: OpenAI's ViT-L/14)")

    dpg = parser.add_argument_group("dpg")
    dpg.add_argument("--questions", metavar="FILE", help="file of the questions, the benchmark's dpg_bench.csv")
    dpg.add_argument("--judge", metavar="NAME", help="model of transformers that answers questions about images")


def _add_rating_options(parser: argparse.ArgumentParser) -> None:
    nami1k = parser.add_argument_group("nami1k")
    nami1k.add_argument(
        "--prompts",
        metavar="FILE",
        help='file of prompts, JSON lines with "id", "kind" (open, human, long), "prompt" and "topic" (default: the '
        "paper's 15 examples); for dpg a folder of ITEM.txt that replaces the prompts of the question file",
    )
    nami1k.add_argument(
        "--annotate", action="store_true", default=None, help="write pages on which people rate the images"
    )
    nami1k.add_argument("--raters", type=positive_int, metavar="N", help="number of people who rate (default 5)")
    nami1k.add_argument(
        "--raters_each", type=positive_int, metavar="N", help="number of raters for each image (default: all)"
    )
    nami1k.add_argument(
        "--page_images", type=positive_int, metavar="N", help="number of images on a page (default 100)"
    )
    nami1k.add_argument(
        "--page_side", type=positive_int, metavar="PX", help="longest side of an image on a page (default 768)"
    )
    nami1k.add_argument(
        "--ratings", nargs="+", metavar="FILE", help="read the raters' saved answers, and print Table 5"
    )


def _add_picture_options(parser: argparse.ArgumentParser) -> None:
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument(
        "--grid", type=positive_int, metavar="N", help="write one picture with every model's image of N prompts"
    )
    pictures.add_argument(
        "--grid_side", type=positive_int, metavar="PX", help="longest side of an image in the grid (default 384)"
    )
    pictures.add_argument(
        "--describe",
        action="store_true",
        default=None,
        help="print and plot how long the prompts are, and their topics",
    )
    pictures.add_argument(
        "--topic_encoder",
        metavar="NAME",
        help="text encoder that finds topics that aren't stated, all-MiniLM-L6-v2 for example",
    )


def check_options(options: Namespace) -> None:
    """Check that the options fit together, so that none is silently ignored.

    Raises:
        ValueError: two options don't fit together; the message names them.
    """
    for benchmark, names in OWN_OPTIONS.items():
        described = ("questions",) if options.describe else ()
        for name in names:
            if benchmark != options.benchmark and name not in described:
                _refuse_option(options, name, f"belongs to --benchmark {benchmark}")
    if options.benchmark == "geneval":
        _refuse_option(options, "prompts", "belongs to nami1k and dpg: GenEval's prompts are fixed")
    if options.benchmark == "dpg" and not options.questions:
        raise ValueError("--benchmark dpg needs --questions dpg_bench.csv, from github.com/TencentQQGYLab/ELLA")
    chosen = [name for name in OPTIONS_OF_ACTIONS if name and getattr(options, name)]
    if len(chosen) > 1:
        raise ValueError(f"--{chosen[0]} and --{chosen[1]} can't be combined: run one command for each")
    action = chosen[0] if chosen else ""
    for name in sorted(
        {name for names in OPTIONS_OF_ACTIONS.values() for name in names} - set(OPTIONS_OF_ACTIONS[action])
    ):
        goes_with = " or ".join(
            f"--{other}" for other in OPTIONS_OF_ACTIONS if other and name in OPTIONS_OF_ACTIONS[other]
        )
        _refuse_option(options, name, f"can't be used with --{action}" if action else f"needs {goes_with}")
    needs_no_run = options.describe or options.ratings
    if bool(options.runs) == bool(needs_no_run):
        raise ValueError(
            "--describe and --ratings take no RUN" if options.runs else "no RUN is given: name at least one to evaluate"
        )


def _refuse_option(options: Namespace, name: str, why: str) -> None:
    if getattr(options, name) is not None:
        raise ValueError(f"--{name} {why}")
