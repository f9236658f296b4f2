"""Decide by scores which samples of a data set stay, and write the data set of these.

The samples keep their split, their bucket and their bytes. A chunk from which nothing is removed is linked, not copied.
"""

import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from nami_lightning.datamodules.preparation.parts_folder import (
    check_unused,
    checksums,
    merging,
    part_name,
    parts_folder,
    write_description,
)
from nami_lightning.datamodules.preparation.prepare import split_counts
from nami_lightning.datamodules.scoring.duplicates import Repeats, repeats_by_features, repeats_by_hash
from nami_lightning.datamodules.scoring.score_files import ScorePart, Scores
from nami_lightning.datamodules.storage.dataset import SKIPPED, SPLITS
from nami_lightning.datamodules.storage.shards import ONE_CHUNK, Record, ShardWriter, join, link_chunk
from nami_lightning.utils.text_table import table

ELSEWHERE, OF_HELDOUT, WITHIN = "near-duplicate elsewhere", "near-duplicate of held-out", "near-duplicate"
"""What near-duplicates are called, by where the image that they repeat lies: in another data set, in the held-out
split, or in the same split."""


@dataclass(frozen=True)
class ScoreFilters:
    """Limits on the scores of the samples that stay; null means no limit.

    Args:
        min_similarity: lowest similarity of a caption and its image. Captions below it are dropped; a sample whose
            captions are all dropped is removed.
        min_aesthetic: lowest aesthetic score.
        min_resolution: shortest side in px that the stored image may have.
        min_entropy: lowest entropy of the image's brightness in bits, 0 to 8.
        max_text_area: largest share of the image that is text, 0 to 1.
        near_duplicates: of images whose hashes differ in at most this number of bits (6 is usual), one stays.
        near_duplicate_cosine: of images whose features have at least this cosine, one stays.
    """

    min_similarity: float | None = None
    min_aesthetic: float | None = None
    min_resolution: int | None = None
    min_entropy: float | None = None
    max_text_area: float | None = None
    near_duplicates: int | None = None
    near_duplicate_cosine: float | None = None

    def __post_init__(self) -> None:
        if self.near_duplicates is not None and self.near_duplicate_cosine is not None:
            raise ValueError("give one of --filters.near_duplicates and --filters.near_duplicate_cosine, not both")

    @property
    def limits(self) -> dict[str, float]:
        """The limits of scores that are set, by name."""
        names = [field.name for field in fields(self) if field.name[:4] in ("min_", "max_")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Decision:
    """Which samples stay, and why the others don't.

    Attributes:
        scores: the scores of the data set.
        filters: the limits.
        removed: for each reason, ``(N,)`` the samples that it removes.
        dropped: one row for each caption: the captions that are dropped.
        repeats: which sample each one repeats: its number in this data set, or, from N on, in the others.
        others: the scores of the other data sets that were compared.
    """

    scores: Scores
    filters: ScoreFilters
    removed: dict[str, np.ndarray]
    dropped: np.ndarray
    repeats: Repeats
    others: Sequence[Scores]

    @cached_property
    def kept(self) -> np.ndarray:
        """``(N,)`` the samples that stay."""
        removed: np.ndarray = np.logical_or.reduce([np.zeros(len(self.scores), bool), *self.removed.values()])
        return ~removed

    def lines(self) -> list[str]:
        """Return the table that says what each filter removed."""
        return table(self.rows(), "<>>>>")

    def rows(self) -> list[list[str]]:
        """Return the rows of that table, with its header."""
        total = len(self.scores)
        rows = [["filter", "limit", "removes", "share", "alone"]]
        counts = sum(mask.astype(np.int64) for mask in self.removed.values())
        for name, mask in self.removed.items():
            limit = self.filters.limits.get(name, self.filters.near_duplicates)
            limit = self.filters.near_duplicate_cosine if limit is None else limit
            alone = int((mask & (counts == 1)).sum())
            rows.append([name, f"{limit:g}", f"{mask.sum():,}", f"{mask.mean():.1%}", f"{alone:,}"])
        kept = int(self.kept.sum())
        rows.append(["kept", "", f"{kept:,} of {total:,}", f"{kept / total:.1%}", ""])
        return rows


def decide(
    scores: Scores, filters: ScoreFilters, others: Sequence[Scores] = (), device: torch.device | str = "cpu"
) -> Decision:
    """Decide which samples stay.

    Of near-duplicates, an image of another data set comes first, then a held-out one, then the largest. Samples that a
    limit removes are not compared.

    Args:
        scores: the scores of the data set.
        filters: the limits.
        others: scores of other data sets: what is nearly in these is removed.
        device: the device that compares features.

    Raises:
        ValueError: a score with a limit was not made.
    """
    removed: dict[str, np.ndarray] = {}
    dropped = np.zeros(int(scores.captions.sum()), bool)
    for name, limit in filters.limits.items():
        score = name[4:]
        values = scores.of_samples(score)
        if values is None:
            raise ValueError(
                f"--filters.{name}: {scores.dataset.location} has no score {score} (it has "
                f"{', '.join(scores.values)}): lightning data score makes it"
            )
        removed[name] = ~(values >= limit) if name.startswith("min_") else ~(values <= limit)
        if score == "similarity":
            dropped = ~(scores.values[score] >= limit)
    stays = ~np.logical_or.reduce([np.zeros(len(scores), bool), *removed.values()])
    repeats = find_repeats(scores, stays, filters, others, device)
    if filters.near_duplicates is not None or filters.near_duplicate_cosine is not None:
        own = np.arange(len(scores))
        is_repeat, elsewhere = repeats.original != own, repeats.original >= len(scores)
        of_heldout = np.zeros(len(scores), bool)
        inside = is_repeat & ~elsewhere
        of_heldout[inside] = scores.heldout[repeats.original[inside]] & ~scores.heldout[inside]
        if others:
            removed[ELSEWHERE] = elsewhere
        removed |= {OF_HELDOUT: of_heldout, WITHIN: inside & ~of_heldout}
    return Decision(scores, filters, removed, dropped, repeats, others)


def find_repeats(
    scores: Scores, stays: np.ndarray, filters: ScoreFilters, others: Sequence[Scores], device: torch.device | str
) -> Repeats:
    """Return which image each sample that ``stays`` repeats; the images of other data sets are numbered after these.

    Raises:
        ValueError: what is to be compared was not stored.
    """
    number, own = len(scores), np.arange(len(scores))
    none = Repeats(own, np.zeros(number))
    if filters.near_duplicates is None and filters.near_duplicate_cosine is None:
        return none
    name = "hash" if filters.near_duplicates is not None else "features"
    for one in (scores, *others):
        if name not in one.values:
            raise ValueError(
                f"--filters.near_duplicate_cosine: no features of {one.dataset.location} are stored: lightning data "
                "score --clip NAME --features stores them"
            )
    preferred = np.lexsort((own, -scores.values["resolution"], ~scores.heldout))
    order = np.concatenate([np.arange(number, number + sum(map(len, others))), preferred[stays[preferred]]])

    def ordered(name: str) -> np.ndarray:
        whole = np.concatenate([one.values[name] for one in (scores, *others)])
        return whole[order]

    if filters.near_duplicates is not None:
        found = repeats_by_hash(ordered("hash"), ordered("colours"), filters.near_duplicates)
    else:
        assert filters.near_duplicate_cosine is not None
        found = repeats_by_features(ordered("features"), filters.near_duplicate_cosine, device)
    ours = order < number
    none.original[order[ours]] = order[found.original[ours]]
    none.likeness[order[ours]] = found.likeness[ours]
    return none


# --- writing -----------------------------------------------------------------------------------


def write_filtered(decision: Decision, output: Path, workers: int) -> None:
    """Write the data set of the samples that stay, completely or not at all.

    Args:
        decision: which samples stay.
        output: the folder of the new data set.
        workers: the number of processes.

    Raises:
        ValueError: no sample stays, or the folder holds something else.
    """
    check_unused(output, "is not empty")
    if not decision.kept.any():
        raise ValueError("no sample would stay: choose other limits")
    scores, dataset = decision.scores, decision.scores.dataset
    first_captions = np.cumsum(scores.captions) - scores.captions
    with merging(output) as partial, ProcessPoolExecutor(max(1, workers)) as pool:
        temporary = parts_folder(output) / f".{partial.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        jobs = []
        for number, (part, numbers) in enumerate(scores.slices()):
            of_part = range(*numbers.indices(len(scores)))
            keep = [
                ~decision.dropped[first_captions[n] : first_captions[n] + scores.captions[n]]
                if decision.kept[n]
                else np.zeros(scores.captions[n], bool)
                for n in of_part
            ]
            jobs.append(pool.submit(_copy_part, part, keep, temporary / part_name(number), _chunk_bytes(decision)))
        sums = [job.result() for job in tqdm(jobs, desc="writing", unit="chunk")]
        counts: dict[str, int] = {}
        all_sums: dict[str, str] = {}
        numbered = list(enumerate(scores.parts))
        for bucket, group in groupby(numbered, key=lambda entry: f"{entry[1].split}/{entry[1].bucket.name}"):
            chosen = [number for number, _ in group if sums[number]]
            names = [part_name(number) for number in chosen]
            if chosen:
                counts[bucket] = join([temporary / name for name in names], names, partial / bucket)
            for number in chosen:
                all_sums |= {f"{bucket}/{part_name(number)}-{file}": value for file, value in sums[number].items()}
        shutil.rmtree(temporary)
        if dataset.cache:
            dataset.cache.metadata(SKIPPED)
        shutil.copyfile(dataset.folder / SKIPPED, partial / SKIPPED)
        write_description(partial, _description(decision, counts, all_sums))


def _chunk_bytes(decision: Decision) -> int:
    return int(decision.scores.dataset.description["settings"]["chunk_mib"]) * 2**20


def _copy_part(part: ScorePart, keep: list[np.ndarray], target: Path, chunk_bytes: int) -> dict[str, str]:
    """Write the samples of a part that stay, and return the checksums of its chunks; none if no sample stays.

    ``keep`` says for each sample which of its captions stay.
    """
    shards = part.bucket.shards
    if shards.cache is None and all(one.all() for one in keep):
        link_chunk(shards.folder, part.chunk, target)
        return {ONE_CHUNK: part.checksum}
    writer = ShardWriter(target, chunk_bytes)
    for number, one in enumerate(keep):
        if one.any():
            record = Record.from_item(shards.read([part.first + number])[0])
            writer.write(record.with_captions(np.flatnonzero(one).tolist()).to_item())
    writer.close()
    return checksums(target)


def _description(decision: Decision, counts: dict[str, int], sums: dict[str, str]) -> dict[str, Any]:
    """Return the description of the new data set: that of the old one, with what the filters removed."""
    scores = decision.scores
    old = scores.dataset.description
    removed = dict(old["removed"])
    left = np.ones(len(scores), bool)
    for name, mask in decision.removed.items():  # a sample counts for the first reason that removes it
        if count := int((mask & left).sum()):
            removed[name] = removed.get(name, 0) + count
        left &= ~mask
    filters = {name: value for name, value in asdict(decision.filters).items() if value is not None}
    return old | {
        "settings": old["settings"] | {"filters": old["settings"]["filters"] | filters},
        "samples": {split: split_counts(counts, split) for split in SPLITS},
        "removed": removed,
        "checksums": sums,
        "scores": scores.settings,
    }
