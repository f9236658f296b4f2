"""Generates the images of a benchmark's prompts with any text-to-image pipeline; run again, it resumes.

OUT/BENCHMARK/MODEL/drawing.json             how images are generated: model, weights, settings, seed, prompts' hash
OUT/BENCHMARK/MODEL/ITEM/metadata.jsonl      one line: the prompt, and what the judge needs to know about it
OUT/BENCHMARK/MODEL/ITEM/samples/00000.png   its images; the noise of image i comes from seed + i
OUT/BENCHMARK/MODEL/not_finite.json          which images have NaN or infinite values; these have no file

GenEval's own judge reads this layout too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from nami_lightning.evaluation.prompts import Item, prompts_hash
from nami_lightning.pipelines.batch import check_settings, generate_batch
from nami_lightning.pipelines.sampler_settings import SamplerSettings
from nami_lightning.runs.load import identify_weights, load_pipeline
from nami_lightning.utils.atomic_write import write_json
from nami_lightning.utils.image_grid import save_image
from nami_lightning.utils.text_files import parse_json

SETTINGS_FILE = "drawing.json"
NOT_FINITE_FILE = "not_finite.json"
DEFAULT_SEED = 42
"""GenEval's seed. Its script seeds every prompt with it, and takes the noise of all images of a prompt from one
generator. Here each image has a seed of its own, so that neither the batch size nor an interruption changes its noise.
The batch size changes how floating-point sums are rounded: in float32 a pixel may differ by 1 of 255 levels.
"""


@dataclass(frozen=True)
class GeneratedImages:
    """The folder of one model's images for one benchmark."""

    folder: Path
    name: str

    def item_folder(self, item: Item) -> Path:
        """Return the folder of an item's files."""
        return self.folder / item.id

    def path(self, item: Item, sample: int) -> Path:
        """Return the path of an item's ``sample``-th image, which need not exist yet."""
        return self.item_folder(item) / "samples" / f"{sample:05d}.png"

    def open(self, item: Item, sample: int) -> Image.Image:
        """Return an item's ``sample``-th image in RGB.

        Raises:
            ValueError: the image file is damaged.
        """
        path = self.path(item, sample)
        try:
            return Image.open(path).convert("RGB")
        except OSError as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove it, and the same command generates it again"
            ) from error

    def samples(self, item: Item, images: int) -> list[int]:
        """Return which of an item's first ``images`` images there are."""
        return [i for i in range(images) if self.path(item, i).exists()]

    def missing(self, items: Sequence[Item], images: int) -> list[tuple[Item, int]]:
        """Return the items and image numbers still missing among the first ``images`` images of each item."""
        return [(item, i) for item in items for i in range(images) if not self.path(item, i).exists()]

    def not_finite(self, record: Mapping[str, Any] | None) -> dict[tuple[str, int], dict[str, Any]]:
        """Return the images that had NaN or infinite values, by item and number, if they were generated as ``record``.

        An image has ``image``, its path, ``seed`` and ``origin``: where it stopped being finite. A file that can't be
        read counts as none: the images are only generated again.
        """
        try:
            found = parse_json((self.folder / NOT_FINITE_FILE).read_bytes())
            entries = found["images"] if found["drawing"] == record else []
            return {(entry["item"], entry["sample"]): entry for entry in entries}
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return {}

    @property
    def recorded_settings(self) -> dict[str, Any] | None:
        """How these images were generated; None if there is no image yet.

        Raises:
            ValueError: the file that records it is damaged.
        """
        path = self.folder / SETTINGS_FILE
        if not path.exists() or not any(self.folder.glob("*/samples/*.png")):
            return None
        try:
            return parse_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove {self.folder} to generate all images again"
            ) from error


@dataclass(frozen=True)
class GenerationSettings:
    """How the images of a benchmark are generated.

    Args:
        sampler: settings of the pipeline.
        seed: seed of each prompt's first image; image i uses seed + i. None: 42, as in GenEval.
        dtype: dtype of the network's weights. None: as it was saved for a run, float32 for other pipelines.
        batch_size: number of images generated at once; it changes images by rounding alone, see :data:`DEFAULT_SEED`.
        step: step of a run's checkpoint. None: the newest.
        ema: use the EMA's weights of a run's checkpoint, if it has them.
        device: device of torch. None: a GPU if there is one.
        retry_not_finite: generate those images again that had NaN or infinite values in an earlier call.
    """

    sampler: SamplerSettings = SamplerSettings()
    seed: int | None = None
    dtype: str | None = None
    batch_size: int = 4
    step: int | None = None
    ema: bool = True
    device: str | None = None
    retry_not_finite: bool = False


