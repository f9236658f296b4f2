"""``lightning sample``: generate images from prompts, with a run's checkpoint or a saved pipeline."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from nami_lightning.cli.argument_types import (
    add_checkpoint_options,
    add_device_options,
    add_size_options,
    one_or_all,
    parse_shard,
    positive_int,
    utf8_text,
)
from nami_lightning.cli.sample_folder import GRID_ROWS, find_images, image_name, keep, remove, write_index_and_grids
from nami_lightning.cli.sample_processes import start_processes

if TYPE_CHECKING:
    from nami_lightning.pipelines.image_rows import ImageRow

    Jobs = Sequence[tuple[int, ImageRow]]
    """Images to draw: their numbers and rows."""


def add_command(commands: Any) -> None:
    """Add ``sample`` to the command line."""
    parser = commands.add_parser(
        "sample",
        help="generate images from prompts",
        description="Generate images from prompts. They are written one after the other as 00000.png, 00001.png, ..., "
        "with their settings in the PNG; then index.jsonl with a line for each, and all together as grid.png; with "
        f"more than {GRID_ROWS} rows the grid goes on in grid-2.png, and so on. After an interruption the same command "
        "draws what is missing; with other settings it refuses the folder, and names the first that differs.",
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run (its folder, or its name below runs/), or a text-to-image pipeline of diffusers: its folder or "
        "Hugging Face name",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        type=utf8_text,
        default=[],
        metavar="TEXT",
        help="prompt to generate; may be given several times",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts in UTF-8 or UTF-16: .txt with one per line; or .jsonl or .csv with prompt and, for the rows that "
        "differ from the options, seed, negative_prompt, height, width, steps, guidance_scale, solver",
    )
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="generate only every N-th image, from image I on: run the command with 0/N to N-1/N on as many machines "
        "that share the folder",
    )
    parser.add_argument(
        "--processes",
        type=positive_int,
        default=1,
        metavar="N",
        help="generate in N processes on this machine, each with its own copy of the model; on a machine with GPUs "
        "each takes the next GPU (default 1)",
    )
    parser.add_argument(
        "--negative_prompt",
        type=utf8_text,
        metavar="TEXT",
        help="prompt that guidance leads away from (default: empty)",
    )
    parser.add_argument(
        "--output", default="drawn", metavar="DIR", help="folder of the PNGs and grid.png (default: drawn)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove the images that an earlier command left in the folder (NNNNN.png, grid*.png, index.jsonl), and "
        "draw all; to go on after an interruption of this, leave it out",
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
        help="ODE solver of a NAMI (default: the model's, euler if it has none)",
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
        help="number of images that a process generates at once (default 16). It does not change the noise of an "
        "image; rounding may change a pixel by 1 of 255 levels in float32, by more in half precision",
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
        ValueError: there is no prompt, or an option doesn't fit the model.
        FileExistsError: the output folder holds images of another command.
        RuntimeError: images that are NaN or infinite, all others are written; or one of several processes failed.
    """
    from tqdm import tqdm

    from nami_lightning.utils.atomic_write import remove_partials

    rows, folder = read_prompts(options), Path(options.output)
    weights = describe_weights(options)
    index, shards = parse_shard(options.shard)
    remove_partials(folder)
    earlier = find_images(folder)
    kept = set() if options.overwrite else keep(folder, earlier, [row.asked | weights for row in rows])
    mine = range(index, len(rows), shards)
    jobs = [(number, rows[number]) for number in mine if number not in kept]
    failures: list[str] = []
    speed = ""
    if jobs:
        with start_drawing(options, weights, jobs) as results:
            remove(folder, [number for number in earlier if options.overwrite and number % shards == index])
            begin = perf_counter()
            for failure in tqdm(results, total=len(mine), initial=len(mine) - len(jobs), unit="image"):
                failures += [failure] if failure else []
        drawn, seconds = len(jobs) - len(failures), perf_counter() - begin
        speed = f"; {drawn} drawn in {seconds:.1f} s, {drawn / seconds:.2f} images/s"
    there = sorted(set(find_images(folder)).intersection(range(len(rows))))
    if there and (shards == 1 or len(there) == len(rows)):
        grids = write_index_and_grids(folder, there, options.columns)
        names = "grid.png" if grids == 1 else f"{grids} grids"
        print(f"{len(there)} image(s) and {names} in {folder}{speed}")
    else:
        more = "" if failures else "; index.jsonl and grid.png are written once all shards are done"
        print(f"{len(there)} image(s) of {len(rows)} in {folder}{speed}{more}")
    if failures:
        raise RuntimeError(f"{len(failures)} image(s) were not finite and are not written: {'; '.join(failures[:3])}")


# --- what to draw ------------------------------------------------------------------------------


def read_prompts(options: Namespace) -> list[ImageRow]:
    """Return a row for each image, from ``--prompt``, ``--prompts`` and ``--images``.

    Raises:
        ValueError: there is none, or the file holds something else, or a seed is too large.
    """
    from nami_lightning.pipelines.image_rows import ImageRow, read_rows

    rows = [ImageRow(prompt) for prompt in options.prompt]
    if options.prompts:
        rows += read_rows(Path(options.prompts))
    if not rows:
        raise ValueError("no prompt: give --prompt TEXT, or --prompts FILE with one prompt per line")
    stated = stated_settings(options)
    images = [(row, copy) for row in rows for copy in range(options.images)]
    seeded = [
        replace(row.over(stated), seed=options.seed + number if row.seed is None else row.seed + copy)
        for number, (row, copy) in enumerate(images)
    ]
    if outside := [row.seed for row in seeded if row.seed is None or not -(2**63) <= row.seed < 2**63]:
        raise ValueError(f"--seed: the images' seeds must be whole numbers of 64 bits; one is {outside[0]}")
    return seeded


