"""A source's images converted and written to shards, in parts that a kill can't lose or double.

Work is cut into the source's parts. Each part's samples are written to a folder of their own below ``OUTPUT.parts``,
renamed when complete; a part that has its name is never done again, wherever and however often the preparation is
started.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cached_property
from multiprocessing import Value
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tqdm.auto import tqdm

from nami_lightning.datamodules.aspect_buckets import Aspect, Shape, aspects, highest_filled, nearest_aspect
from nami_lightning.datamodules.preparation.filters import Filters
from nami_lightning.datamodules.preparation.image_io import BadImage, ImageFormat, cover, crop, encode_image, open_image
from nami_lightning.datamodules.sources.base import Skipped, Source, SourceSample
from nami_lightning.datamodules.storage.chunk_file import checksum
from nami_lightning.datamodules.storage.dataset import FORMAT, SPLITS, bucket_name, parse_bucket_name
from nami_lightning.datamodules.storage.shards import Record, ShardWriter, read_index
from nami_lightning.training.rng import seed_of
from nami_lightning.utils.atomic_write import replacing, this_process

SETTINGS = "settings.json"
REPORT = "report.json"
DIGESTS = "digests.bin"
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Preparation:
    """How a source's images become a data set.

    Args:
        resolutions: one row of buckets each; an image goes to the highest that it fills, and is left out if it fills
            none. Empty in a recipe: those of its stages.
        heldout_percent: share of the source's groups that is held out for validation, 0..100.
        aspect_step: null crops squares; a number makes buckets of several aspect ratios, whose sides are multiples
            of it at the coarsest resolution: the model's patch size times the autoencoder's factor.
        widest_aspect: largest ratio of sides among those buckets; wider images are cropped to it.
        crop: ``center`` stores the middle of each image; ``random`` stores all of it, and training draws the window.
        format: of the stored images.
        quality: of JPEG and WebP, 1..100.
        chunk_mib: size of a chunk of shards: what is read, fetched and shuffled as one.
        filters: what is left out.
    """

    resolutions: list[int] = field(default_factory=list)
    heldout_percent: float = 1.0
    aspect_step: int | None = None
    widest_aspect: float = 2.0
    crop: Literal["center", "random"] = "center"
    format: ImageFormat = "jpeg"
    quality: int = 95
    chunk_mib: int = 64
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self) -> None:
        if sorted(set(self.resolutions)) != self.resolutions or (self.resolutions and self.resolutions[0] < 1):
            raise ValueError(f"resolutions must be positive and rise; got {self.resolutions}")
        if not 0 <= self.heldout_percent < 100:
            raise ValueError(f"heldout_percent must be in [0, 100); got {self.heldout_percent}")
        if self.resolutions:
            aspects(self.resolutions[0], self.aspect_step, self.widest_aspect)

    @cached_property
    def aspects(self) -> list[Aspect]:
        """Of the buckets."""
        return aspects(self.resolutions[0], self.aspect_step, self.widest_aspect)


def settings_of(source: Source, preparation: Preparation) -> dict[str, Any]:
    """All that decides what the data set holds, as JSON has it."""
    settings: dict[str, Any] = json.loads(json.dumps({"source": source.settings()} | asdict(preparation)))
    return settings


def fingerprint(settings: dict[str, Any]) -> str:
    """A short name for these settings."""
    return hashlib.blake2b(json.dumps([FORMAT, settings], sort_keys=True).encode(), digest_size=6).hexdigest()


def prepare_parts(
    source: Source, output: Path, preparation: Preparation, workers: int, shard: tuple[int, int] = (0, 1)
) -> None:
    """Make the parts that are not there yet, of every ``shard[1]``-th from ``shard[0]`` on.

    Raises:
        ValueError: the source is empty, or the parts that are there were made with other settings.
    """
    parts = source.parts()
    if not parts:
        raise ValueError(f"the source {type(source).__name__} has no images: {source.settings()}")
    folder = parts_folder(output)
    claim(folder, settings_of(source, preparation) | {"parts": fingerprint({"parts": parts})})
    mine = [(index, part) for index, part in enumerate(parts) if index % shard[1] == shard[0]]
    missing = [(index, part) for index, part in mine if not (folder / part_name(index)).exists()]
    if len(missing) < len(mine):
        print(f"{len(mine) - len(missing)} of {len(mine)} parts are done already.")
    counter = Value("q", 0)
    with ProcessPoolExecutor(max(1, workers), initializer=_count_with, initargs=(counter,)) as pool:
        futures = [
            pool.submit(prepare_part, source, part, folder / part_name(index), preparation) for index, part in missing
        ]
        try:
            _watch(futures, counter, f"preparing {type(source).__name__}")
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died (out of memory?): start again to go on, perhaps with fewer --workers"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def parts_folder(output: Path) -> Path:
    """Where the parts lie until they are joined."""
    return output.with_name(f"{output.name}.parts")


def part_name(index: int) -> str:
    """The folder of a part."""
    return f"{index:06d}"


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Start a folder of parts, or go on with one of the same settings."""
    file = folder / SETTINGS
    if file.exists():
        check_settings(json.loads(file.read_text()), settings, folder)
        return
    with replacing(file) as partial:
        partial.write_text(json.dumps(settings, indent=2))


