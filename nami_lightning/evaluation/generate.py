"""Images of a benchmark's prompts, drawn by any text-to-image pipeline. Run again, it goes on where it stopped.

OUT/BENCHMARK/MODEL/drawing.json             what draws them: model, weights, settings, seed, a hash of the prompts
OUT/BENCHMARK/MODEL/ITEM/metadata.jsonl      one line: the prompt and what the judge needs to know of it
OUT/BENCHMARK/MODEL/ITEM/samples/00000.png   its images; image i is drawn from noise of seed + i

GenEval's own judge reads this layout too.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from nami_lightning.evaluation.prompts import Item, prompts_hash
from nami_lightning.evaluation.results import write_json
from nami_lightning.models.pipeline import NamiPipeline
from nami_lightning.runs.load import load_pipeline
from nami_lightning.runs.run_dir import find_run, is_run
from nami_lightning.utils.image_grid import save_image

DRAWING = "drawing.json"
SEED = 42
"""GenEval's. Its script seeds every prompt with it and draws a prompt's images from one stream of noise; here each
image has a seed of its own, so that neither the batch size nor an interruption changes an image."""


@dataclass(frozen=True)
class ImageFolder:
    """The images of one model for one benchmark."""

    folder: Path
    name: str

    def item_folder(self, item: Item) -> Path:
        """Where an item's files lie."""
        return self.folder / item.id

    def path(self, item: Item, sample: int) -> Path:
        """Where an item's ``sample``-th image lies, or will."""
        return self.item_folder(item) / "samples" / f"{sample:05d}.png"

    def open(self, item: Item, sample: int) -> Image.Image:
        """An image that was drawn.

        Raises:
            ValueError: it is damaged.
        """
        path = self.path(item, sample)
        try:
            return Image.open(path).convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, and the same command draws it anew") from error

    def missing(self, items: Sequence[Item], images: int) -> list[tuple[Item, int]]:
        """What is still to be drawn of the first ``images`` images of each item."""
        return [(item, i) for item in items for i in range(images) if not self.path(item, i).exists()]

    @property
    def drawing(self) -> dict[str, Any] | None:
        """What draws these images; None if there is no image yet.

        Raises:
            ValueError: its file is damaged.
        """
        path = self.folder / DRAWING
        if not path.exists() or not any(self.folder.glob("*/samples/*.png")):
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): remove {self.folder} to draw anew") from error


@dataclass(frozen=True)
class Sampling:
    """How images are drawn; None is the pipeline's own default.

    Args:
        settings: arguments of the pipeline's call by name: ``num_inference_steps``, ``guidance_scale``, ...
        seed: of each item's first image; the next has the next.
        dtype: number type of the network's weights; None: as it was saved for a run, float32 for other pipelines.
        batch_size: images drawn at once; changes no image.
    """

    settings: Mapping[str, Any]
    seed: int | None = None
    dtype: str | None = None
    batch_size: int = 4


def weights_of(source: str) -> str:
    """Which weights ``source`` names now: a run's newest checkpoint, a digest of a folder's files by their sizes and
    times, or the name itself.

    Raises:
        FileNotFoundError: a run without a checkpoint; a local path where nothing is.
    """
    if is_run(source):
        run = find_run(source)
        if not run.checkpoints:
            raise FileNotFoundError(f"{run.folder} has no checkpoint yet")
        return run.checkpoints[-1].name
    files = sorted(path for path in Path(source).rglob("*") if path.is_file()) if Path(source).is_dir() else []
    stats = [(str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16] if stats else source


def draw(
    source: str,
    folder: ImageFolder,
    items: Sequence[Item],
    chosen: Sequence[Item],
    images: int,
    sampling: Sampling,
) -> None:
    """Draw what is missing; the model is loaded only if anything is.

    Args:
        source: a run, a pipeline's folder, or its Hugging Face name.
        folder: where the images go.
        items: all of the benchmark.
        chosen: those of them that are wanted now.
        images: of each item.
        sampling: how; what it leaves open is as it was when the folder was begun.

    Raises:
        ValueError: images in the folder were drawn in another way; a setting that the pipeline does not know.
        FileNotFoundError: the model can't be found.
    """
    drawing = _agree(source, folder, items, sampling)
    missing = folder.missing(chosen, images)
    if not missing:
        return
    pipeline = load_pipeline(source, drawing["dtype"])
    pipeline.set_progress_bar_config(disable=True)
    known = inspect.signature(pipeline.__call__).parameters
    if unknown := [name for name in drawing["settings"] if name not in known]:
        raise ValueError(f"{type(pipeline).__name__} of {source} does not take {', '.join(unknown)}")
    if "negative_prompt" in drawing["settings"] and "true_cfg_scale" in known:
        raise ValueError(f"{source} has its guidance distilled: a negative prompt would change nothing")
    if isinstance(drawing["settings"].get("num_inference_steps"), list) and not isinstance(pipeline, NamiPipeline):
        raise ValueError(f"{source} has one stage: give --steps one number")
    write_json(folder.folder / DRAWING, drawing)
    with tqdm(total=len(chosen) * images, initial=len(chosen) * images - len(missing), desc=folder.name) as bar:
        for first in range(0, len(missing), sampling.batch_size):
            batch = missing[first : first + sampling.batch_size]
            pictures = _draw_batch(pipeline, batch, drawing)
            for (item, sample), picture in zip(batch, pictures, strict=True):
                _write_metadata(folder, item)
                save_image(picture, folder.path(item, sample))
            bar.update(len(batch))


def _draw_batch(
    pipeline: DiffusionPipeline, batch: Sequence[tuple[Item, int]], drawing: Mapping[str, Any]
) -> list[Image.Image]:
    settings = dict(drawing["settings"])
    if "negative_prompt" in settings:
        settings["negative_prompt"] = [settings["negative_prompt"]] * len(batch)
    return pipeline(
        prompt=[item.prompt for item, _ in batch],
        generator=[torch.Generator().manual_seed(drawing["seed"] + sample) for _, sample in batch],
        **settings,
    ).images


def _agree(source: str, folder: ImageFolder, items: Sequence[Item], sampling: Sampling) -> dict[str, Any]:
    """What draws: as the folder was begun, and as is asked for now; they must not contradict each other."""
    given = {name: value for name, value in sampling.settings.items() if value is not None}
    fixed = {"source": source, "weights": weights_of(source), "prompts": prompts_hash(items)}
    begun = folder.drawing
    if begun is None:
        seed = SEED if sampling.seed is None else sampling.seed
        return fixed | {"settings": given, "seed": seed, "dtype": sampling.dtype}
    wanted = fixed | {key: value for key in ("seed", "dtype") if (value := getattr(sampling, key)) is not None}
    was = begun | begun["settings"]
    for key, value in (wanted | given).items():
        if was.get(key) != value:
            raise ValueError(
                f"{folder.folder} holds images drawn with {key} {was.get(key, 'left to the pipeline')}, not {value}: "
                "ask for the same, or choose another --out or --names"
            )
    return begun


def _write_metadata(folder: ImageFolder, item: Item) -> None:
    path = folder.item_folder(item) / "metadata.jsonl"
    if not path.exists():
        write_json(path, {"prompt": item.prompt, **item.metadata}, indent=None)
