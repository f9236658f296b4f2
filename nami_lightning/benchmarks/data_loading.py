"""Measures how fast a data set is read, compared with plain litdata and torchvision's ImageFolder, in turns."""

import statistics
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from nami_lightning.datamodules.aspect_buckets import Shape
from nami_lightning.datamodules.preparation.image_io import read_image
from nami_lightning.datamodules.stage_images import StageImages
from nami_lightning.datamodules.step_dataset import StepDataset, StepLoader
from nami_lightning.datamodules.storage.dataset import Bucket, PreparedDataset
from nami_lightning.datamodules.storage.shards import Record
from nami_lightning.training.curriculum import Curriculum, Phase

COARSE_FACTOR = 4
"""Factor by which the images of the second measured stage are smaller."""

PREFETCHED_BATCHES = 2
"""Number of batches that each worker of each loader prepares in advance."""

NAMES = ("ours", "litdata", "ImageFolder")
Loader = Iterable[Any]


def measure_data_loading(options: Namespace) -> None:
    """Print the images per second of a data set's largest bucket, for its resolution and a four times smaller one.

    Args:
        options: ``recipe``: a prepared data set, or a recipe whose data set is prepared; ``images``: a folder of the
            same images for torchvision's ImageFolder, or None to export them; ``workers`` of each loader;
            ``batch_size``; ``samples`` that each loader reads in a round; ``rounds``.

    Raises:
        ValueError: the data set has too few images for a batch.
    """
    if options.recipe is None:
        raise ValueError("no data set is given: lightning bench data DIR")
    dataset = _open_dataset(options.recipe, options.overrides)
    bucket = _largest_bucket(dataset)
    factors = [1] + [COARSE_FACTOR] * all(side % COARSE_FACTOR == 0 for side in (bucket.resolution, *bucket.shape))
    batches = _batches_per_round(bucket, options)
    print(f"{dataset.folder}, train/{bucket.name}, {len(bucket):,} images; {options.workers} worker(s) per loader")
    with ExitStack() as stack:
        count = (batches + _warm_up_batches(options)) * options.batch_size
        images = Path(options.images) if options.images else stack.enter_context(export_images(bucket, count))
        rows = [(factor, _compare(bucket, factor, images, batches, options)) for factor in factors]
    headings = f"{'ours':>10}  {'litdata':>10}  {'ImageFolder':>11}  {'/litdata':>8}  {'/ImageFolder':>12}"
    print(f"\n{'images of':>12}  {headings}")
    for factor, rates in rows:
        ours, plain, folder = (statistics.median(of_round[i] for of_round in rates) for i in range(3))
        by_plain, by_folder = (statistics.median(of_round[0] / of_round[i] for of_round in rates) for i in (1, 2))
        shape = str(_shape(bucket, factor))
        print(f"{shape:>12}  {ours:>8.0f}/s  {plain:>8.0f}/s  {folder:>9.0f}/s  {by_plain:>8.2f}  {by_folder:>12.2f}")
    print(f"Medians of {options.rounds} rounds; each loader reads {batches} batches of {options.batch_size} per round.")


def _open_dataset(recipe_or_dir: str, overrides: list[str]) -> PreparedDataset:
    if Path(recipe_or_dir).is_dir():
        return PreparedDataset(Path(recipe_or_dir))
    from nami_lightning.runs.recipe import Recipe

    module: Any = Recipe(recipe_or_dir, overrides).make_data()
    dataset: PreparedDataset = module.dataset
    if dataset.cache is not None:
        raise ValueError(f"{dataset.location} is remote: to compare how fast it is read, give a copy of it on a disk")
    return dataset


def _largest_bucket(dataset: PreparedDataset) -> Bucket:
    """Return the training bucket with most images, of the finest resolution that has any."""
    if dataset.encodings is not None:
        raise ValueError(f"{dataset.folder} holds encodings: give the data set of images that they were made from")
    buckets = dataset.buckets("train")
    if not buckets:
        raise ValueError(f"{dataset.folder} has no training images")
    return max(buckets, key=lambda bucket: (bucket.resolution, len(bucket)))


