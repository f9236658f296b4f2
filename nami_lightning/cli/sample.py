"""``lightning sample``: generate images from prompts, with a run's checkpoint or a saved pipeline."""

import re
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from nami_lightning.cli.argument_types import (
    add_checkpoint_options,
    add_device_options,
    add_size_options,
    one_or_all,
    parse_shard,
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
        "with their settings in the PNG; then index.jsonl with a line for each, and all together as grid.png; with "
        f"more than {GRID_ROWS} rows the grid goes on in grid-2.png, and so on. After an interruption the same command "
        "goes on where it was.",
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run (its folder, or its name below runs/), or the folder of a saved pipeline"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="prompt to generate; may be given several times"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="text file with one prompt per line, in UTF-8 or UTF-16; or .jsonl or .csv with prompt and, where they "
        "differ from the options, seed, negative_prompt, height, width, steps, guidance_scale, solver",
    )
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="generate only every N-th image, from image I on: run the command with 0/N to N-1/N on as many processes",
    )
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
    """Write one PNG per image as it is generated, then an index and grids of all; what is there already stays.

    Raises:
        ValueError: there is no prompt, or the pipeline is not a NAMI's, or an option doesn't fit the model.
        FileExistsError: the output folder holds images of another command.
        RuntimeError: images that are NaN or infinite; all others are written.
    """
    from nami_lightning.pipelines.image_rows import batches, save_with_settings
    from nami_lightning.pipelines.lora import load_loras
    from nami_lightning.pipelines.nami_pipeline import NamiPipeline
    from nami_lightning.runs.load import load_pipeline

    rows = read_prompts(options)
    folder = Path(options.output)
    expected = {f"{number:05d}.png": settings_of(row, options) for number, row in enumerate(rows)}
    earlier = find_images(folder)
    kept = set() if options.overwrite else keep(folder, earlier, expected)
    index, shards = parse_shard(options.shard)
    missing = [(n, row) for n, row in enumerate(rows) if f"{n:05d}.png" not in kept and n % shards == index]
    begin, failures = perf_counter(), []
    if missing:
        pipeline: Any = load_pipeline(
            options.run, options.dtype, options.step, options.ema is not False, options.device
        )
        if not isinstance(pipeline, NamiPipeline):
            raise ValueError(f"{options.run} is a {type(pipeline).__name__}; lightning sample takes only a NAMI")
        load_loras(pipeline, options.lora)
        begin = perf_counter()
        for batch in batches(missing, options.batch_size):
            images, failed = generate(pipeline, batch)
            failures += failed
            for path in earlier if options.overwrite else ():
                path.unlink(missing_ok=True)
            for (number, _), image in zip(batch, images, strict=True):
                if image is not None:
                    name = f"{number:05d}.png"
                    save_with_settings(image, folder / name, expected[name])
    seconds = perf_counter() - begin
    drawn = len(missing) - len(failures)
    speed = f", {drawn / seconds:.2f} images/s" if drawn else ""
    if all((folder / name).exists() for name in expected):
        grids = write_index_and_grids(folder, expected, options.columns)
        print(f"{len(rows)} image(s) and {'grid.png' if grids == 1 else f'{grids} grids'} in {folder}{speed}")
    else:
        print(f"{drawn} image(s) in {folder}{speed}; index.jsonl and grid.png are written once all are there")
    if failures:
        raise RuntimeError(f"{len(failures)} image(s) were not finite and are not written: {'; '.join(failures[:3])}")


def generate(pipeline: Any, batch: list[tuple[int, Any]]) -> tuple[list[Any], list[str]]:
    """Return a batch's images, None for those that are not finite, and what those were."""
    import torch

    from nami_lightning.pipelines.checks import NonFiniteImages

    rows = [row for _, row in batch]
    try:
        output = pipeline(
            [row.prompt for row in rows],
            negative_prompt=[row.negative_prompt or "" for row in rows],
            generator=[torch.Generator().manual_seed(row.seed) for row in rows],
            **rows[0].settings,
        )
    except NonFiniteImages as error:
        images = [None if i in error.origins else image for i, image in enumerate(error.images)]
        return images, [f"prompt {rows[i].prompt!r}, seed {rows[i].seed}" for i in error.origins]
    return output.images, []