def check_settings(there: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Refuse to go on where something else was begun.

    Raises:
        ValueError: naming the settings that changed.
    """
    if changes := "; ".join(changed_settings(there, wanted)):
        raise ValueError(f"{folder} was made with other settings ({changes}): choose another output, or remove it")


def changed_settings(there: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """``source.path was photos and is pictures now``, for each innermost key whose value changed."""
    for key in sorted(there.keys() | wanted.keys()):
        old, new = there.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changed_settings(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {old} and is {new} now"


def _watch(futures: list[Future[None]], counter: Any, title: str) -> None:
    """A progress bar over the samples; how many there will be is guessed from the parts that are done."""
    with tqdm(desc=title, unit="image") as bar:
        waiting = set(futures)
        done = 0
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5)
            for future in finished:
                future.result()
            done += len(finished)
            if done:
                bar.total = round(counter.value * len(futures) / done) if waiting else counter.value
            bar.update(counter.value - bar.n)


# --- one part ----------------------------------------------------------------------------------

_counter: Any = None


def _count_with(counter: Any) -> None:
    global _counter
    _counter = counter


def prepare_part(source: Source, part: str, target: Path, preparation: Preparation) -> None:
    """Write one part's samples and its report, under a temporary name until both are complete."""
    partial = target.with_name(f".{target.name}.{this_process()}")
    shutil.rmtree(partial, ignore_errors=True)
    writer = PartWriter(partial, preparation)
    for sample in source.read(part):
        writer.add(sample)
        if _counter is not None:
            with _counter.get_lock():
                _counter.value += 1
    writer.close()
    publish(partial, target, REPORT)


class PartWriter:
    """Converts one part's samples and sorts them into buckets.

    Args:
        folder: created.
        preparation: the settings.
    """

    def __init__(self, folder: Path, preparation: Preparation) -> None:
        folder.mkdir(parents=True)
        self.folder, self.preparation = folder, preparation
        self.writers: dict[str, ShardWriter] = {}
        self.digests: dict[str, list[bytes]] = {}
        self.read = 0
        self.removed: Counter[str] = Counter()
        self.skipped: list[Skipped] = []

    def add(self, sample: SourceSample | Skipped) -> None:
        """Convert and write a sample, or count why not."""
        self.read += 1
        if isinstance(sample, Skipped):
            self.skipped.append(sample)
            return
        if reason := self.preparation.filters.reason_by_scores(sample):
            self.removed[reason] += 1
            return
        try:
            image = open_image(sample.image)
        except BadImage as error:
            self.skipped.append(Skipped(sample.id, str(error)))
            return
        reason = self.preparation.filters.reason_by_image(image)
        name = None if reason else self.bucket(image)
        if name is None:
            self.removed[reason or "too small for the smallest bucket"] += 1
            return
        split = SPLITS[is_heldout(sample.group or sample.id, self.preparation.heldout_percent)]
        self.write(f"{split}/{name}", self.record(sample, image, parse_bucket_name(name)[1]), sample.image)

    def bucket(self, image: Image.Image) -> str | None:
        """The name of the bucket that the image belongs to, if it fills any."""
        aspect = nearest_aspect(*image.size, self.preparation.aspects)
        resolution = highest_filled(*image.size, aspect, self.preparation.resolutions)
        return None if resolution is None else bucket_name(resolution, aspect.shape(resolution))

    def record(self, sample: SourceSample, image: Image.Image, shape: Shape) -> Record:
        """What is stored of the sample."""
        settings = self.preparation
        stored = cover(image, shape)
        if settings.crop == "center":
            stored = crop(stored, shape)
        texts, weights = zip(*settings.filters.texts(sample), strict=True)
        alike = len(set(weights)) == 1
        return Record(
            sample.id,
            encode_image(stored, settings.format, settings.quality),
            list(texts),
            [] if alike else list(weights),
        )

    def write(self, bucket: str, record: Record, original: bytes) -> None:
        """Append a record to a bucket of this part."""
        if bucket not in self.writers:
            self.writers[bucket] = ShardWriter(self.folder / bucket, self.preparation.chunk_mib * 2**20)
            self.digests[bucket] = []
        self.writers[bucket].write(record.to_item())
        self.digests[bucket].append(hashlib.blake2b(original, digest_size=DIGEST_BYTES).digest())

    def close(self) -> None:
        """Finish the shards and write the report."""
        for bucket, writer in self.writers.items():
            writer.close()
            (self.folder / bucket / DIGESTS).write_bytes(b"".join(self.digests[bucket]))
        report = {
            "read": self.read,
            "removed": dict(self.removed),
            "skipped": [skipped._asdict() for skipped in self.skipped],
            "checksums": {bucket: checksums(self.folder / bucket) for bucket in self.writers},
        }
        (self.folder / REPORT).write_text(json.dumps(report, ensure_ascii=False))


def is_heldout(group: str, percent: float) -> bool:
    """Whether a group belongs to the held-out split: a stable hash, the same on every machine and for ever."""
    return seed_of("heldout", group) % 10_000 < percent * 100


def finished_parts(output: Path, count: int) -> list[Path]:
    """The folders of all ``count`` parts of ``output``, in order.

    Raises:
        ValueError: some are missing.
    """
    folder = parts_folder(output)
    parts = [folder / part_name(index) for index in range(count)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{len(missing)} of {len(parts)} parts are missing in {folder} ({named}): run their shards before merging"
        )
    return parts


def checksums(folder: Path) -> dict[str, str]:
    """BLAKE2b of every chunk of a folder of shards, by file name."""
    return {chunk["filename"]: checksum(folder / chunk["filename"]) for chunk in read_index(folder)["chunks"]}


def publish(partial: Path, folder: Path, last: str) -> None:
    """Give a complete folder its name; if another process was faster, keep that one's.

    Args:
        partial: the folder.
        folder: its name.
        last: the file in it that is written last.
    """
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / last).exists():
            raise
        shutil.rmtree(partial)
