"""Convert a source's images and write them to shards, part by part, so that a kill neither loses nor repeats a sample.

A source divides its work into parts. The samples of each part are written to their own folder below ``OUTPUT.parts``,
which gets its final name when it is complete. A part with its final name is never made again, however often and
wherever the preparation is started.
"""

import hashlib
import json
import shutil
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tqdm.auto import tqdm

from nami_lightning.datamodules.aspect_buckets import Aspect, Shape, aspects, highest_filled, nearest_aspect
from nami_lightning.datamodules.preparation.filters import Filters
from nami_lightning.datamodules.preparation.image_io import BadImage, ImageFormat, cover, crop, encode_image, open_image
from nami_lightning.datamodules.preparation.parts_folder import (
    REPORT,
    checksums,
    part_name,
    parts_folder,
    remove_changed_parts,
    start_or_resume,
    unfinished_parts,
)
from nami_lightning.datamodules.preparation.remote_output import RemoteOutput
from nami_lightning.datamodules.preparation.source_changes import take_unchanged
from nami_lightning.datamodules.sources.base import Skipped, Source, SourceSample
from nami_lightning.datamodules.storage.dataset import FORMAT, SPLITS, bucket_name, parse_bucket_name
from nami_lightning.datamodules.storage.remote import is_remote
from nami_lightning.datamodules.storage.shards import Record, ShardWriter
from nami_lightning.training.rng import derive_seed
from nami_lightning.utils.atomic_write import publish, this_process
from nami_lightning.utils.text_table import table

RESCAN = "rescan"
DIGESTS = "digests.bin"
DIGEST_BYTES = 16
"""Bytes of the hash by which duplicates of an image file are found."""


@dataclass(frozen=True)
class Preparation:
    """How a source's images become a data set.

    Args:
        resolutions: resolutions of the buckets in px, lowest first. An image goes to the highest one whose shape it
            covers, and is left out if it covers none. Empty in a recipe: the resolutions of its stages.
        heldout_percent: percentage of the source's groups that is held out for validation, 0..100.
        aspect_step: null crops all images to squares. A number makes buckets of several aspect ratios, whose sides at
            the coarsest resolution are multiples of it in px: the model's patch size times the autoencoder's factor.
        widest_aspect: largest ratio of sides among those buckets; wider images are cropped to it.
        crop: ``center`` stores the middle of each image; ``random`` stores all of it, and training crops at random.
        format: file format of the stored images.
        quality: quality of JPEG and WebP, 1..100.
        chunk_mib: size in MiB of a chunk of shards, which is read, fetched and shuffled as a unit.
        filters: limits on the samples that are kept.
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
        """The aspect ratios of the buckets."""
        return aspects(self.resolutions[0], self.aspect_step, self.widest_aspect)


def settings_of(source: Source, preparation: Preparation) -> dict[str, Any]:
    """Return all settings that decide what the data set holds, as JSON values."""
    settings: dict[str, Any] = json.loads(json.dumps({"source": source.settings()} | asdict(preparation)))
    return settings


def fingerprint(settings: dict[str, Any]) -> str:
    """Return a short hash of ``settings``, for the name of a folder."""
    return hashlib.blake2b(json.dumps([FORMAT, settings], sort_keys=True).encode(), digest_size=6).hexdigest()


def prepare_parts(
    source: Source,
    output: Path | str,
    preparation: Preparation,
    workers: int,
    shard: tuple[int, int] = (0, 1),
    rescan: bool = False,
) -> None:
    """Make the parts that are not finished yet, or that changed after they were made.

    Args:
        source: where the images come from.
        output: the data set's folder, or its URL.
        preparation: how the images are prepared.
        workers: the number of processes.
        shard: (i, n): make only every n-th part, from part i on, while other machines make the others.
        rescan: read all parts again, instead of those alone whose signatures changed.

    Raises:
        ValueError: the source is empty, or other machines make parts with other settings.
        FetchFailed: a store can't be reached, or it refuses access.
    """
    parts = source.parts()
    if not parts:
        raise ValueError(f"the source {type(source).__name__} has no images: {source.settings()}")
    if lines := survey_lines(source):
        print("\n".join(lines))
    store = RemoteOutput(str(output)) if is_remote(output) else None
    folder = parts_folder(store.pull() if store else Path(output))
    settings = settings_of(source, preparation) | ({RESCAN: True} if rescan else {})
    start_or_resume(folder, settings, shared=shard[1] > 1 or store is not None)
    if store:
        store.push_settings()
    numbers = range(shard[0], len(parts), shard[1])
    wanted = {number: (parts[number], source.signature(parts[number])) for number in numbers}
    remove_changed_parts(folder, wanted)
    missing = unfinished_parts(folder, numbers)
    # Chunks without the duplicates of other parts don't tell what the whole part holds, so they can't be taken.
    if not rescan and not preparation.filters.drop_duplicates and store is None:
        take_unchanged(Path(output), {number: wanted[number] for number in missing}, folder)
        missing = [number for number in missing if not (folder / part_name(number)).exists()]
    # Connections that a fork would share make both processes wait for each other's answers.
    context = get_context("spawn" if store or source.uses_network() else None)
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(max(1, workers), context, initializer=_set_counter, initargs=(counter,)) as pool:
        futures = [
            pool.submit(prepare_part, source, *wanted[number], folder / part_name(number), preparation, store)
            for number in missing
        ]
        try:
            _show_progress(futures, counter, f"preparing {type(source).__name__}")
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died (out of memory?): start again to continue, perhaps with fewer --workers"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _show_progress(futures: list[Future[None]], counter: Any, title: str) -> None:
    """Show a progress bar over the samples; the finished parts tell how many samples there will probably be."""
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


def _set_counter(counter: Any) -> None:
    """Give a worker process the counter of samples that all workers share."""
    global _counter
    _counter = counter


def survey_lines(source: Source) -> list[str]:
    """Return the table of the files that a source takes and ignores; nothing if it can't tell."""
    rows = [[row.extension, f"{row.files:,}", row.use or f"ignored: {row.reason}"] for row in source.survey()]
    return ["in the source", *(f"  {line}" for line in table(rows, "<><"))] if rows else []