def stated_settings(options: Namespace) -> dict[str, Any]:
    """Return what the options say of all rows; None is left to the pipeline."""
    return {
        "negative_prompt": options.negative_prompt,
        "height": options.height,
        "width": options.width,
        "steps": one_or_all(options.steps),
        "guidance_scale": one_or_all(options.guidance_scale),
        "solver": options.solver,
    }


def describe_weights(options: Namespace) -> dict[str, Any]:
    """Return the weights that draw, as the images' PNGs name them."""
    from nami_lightning.pipelines.lora import split_weight
    from nami_lightning.runs.load import identify_weights

    loras = [
        {"lora": source, "weight": weight, "weights": identify_weights(source)}
        for source, weight in map(split_weight, options.lora)
    ]
    return {
        "model": options.run,
        "weights": identify_weights(options.run, options.step, options.ema is not False),
        "dtype": options.dtype,
        "lora": loras or None,
    }


# --- drawing -----------------------------------------------------------------------------------


@contextmanager
def start_drawing(options: Namespace, weights: dict[str, Any], jobs: Jobs) -> Iterator[Iterator[str | None]]:
    """Load the model in one or several processes; yield an iterator that draws, see :func:`draw`."""
    start = partial(load_and_draw, options, weights)
    parts = [jobs[number :: options.processes] for number in range(min(options.processes, len(jobs)))]
    if len(parts) == 1:
        yield start(jobs, 0)
    else:
        with start_processes(start, parts) as results:
            yield results


def load_and_draw(options: Namespace, weights: dict[str, Any], jobs: Jobs, process: int) -> Iterator[str | None]:
    """Load the model, check that it takes all settings, and return an iterator that draws.

    Args:
        options: of the command.
        weights: those that draw, as the PNGs name them.
        jobs: the images of this process.
        process: its number.

    Raises:
        ValueError: an option, a row or a LoRA doesn't fit the model.
    """
    import torch

    from nami_lightning.pipelines.lora import load_loras
    from nami_lightning.runs.load import load_pipeline

    device = options.device
    if options.processes > 1 and device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{process % torch.cuda.device_count()}"
    pipeline = load_pipeline(options.run, options.dtype, options.step, options.ema is not False, device)
    pipeline.set_progress_bar_config(disable=True)
    check_rows(pipeline, options, jobs)
    load_loras(pipeline, options.lora)
    return draw(pipeline, jobs, options.batch_size, Path(options.output), weights)


def check_rows(pipeline: Any, options: Namespace, jobs: Jobs) -> None:
    """Check that the model takes the settings of all rows, before anything runs.

    Raises:
        ValueError: it doesn't; the message names the file and line of a row, if the options alone would fit.
    """
    from nami_lightning.pipelines.batch import check_settings
    from nami_lightning.pipelines.image_rows import ImageRow

    def fault(row: ImageRow) -> ValueError | None:
        try:
            check_settings(pipeline, options.run, call_settings(row))
        except ValueError as error:
            return error
        return None

    different = {json.dumps(call_settings(row)): row for _, row in reversed(jobs)}
    for row in different.values():
        if (error := fault(row)) is None:
            continue
        if not row.place or fault(ImageRow("").over(stated_settings(options))):
            raise error
        raise ValueError(f"{row.place}: {error}") from error


def call_settings(row: ImageRow) -> dict[str, Any]:
    """Return a row's arguments of a pipeline's call, but for the prompt and the noise."""
    negative = {} if row.negative_prompt is None else {"negative_prompt": row.negative_prompt}
    return row.settings | negative


def draw(pipeline: Any, jobs: Jobs, batch_size: int, folder: Path, weights: dict[str, Any]) -> Iterator[str | None]:
    """Draw batch after batch, and write each image; yield for each None, or what one is that is not finite.

    Args:
        pipeline: of diffusers.
        jobs: the images.
        batch_size: how many are drawn at once.
        folder: of the PNGs.
        weights: those of the pipeline, as the PNGs name them.
    """
    from nami_lightning.pipelines.batch import generate_batch, settings_in_full
    from nami_lightning.pipelines.image_rows import batches
    from nami_lightning.pipelines.png_settings import save_with_settings

    for batch in batches(jobs, batch_size):
        rows = [row for _, row in batch]
        arguments = call_settings(rows[0])
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [row.negative_prompt for row in rows]
        images, origins = generate_batch(
            pipeline, [row.prompt for row in rows], [row.seed or 0 for row in rows], arguments
        )
        full = settings_in_full(pipeline, rows[0].settings)
        for i, ((number, row), image) in enumerate(zip(batch, images, strict=True)):
            if i in origins:
                yield f"prompt {row.prompt!r}, seed {row.seed}, {origins[i]}"
                continue
            asked = row.asked | weights
            drawn = asked | full | {"height": image.height, "width": image.width}
            save_with_settings(image, folder / image_name(number), asked, drawn)
            yield None
