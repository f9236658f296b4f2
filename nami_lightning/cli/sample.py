"""``lightning sample``: generate images from prompts, with a run's checkpoint or a saved pipeline."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import (
    add_checkpoint_options,
    add_device_options,
    add_size_options,
    one_or_all,
    positive_int,
)

GRID_ROWS = 8
GRID_SIDE = 512
"""Longest side of an image on a grid, in px."""


def add_command(commands: Any) -> None:
    """Add ``sample`` to the command line."""
    parser = commands.add_parser(
        "sample",
        help="generate images from prompts",
        description="Generate images from prompts. They are written one after the other as 00000.png, 00001.png, ..., "
        f"and together as grid.png; with more than {GRID_ROWS} rows the grid goes on in grid-2.png, and so on.",
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run (its folder, or its name below runs/), or the folder of a saved pipeline"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="prompt to generate; may be given several times"
    )
    parser.add_argument("--prompts", metavar="FILE", help="text file with one prompt per line, in UTF-8 or UTF-16")
    parser.add_argument("--negative_prompt", default="", metavar="TEXT", help="prompt that guidance leads away from")
    parser.add_argument(
        "--output", default="drawn", metavar="DIR", help="folder of the PNGs and grid.png (default: drawn)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove the images that an earlier command left in the folder (NNNNN.png and grid*.png)",
    )
    parser.add_argument("--images", type=positive_int, default=1, help="number of images per prompt (default 1)")
    parser.add_argument(
        "--steps",
        type=positive_int,
        nargs="+",
        help="solver steps: their number, shared out over the stages, or one number per stage (default: the model's)",
    )
    parser.add_argument(
        "--guidance_scale",
        type=float,
        nargs="+",
        help="weight of classifier-free guidance, one number or one per stage; 1 is off (default: the model's)",
    )
    parser.add_argument(
        "--solver",
        choices=["euler", "heun", "multistep"],
        help="ODE solver (default: the model's, euler if it has none)",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FOLDER[:WEIGHT]",
        help="LoRA to draw with, and its weight (default 1); may be given several times",
    )
    add_size_options(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first image; image i uses seed + i (default 0)"
    )
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        default=16,
        help="number of images generated at once (default 16). It does not change the noise of an image; rounding may "
        "change a pixel by 1 of 255 levels in float32, by more in half precision",
    )
    parser.add_argument(
        "--columns", type=positive_int, default=8, help="number of images in a row of the grid (default 8)"
    )
    add_checkpoint_options(parser)
    add_device_options(parser)
    parser.set_defaults(execute=sample)


def sample(options: Namespace) -> None:
    """Write one PNG per image as it is generated, and grids of all.

    Raises:
        ValueError: there is no prompt, or the pipeline is not a NAMI's, or an option doesn't fit the model.
        FileExistsError: the output folder holds images of an earlier command.
    """
    import torch

    from nami_lightning.pipelines.lora import load_loras
    from nami_lightning.pipelines.nami_pipeline import NamiPipeline
    from nami_lightning.runs.load import load_pipeline
    from nami_lightning.utils.image_grid import caption_grid, save_image

    prompts = read_prompts(options)
    folder = Path(options.output)
    earlier = find_images(folder)
    if earlier and not options.overwrite:
        raise FileExistsError(
            f"{folder} holds {len(earlier)} image(s) of an earlier command: give another --output, or --overwrite to "
            "remove them"
        )
    pipeline: Any = load_pipeline(options.run, options.dtype, options.step, options.ema is not False, options.device)
    if not isinstance(pipeline, NamiPipeline):
        raise ValueError(f"{options.run} is a {type(pipeline).__name__}; lightning sample takes only a NAMI")
    load_loras(pipeline, options.lora)

    grids = 0
    shown: list[Any] = []
    in_grid = options.columns * GRID_ROWS
    for first in range(0, len(prompts), options.batch_size):
        batch = prompts[first : first + options.batch_size]
        seeds = range(options.seed + first, options.seed + first + len(batch))
        images = pipeline(
            batch,
            negative_prompt=options.negative_prompt,
            height=options.height,
            width=options.width,
            num_inference_steps=one_or_all(options.steps),
            guidance_scale=one_or_all(options.guidance_scale),
            solver=options.solver,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        if first == 0:
            for path in earlier:
                path.unlink()
        for i, image in enumerate(images, first):
            save_image(image, folder / f"{i:05d}.png")
            image.thumbnail((GRID_SIDE, GRID_SIDE))
            shown.append(image)
            if len(shown) == in_grid or i == len(prompts) - 1:
                captions = prompts[i + 1 - len(shown) : i + 1]
                name = f"grid-{grids + 1}.png" if grids else "grid.png"
                save_image(caption_grid(shown, captions, options.columns), folder / name)
                grids, shown = grids + 1, []
    print(f"{len(prompts)} image(s) and {'grid.png' if grids == 1 else f'{grids} grids'} in {folder}")


def read_prompts(options: Namespace) -> list[str]:
    """Return the prompt of each image, from ``--prompt``, ``--prompts`` and ``--images``.

    Raises:
        ValueError: there is none, or the file is not text.
    """
    from nami_lightning.utils.text_files import read_lines

    prompts = list(options.prompt)
    if options.prompts:
        prompts += [line.strip() for line in read_lines(Path(options.prompts)) if line.strip()]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT, or --prompts FILE with one prompt per line")
    return [prompt for prompt in prompts for _ in range(options.images)]


def find_images(folder: Path) -> list[Path]:
    """Return the images that an earlier command wrote to a folder.

    Raises:
        NotADirectoryError: there is a file in the folder's place.
    """
    if not folder.exists():
        return []
    names = re.compile(r"\d{5,}\.png|grid(-\d+)?\.png")
    return sorted(path for path in folder.iterdir() if names.fullmatch(path.name))