def settings_of(row: Any, options: Namespace) -> dict[str, Any]:
    """Return what an image is drawn with, as its PNG tells it."""
    return asdict(row) | {
        "model": options.run,
        "step": options.step,
        "ema": options.ema is not False,
        "dtype": options.dtype,
        "lora": options.lora,
    }


def keep(folder: Path, earlier: list[Path], expected: dict[str, dict[str, Any]]) -> set[str]:
    """Return the names of the images that are there already.

    Raises:
        FileExistsError: images of another command are in the folder.
    """
    from nami_lightning.pipelines.image_rows import read_settings

    kept = set()
    for path in [path for path in earlier if not path.name.startswith("grid")]:
        found, wanted = read_settings(path), expected.get(path.name)
        if found != wanted or wanted is None:
            differing = [name for name in wanted or () if (found or {}).get(name) != (wanted or {})[name]]
            why = f" ({path.name} differs in {differing[0]})" if found and differing else ""
            raise FileExistsError(
                f"{folder} holds {len(earlier)} image(s) of an earlier command{why}: give another --output, or "
                "--overwrite to remove them"
            )
        kept.add(path.name)
    return kept


def write_index_and_grids(folder: Path, expected: dict[str, dict[str, Any]], columns: int) -> int:
    """Write ``index.jsonl`` and the grids from the images on the disk; return the number of grids."""
    import json

    from PIL import Image

    from nami_lightning.utils.atomic_write import write_text
    from nami_lightning.utils.image_grid import caption_grid, save_image

    lines = [json.dumps({"file": name} | settings, ensure_ascii=False) for name, settings in expected.items()]
    write_text(folder / "index.jsonl", "\n".join(lines) + "\n")
    names, page = list(expected), columns * GRID_ROWS
    pages = range(0, len(names), page)
    for number, first in enumerate(pages, 1):
        shown = []
        for name in names[first : first + page]:
            with Image.open(folder / name) as image:
                image.thumbnail((GRID_SIDE, GRID_SIDE))
                shown.append(image.convert("RGB"))
        captions = [expected[name]["prompt"] for name in names[first : first + page]]
        name = "grid.png" if number == 1 else f"grid-{number}.png"
        save_image(caption_grid(shown, captions, columns), folder / name)
    return len(pages)


def read_prompts(options: Namespace) -> list[Any]:
    """Return a row for each image, from ``--prompt``, ``--prompts`` and ``--images``.

    Raises:
        ValueError: there is none, or the file holds something else.
    """
    from nami_lightning.pipelines.image_rows import ImageRow, read_rows

    rows = [ImageRow(prompt) for prompt in options.prompt]
    if options.prompts:
        rows += read_rows(Path(options.prompts))
    if not rows:
        raise ValueError("no prompt: give --prompt TEXT, or --prompts FILE with one prompt per line")
    stated = {
        "negative_prompt": options.negative_prompt,
        "height": options.height,
        "width": options.width,
        "steps": one_or_all(options.steps),
        "guidance_scale": one_or_all(options.guidance_scale),
        "solver": options.solver,
    }
    images = [(row, copy) for row in rows for copy in range(options.images)]
    return [
        replace(row.over(stated), seed=options.seed + number if row.seed is None else row.seed + copy)
        for number, (row, copy) in enumerate(images)
    ]


def find_images(folder: Path) -> list[Path]:
    """Return the images that an earlier command wrote to a folder.

    Raises:
        NotADirectoryError: there is a file in the folder's place.
    """
    if not folder.exists():
        return []
    names = re.compile(r"\d{5,}\.png|grid(-\d+)?\.png")
    return sorted(path for path in folder.iterdir() if names.fullmatch(path.name))