def _shape(bucket: Bucket, factor: int) -> Shape:
    return Shape(bucket.shape.width // factor, bucket.shape.height // factor)


def _warm_up_batches(options: Namespace) -> int:
    """Return the number of first batches that don't count, because some were ready before the clock was started."""
    return 1 + PREFETCHED_BATCHES * int(options.workers)


def _batches_per_round(bucket: Bucket, options: Namespace) -> int:
    """Return the number of batches that a loader reads in a round: as many as asked for, but all from one epoch."""
    in_epoch = len(bucket) // options.batch_size - options.workers - _warm_up_batches(options)
    if in_epoch < 1:
        raise ValueError(
            f"{bucket.shards.folder}, the largest bucket, holds {len(bucket)} images: too few for {options.workers} "
            f"worker(s) with batches of {options.batch_size}; choose a smaller --batch_size or fewer --workers"
        )
    return max(1, min(int(options.samples) // int(options.batch_size), in_epoch))


def _compare(bucket: Bucket, factor: int, images: Path, batches: int, options: Namespace) -> list[tuple[float, ...]]:
    """Return the images per second of the three loaders in each round."""
    shape = _shape(bucket, factor)
    rounds = []
    for number in range(options.rounds):
        rates = tuple(
            images_per_second(make(bucket, factor, images, options.batch_size, options.workers), batches, options)
            for make in (our_loader, litdata_loader, folder_loader)
        )
        rounds.append(rates)
        text = ", ".join(f"{name} {one:.0f}/s" for name, one in zip(NAMES, rates, strict=True))
        print(f"{shape}, round {number + 1}: {text}", flush=True)
    return rounds


def images_per_second(loader: Loader, batches: int, options: Namespace) -> float:
    """Return the images per second of a running loader.

    Its workers have started, and no batch is ready before the clock is started.
    """
    batches_read = iter(loader)
    warm = sum(1 for _ in islice(batches_read, _warm_up_batches(options)))
    begin = perf_counter()
    read = sum(1 for _ in islice(batches_read, batches))
    seconds = perf_counter() - begin
    if read < batches:
        wanted = (batches + _warm_up_batches(options)) * options.batch_size
        raise ValueError(
            f"--images: a loader found only {warm + read} batches of {options.batch_size}; give {wanted} images"
        )
    return batches * int(options.batch_size) / seconds


# --- the three loaders -------------------------------------------------------------------------


def our_loader(bucket: Bucket, factor: int, images: Path, batch_size: int, workers: int) -> Loader:
    """Return the loader of a training with a single stage on this bucket."""
    curriculum = Curriculum([Phase(10**9, [1], 1.0)], batch_size)
    stage = StageImages([bucket], [bucket.resolution // factor], top_only=False)
    steps = StepDataset(curriculum, stage, [batch_size], seed=0, shuffle_window=16)
    return StepLoader(steps, 0, workers, PREFETCHED_BATCHES, pin_memory=False)


def litdata_loader(bucket: Bucket, factor: int, images: Path, batch_size: int, workers: int) -> Loader:
    """Return litdata's own loader of the same shards, which decodes with the same function as ours."""
    dataset = StreamingDataset(
        str(bucket.shards.folder),
        shuffle=True,
        drop_last=True,
        transform=partial(decode, shape=_shape(bucket, factor), factor=factor),
    )
    return StreamingDataLoader(
        dataset, batch_size=batch_size, num_workers=workers, prefetch_factor=PREFETCHED_BATCHES if workers else None
    )


def decode(item: Any, shape: Shape, factor: int) -> tuple[Tensor, str]:
    """Return what training needs of a stored item: the image and its caption."""
    record = Record.from_item(item)
    return read_image(record.image, shape, factor), record.caption(0.0)


def folder_loader(bucket: Bucket, factor: int, images: Path, batch_size: int, workers: int) -> Loader:
    """Return torchvision's loader of image files."""
    shape = _shape(bucket, factor)
    resize = Resize(min(shape), InterpolationMode.BILINEAR)
    dataset = ImageFolder(str(images), Compose([resize, CenterCrop((shape.height, shape.width)), PILToTensor()]))
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        prefetch_factor=PREFETCHED_BATCHES if workers else None,
    )


@contextmanager
def export_images(bucket: Bucket, count: int) -> Iterator[Path]:
    """Yield a temporary ImageFolder of at most ``count`` of the bucket's images, as they are stored."""
    with tempfile.TemporaryDirectory(prefix="nami-bench-") as path:
        target = Path(path) / "images"
        target.mkdir()
        count = min(count, len(bucket))
        for number in range(count):
            index = number * len(bucket) // count
            record = Record.from_item(bucket.shards.read([index])[0])
            suffix = "png" if record.image[:4] == b"\x89PNG" else "webp" if record.image[:4] == b"RIFF" else "jpg"
            (target / f"{number:06d}.{suffix}").write_bytes(record.image)
        yield Path(path)
