"""From a source of images to a folder of shards, and that folder's description of itself.

    FOLDER/dataset.json            settings, counts, attribution; written last
    FOLDER/train/256/...           one bucket a resolution
    FOLDER/heldout/256/...         the same for the held-out split

The whole is made under a temporary name and renamed when complete, so an interrupted preparation is never
taken for a finished one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from nami_lightning.chance import seed_of
from nami_lightning.datamodules.shards import Bucket, BucketWriter, Record

FORMAT = "nami-shards/1"
DESCRIPTION = "dataset.json"
SPLITS = ("train", "heldout")


class SourceSample(NamedTuple):
    """A picture of a source, encoded (PNG, JPEG, WebP) once for each bucket it belongs to.

    Attributes:
        id: unique name.
        group: samples of one group stay in one split (the skin tones of an emoji, say).
        captions: at least one.
        images: resolution to encoded image.
    """

    id: str
    group: str
    captions: list[str]
    images: dict[int, bytes]


class Source(Protocol):
    """Where images come from. A class of your own with these three methods is a source too."""

    def settings(self) -> dict[str, Any]:
        """All that decides what the samples are, JSON-able; a change makes the data set anew."""

    def keys(self) -> list[str]:
        """One key a sample, in a stable order."""

    def load(self, key: str, resolutions: Sequence[int]) -> SourceSample:
        """The sample of ``key``, at those of ``resolutions`` that it fills; called in worker processes."""


class _Loading(Dataset[SourceSample]):
    """``source.load`` as a map, so that DataLoader's workers do it side by side and in order."""

    def __init__(self, source: Source, keys: list[str], resolutions: Sequence[int]) -> None:
        self.source, self.keys, self.resolutions = source, keys, resolutions

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> SourceSample:
        return self.source.load(self.keys[index], self.resolutions)


def is_heldout(group: str, percent: float) -> bool:
    """Whether a group belongs to the held-out split: a stable hash, the same on every machine and for ever."""
    return seed_of("heldout", group) % 10_000 < percent * 100


def prepare(source: Source, root: Path, resolutions: Sequence[int], heldout_percent: float, workers: int) -> Path:
    """Make the data set of these settings below ``root``, or find it there complete.

    Args:
        source: where the images come from.
        root: holds one folder for each set of settings, so a changed setting never destroys anything.
        resolutions: one bucket each.
        heldout_percent: share of the groups that is held out, 0..100.
        workers: processes that load samples.

    Returns:
        The data set's folder.

    Raises:
        ValueError: the source is empty.
    """
    settings = {"source": source.settings(), "resolutions": list(resolutions), "heldout_percent": heldout_percent}
    fingerprint = hashlib.blake2b(json.dumps([FORMAT, settings], sort_keys=True).encode(), digest_size=6).hexdigest()
    folder = root / fingerprint
    if (folder / DESCRIPTION).exists():
        return folder
    keys = source.keys()
    if not keys:
        raise ValueError(f"the source {type(source).__name__} has no images: {settings['source']}")

    partial = root / f".{fingerprint}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    writers = {(s, r): BucketWriter(partial / s / str(r)) for s in SPLITS for r in resolutions}
    loader = DataLoader(_Loading(source, keys, resolutions), batch_size=None, num_workers=workers)
    for sample in tqdm(loader, desc=f"preparing {type(source).__name__}", unit="image"):
        split = SPLITS[is_heldout(sample.group, heldout_percent)]
        for resolution, image in sample.images.items():
            writers[split, resolution].write(Record(sample.id, image, sample.captions))
    for writer in writers.values():
        writer.close()

    counts = {split: {str(r): writers[split, r].count for r in resolutions} for split in SPLITS}
    description = {"format": FORMAT, "settings": settings, "samples": counts}
    (partial / DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    _publish(partial, folder)
    return folder


def _publish(partial: Path, folder: Path) -> None:
    """Give a complete data set its name; if another process was faster, keep that one's."""
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / DESCRIPTION).exists():
            raise
        shutil.rmtree(partial)


def open_buckets(folder: Path, split: str, resolutions: Sequence[int]) -> list[Bucket]:
    """The buckets of ``resolutions`` in a prepared data set.

    Raises:
        FileNotFoundError: no folder, or one whose preparation did not finish.
        ValueError: another format, a resolution that was not prepared, or shards that don't hold what
            the description says.
    """
    description_file = folder / DESCRIPTION
    if not description_file.exists():
        state = "holds no finished data set" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"data.folder {folder} {state} (no {DESCRIPTION}): prepare it first, or set data.source"
        )
    description = json.loads(description_file.read_text())
    if description.get("format") != FORMAT:
        raise ValueError(f"{description_file} has format {description.get('format')!r}; this version reads {FORMAT!r}")
    counts = description["samples"][split]
    if missing := [r for r in resolutions if str(r) not in counts]:
        raise ValueError(
            f"{folder} has no bucket for {missing} px, only for {', '.join(counts)} px: prepare it for them"
        )
    buckets = [Bucket(folder / split / str(r)) for r in resolutions]
    for bucket, resolution in zip(buckets, resolutions, strict=True):
        if len(bucket) != counts[str(resolution)]:
            raise ValueError(
                f"{bucket.folder} holds {len(bucket)} samples, but {description_file} says {counts[str(resolution)]}: "
                "it was changed after its preparation; prepare it again"
            )
    return buckets
