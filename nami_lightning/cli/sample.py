"""``lightning sample``: generate images from prompts, with a run's newest checkpoint or a saved pipeline."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from nami_lightning.cli.argument_types import positive_int


def add_command(commands: Any) -> None:
    """Add ``sample`` to the command line."""
    parser = commands.add_parser(
        "sample", help="generate images from prompts", description="Generate images from prompts."
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run (its folder, or its name below runs/), or the folder of a saved pipeline"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="prompt to generate; may be given several times"
    )
    parser.add_argument("--prompts", metavar="FILE", help="text file with one prompt per line")
    parser.add_argument("--negative_prompt", default="", metavar="TEXT", help="prompt that guidance leads away from")
    parser.add_argument(
        "--out", default="drawn", metavar="DIR", help="folder of the PNGs and grid.png (default: drawn)"
    )
    parser.add_argument("--images", type=positive_int, default=1, help="number of images per prompt (default 1)")
    parser.add_argument(
        "--steps",
        type=positive_int,
        nargs="+",
        default=[10],
        help="solver steps of each stage: one number, or one per stage (default 10)",
    )
    parser.add_argument(
        "--guidance_scale", type=float, default=3.5, help="weight of classifier-free guidance; 1 is off (default 3.5)"
    )
    parser.add_argument(
        "--solver", choices=["euler", "heun", "multistep"], default="multistep", help="ODE solver (default multistep)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first image; image i uses seed + i (default 0)"
    )
    parser.add_argument(
        "--batch_size", type=positive_int, default=16, help="number of images generated at once (default 16)"
    )
    parser.add_argument(
        "--columns", type=positive_int, default=8, help="number of images in a row of the grid (default 8)"
    )
    parser.set_defaults(execute=sample)


def sample(options: Namespace) -> None:
    """Write one PNG per image, and a grid of all.

    Raises:
        ValueError: there is no prompt, or the pipeline is not a NAMI's.
    """
    import torch

    from nami_lightning.models.pipeline import NamiPipeline
    from nami_lightning.runs.load import load_pipeline
    from nami_lightning.utils.image_grid import caption_grid, save_image

    prompts = list(options.prompt)
    if options.prompts:
        prompts += [
            line.strip() for line in Path(options.prompts).read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT, or --prompts FILE with one prompt per line")
    pipeline: Any = load_pipeline(options.run)
    if not isinstance(pipeline, NamiPipeline):
        raise ValueError(f"{options.run} is a {type(pipeline).__name__}; lightning sample takes only a NAMI")
    prompts = [prompt for prompt in prompts for _ in range(options.images)]
    images: list[Any] = []
    for first in range(0, len(prompts), options.batch_size):
        batch = prompts[first : first + options.batch_size]
        seeds = range(options.seed + first, options.seed + first + len(batch))
        images += pipeline(
            batch,
            negative_prompt=options.negative_prompt,
            num_inference_steps=options.steps[0] if len(options.steps) == 1 else options.steps,
            guidance_scale=options.guidance_scale,
            solver=options.solver,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
    out = Path(options.out)
    for i, image in enumerate(images):
        save_image(image, out / f"{i:05d}.png")
    save_image(caption_grid(images, prompts, options.columns), out / "grid.png")
    print(f"{len(images)} image(s) and grid.png in {out}")