def prepare_part(
    source: Source,
    part: str,
    signature: dict[str, str],
    target: Path,
    preparation: Preparation,
    store: RemoteOutput | None = None,
) -> None:
    """Write one part's samples and report, under a temporary name until both are complete; then to a store, if any."""
    partial = target.with_name(f".{target.name}.{this_process()}")
    shutil.rmtree(partial, ignore_errors=True)
    writer = PartWriter(partial, preparation)
    for sample in source.read(part):
        writer.add(sample)
        if _counter is not None:
            with _counter.get_lock():
                _counter.value += 1
    writer.close(part, signature)
    publish(partial, target, REPORT)
    if store:
        store.push_part(int(target.name))


class PartWriter:
    """Converts one part's samples and sorts them into buckets.

    Args:
        folder: the folder of the part, which is created.
        preparation: how the images are prepared.
    """

    def __init__(self, folder: Path, preparation: Preparation) -> None:
        folder.mkdir(parents=True)
        self.folder, self.preparation = folder, preparation
        self.writers: dict[str, ShardWriter] = {}
        self.digests: dict[str, list[bytes]] = {}
        self.read = 0
        self.removed: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.skipped: list[Skipped] = []

    def add(self, sample: SourceSample | Skipped) -> None:
        """Convert and write a sample, or record why it is left out."""
        self.read += 1
        if isinstance(sample, Skipped):
            self.skipped.append(sample)
            return
        if reason := self.preparation.filters.reason_by_scores(sample):
            self.removed[reason] += 1
            return
        notes = list(sample.notes)
        try:
            image = open_image(sample.image, notes)
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
        self.notes.update(notes)

    def bucket(self, image: Image.Image) -> str | None:
        """Return the name of the bucket for an image, or None if the image is too small for all buckets."""
        aspect = nearest_aspect(*image.size, self.preparation.aspects)
        resolution = highest_filled(*image.size, aspect, self.preparation.resolutions)
        return None if resolution is None else bucket_name(resolution, aspect.shape(resolution))

    def record(self, sample: SourceSample, image: Image.Image, shape: Shape) -> Record:
        """Return the record that is stored of the sample."""
        settings = self.preparation
        stored = cover(image, shape)
        if settings.crop == "center":
            stored = crop(stored, shape)
        texts, weights = zip(*settings.filters.texts(sample), strict=True)
        equal_weights = len(set(weights)) == 1
        return Record(
            sample.id,
            encode_image(stored, settings.format, settings.quality),
            list(texts),
            [] if equal_weights else list(weights),
        )

    def write(self, bucket: str, record: Record, original: bytes) -> None:
        """Append a record to a bucket of this part; ``original`` is the source's image file."""
        if bucket not in self.writers:
            self.writers[bucket] = ShardWriter(self.folder / bucket, self.preparation.chunk_mib * 2**20)
            self.digests[bucket] = []
        self.writers[bucket].write(record.to_item())
        self.digests[bucket].append(hashlib.blake2b(original, digest_size=DIGEST_BYTES).digest())

    def close(self, part: str, signature: dict[str, str]) -> None:
        """Finish the shards and write the report, with the name and the signature of the part."""
        for bucket, writer in self.writers.items():
            writer.close()
            (self.folder / bucket / DIGESTS).write_bytes(b"".join(self.digests[bucket]))
        report = {
            "part": part,
            "files": signature,
            "read": self.read,
            "removed": dict(self.removed),
            "notes": dict(self.notes),
            "skipped": [skipped._asdict() for skipped in self.skipped],
            "checksums": {bucket: checksums(self.folder / bucket) for bucket in self.writers},
        }
        (self.folder / REPORT).write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")


def is_heldout(group: str, percent: float) -> bool:
    """Return whether a group is in the held-out split, by a hash that is the same on every machine and in every run."""
    return derive_seed("heldout", group) % 10_000 < percent * 100