def generate(
    source: str,
    folder: GeneratedImages,
    items: Sequence[Item],
    chosen: Sequence[Item],
    images: int,
    settings: GenerationSettings,
) -> None:
    """Generate the images that are missing; the model is loaded only if there are any.

    Images that are not finite are not written: they are counted, named, and remembered in :data:`NOT_FINITE_FILE`, so
    that a second call does not generate them again.

    Args:
        source: a run, the folder of a pipeline, or its Hugging Face name.
        folder: the folder that the images go to.
        items: all items of the benchmark.
        chosen: the items whose images are wanted now.
        images: number of images of each item.
        settings: how to generate; what is None stays as it was when the folder's first image was generated.

    Raises:
        ValueError: the folder has images that were generated with other settings, or the pipeline doesn't know a
            setting.
        FileNotFoundError: the model can't be found.
    """
    record = _agreed_settings(source, folder, items, settings)
    missing = folder.missing(chosen, images)
    failed = {} if settings.retry_not_finite else folder.not_finite(record)
    if known_to_fail := [image for image in missing if (image[0].id, image[1]) in failed]:
        print(
            f"{folder.name}: {len(known_to_fail)} images had NaN or infinite values before, and are not generated "
            "again; --retry_not_finite does that"
        )
        missing = [image for image in missing if image not in known_to_fail]
    if not missing:
        return
    pipeline = load_pipeline(source, record["dtype"], settings.step, settings.ema, settings.device)
    pipeline.set_progress_bar_config(disable=True)
    check_settings(pipeline, source, record["settings"])
    write_json(folder.folder / SETTINGS_FILE, record)
    failures: list[str] = []
    remembered = dict(folder.not_finite(record))
    with tqdm(total=len(chosen) * images, initial=len(chosen) * images - len(missing), desc=folder.name) as bar:
        for first in range(0, len(missing), settings.batch_size):
            batch = missing[first : first + settings.batch_size]
            arguments = dict(record["settings"])
            if "negative_prompt" in arguments:
                arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(batch)
            seeds = [record["seed"] + sample for _, sample in batch]
            pictures, origins = generate_batch(pipeline, [item.prompt for item, _ in batch], seeds, arguments)
            for i, ((item, sample), picture) in enumerate(zip(batch, pictures, strict=True)):
                if i in origins:
                    failures.append(
                        f"{item.id}, image {sample} (seed {seeds[i]}, prompt {item.prompt!r}, {origins[i]})"
                    )
                    remembered[item.id, sample] = {
                        "item": item.id, "sample": sample, "image": str(folder.path(item, sample)), "seed": seeds[i],
                        "origin": origins[i],
                    }  # fmt: skip
                    continue
                remembered.pop((item.id, sample), None)
                _write_metadata(folder, item)
                save_image(picture, folder.path(item, sample))
            if remembered or (folder.folder / NOT_FINITE_FILE).exists():
                found = {"drawing": record, "images": list(remembered.values())}
                write_json(folder.folder / NOT_FINITE_FILE, found)
            bar.update(len(batch))
    if failures:
        print(
            f"{folder.name}: {len(failures)} of {len(missing)} images have NaN or infinite values, and are not written:"
        )
        print("\n".join(f"  {failure}" for failure in failures))


def _agreed_settings(
    source: str, folder: GeneratedImages, items: Sequence[Item], settings: GenerationSettings
) -> dict[str, Any]:
    """Return how to generate: as the folder records it, or as asked for now if it has no image.

    Raises:
        ValueError: the two contradict each other.
    """
    asked = settings.sampler.arguments()
    weights = identify_weights(source, settings.step, settings.ema)
    fixed = {"source": source, "weights": weights, "prompts": prompts_hash(items)}
    earlier = folder.recorded_settings
    if earlier is None:
        seed = DEFAULT_SEED if settings.seed is None else settings.seed
        return fixed | {"settings": asked, "seed": seed, "dtype": settings.dtype}
    wanted = fixed | {key: value for key in ("seed", "dtype") if (value := getattr(settings, key)) is not None}
    recorded = earlier | earlier["settings"]
    for key, value in (wanted | asked).items():
        if recorded.get(key) != value:
            raise ValueError(
                f"{folder.folder} has images that were generated with {key} "
                f"{recorded.get(key, 'left to the pipeline')}, not {value}: "
                "ask for the same, or choose another --output or --names"
            )
    return earlier


def _write_metadata(folder: GeneratedImages, item: Item) -> None:
    path = folder.item_folder(item) / "metadata.jsonl"
    if not path.exists():
        write_json(path, {"prompt": item.prompt, **item.metadata}, indent=None)
