"""The files of scores, and the scores of a whole data set.

FOLDER/scores/settings.json                          which models made the scores
FOLDER/scores/train/256/256x256/CHUNK.npz            the scores of the samples of one chunk, in their order:
    chunk        the checksum of the chunk that was scored; after it changed, the scores are made again
    captions     (n,) number of captions of each sample
    resolution, entropy, text_area, aesthetic        (n,), those that were asked for
    similarity   one number for each caption, sample after sample
    hash, colours    (n,) and (n, 48): what near-duplicates share
    features     (n, width) float16: the features of the CLIP, if they were asked for
"""

import json
import zipfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nami_lightning.datamodules.storage.dataset import SPLITS, Bucket, PreparedDataset, Split
from nami_lightning.utils.atomic_write import replacing
from nami_lightning.utils.text_table import table

SCORES = "scores"
SETTINGS = "settings.json"
SINGLE = ("resolution", "entropy", "text_area", "aesthetic")
"""The scores that are one number a sample."""

QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


class ScorePart(NamedTuple):
    """One part of the work: the samples of one chunk.

    Attributes:
        split: the split of the samples.
        bucket: the bucket of the samples.
        chunk: the number of the chunk in the bucket.
        first: the index of the first sample in the bucket.
        samples: the number of samples.
        checksum: the checksum of the chunk.
    """

    split: Split
    bucket: Bucket
    chunk: int
    first: int
    samples: int
    checksum: str

    @property
    def file(self) -> str:
        """The name of the part's scores below the folder of scores."""
        return f"{self.split}/{self.bucket.name}/{self.bucket.shards.chunk_file(self.chunk).stem}.npz"


def list_parts(dataset: PreparedDataset) -> list[ScorePart]:
    """Return the parts of a data set of images, in the order in which its samples are numbered.

    Raises:
        ValueError: it holds encodings.
    """
    if dataset.encodings is not None:
        raise ValueError(f"{dataset.location} holds encodings: give the data set of images that they were made from")
    parts = []
    for split in SPLITS:
        for bucket in dataset.buckets(split):
            first = 0
            for chunk, samples in enumerate(bucket.shards.chunk_sizes):
                name = f"{split}/{bucket.name}/{bucket.shards.chunk_file(chunk).name}"
                checksum = dataset.description["checksums"].get(name, "")
                parts.append(ScorePart(split, bucket, chunk, first, samples, checksum))
                first += samples
    return parts


def scores_folder(dataset: PreparedDataset, output: str | Path | None) -> Path:
    """Return the folder of a data set's scores: the given one, or ``scores`` in the data set's folder.

    Raises:
        ValueError: the data set is remote, and no folder is given.
    """
    if output:
        return Path(output)
    if dataset.cache is not None:
        raise ValueError(f"{dataset.location} is remote: give the folder of its scores with --scores")
    return dataset.folder / SCORES


def write_part(folder: Path, part: ScorePart, arrays: dict[str, np.ndarray]) -> None:
    """Write the scores of one part, completely or not at all."""
    content: dict[str, Any] = {"chunk": np.array(part.checksum), **arrays}
    with replacing(folder / part.file) as partial, partial.open("wb") as file:
        np.savez(file, **content)


def read_part(folder: Path, part: ScorePart) -> dict[str, np.ndarray] | None:
    """Return the scores of one part; None if there are none, or if the chunk has changed after they were made."""
    try:
        with np.load(folder / part.file, allow_pickle=False) as arrays:
            if str(arrays["chunk"]) != part.checksum:
                return None
            return {name: arrays[name] for name in arrays.files if name != "chunk"}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def is_scored(folder: Path, part: ScorePart) -> bool:
    """Return whether a part has scores that were made of its chunk as it is now."""
    try:
        with np.load(folder / part.file, allow_pickle=False) as arrays:
            return str(arrays["chunk"]) == part.checksum
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False


@dataclass(frozen=True)
class Scores:
    """The scores of all samples of a data set, which are numbered from 0 on.

    Attributes:
        dataset: the data set.
        parts: its parts, in the order of the samples.
        values: the scores of each kind; ``similarity`` has one row for each caption, the others one for each sample.
        captions: ``(N,)`` the number of captions of each sample.
        settings: which models made the scores.
    """

    dataset: PreparedDataset
    parts: list[ScorePart]
    values: dict[str, np.ndarray]
    captions: np.ndarray
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def heldout(self) -> np.ndarray:
        """``(N,)`` whether each sample is in the held-out split."""
        return np.repeat([part.split == "heldout" for part in self.parts], [part.samples for part in self.parts])

    def of_samples(self, name: str) -> np.ndarray | None:
        """Return a score of each sample ``(N,)``, of its best caption for the similarity; None if it was not made."""
        values = self.values.get(name)
        if name != "similarity" or values is None:
            return values
        best: np.ndarray = np.maximum.reduceat(values, np.cumsum(self.captions) - self.captions)
        return best

    def slices(self) -> Iterator[tuple[ScorePart, slice]]:
        """Yield each part with the numbers of its samples."""
        first = 0
        for part in self.parts:
            yield part, slice(first, first + part.samples)
            first += part.samples

    @cached_property
    def ends(self) -> list[int]:
        """The number after each part's last sample."""
        return list(accumulate(part.samples for part in self.parts))

    def item(self, number: int) -> Any:
        """Return the stored item of a sample."""
        place = bisect_right(self.ends, number)
        part = self.parts[place]
        return part.bucket.shards.read([part.first + number - self.ends[place] + part.samples])[0]


def read_scores(dataset: PreparedDataset, folders: Sequence[Path], features: bool = False) -> Scores:
    """Return the scores of a data set.

    Args:
        dataset: the data set.
        folders: the folders of its scores; several may hold scores of different kinds, of which the first counts.
        features: also read the features.

    Raises:
        FileNotFoundError: a folder holds no scores.
        ValueError: some samples have no scores, or not of this data set as it is now.
    """
    parts = list_parts(dataset)
    values: dict[str, list[np.ndarray]] = {}
    captions: list[np.ndarray] = []
    settings: dict[str, Any] = {}
    for folder in folders:
        if not (folder / SETTINGS).exists():
            raise FileNotFoundError(
                f"{folder} holds no scores of {dataset.location}: lightning data score {dataset.location} makes them"
            )
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8")) | settings
        found = [read_part(folder, part) for part in parts]
        if missing := sum(arrays is None for arrays in found):
            raise ValueError(
                f"{missing} of the {len(parts)} chunks of {dataset.location} have no scores in {folder}, or changed "
                "after they were scored: run lightning data score again, which makes the missing ones"
            )
        whole = [arrays for arrays in found if arrays is not None]
        captions = [arrays["captions"] for arrays in whole]
        for name in whole[0]:
            if name != "captions" and name not in values and (features or name != "features"):
                values[name] = [arrays[name] for arrays in whole]
    joined = {name: np.concatenate(arrays) for name, arrays in values.items()}
    return Scores(dataset, parts, joined, np.concatenate(captions), settings)


def quantile_lines(scores: Scores) -> list[str]:
    """Return the table of the quantiles of each score."""
    rows = [["score", *QUANTILES]]
    for name in ("similarity", *SINGLE):
        if (values := scores.values.get(name)) is not None:
            rows.append([name, *(f"{value:.4g}" for value in np.quantile(values, list(QUANTILES.values())))])
    return table(rows, "<>>>>>")
