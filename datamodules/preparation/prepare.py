"""A data set from a source: its parts made, then joined; chunks are linked, not rewritten, but for duplicates."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nami_lightning.datamodules.preparation.prepare_parts import (
    DIGEST_BYTES,
    DIGESTS,
    REPORT,
    Preparation,
    check_settings,
    checksums,
    finished_parts,
    parts_folder,
    prepare_parts,
    publish,
    settings_of,
)
from nami_lightning.datamodules.sources.base import Source
from nami_lightning.datamodules.storage.dataset import DESCRIPTION, FORMAT, SKIPPED, SPLITS
from nami_lightning.datamodules.storage.shards import Shards, ShardWriter, join
from nami_lightning.utils.atomic_write import this_process


def prepare(source: Source, output: Path, preparation: Preparation, workers: int) -> Path:
    """Make the data set at ``output``, go on with it, or find it there complete.

    Args:
        source: where the images come from.
        output: the data set's folder; ``OUTPUT.parts`` beside it holds the parts until it is complete.
        preparation: what is made of them.
        workers: processes.

    Returns:
        ``output``.

    Raises:
        ValueError: the source is empty, or ``output`` was made with other settings.
    """
    if not is_complete(source, output, preparation):
        prepare_parts(source, output, preparation, workers)
        merge(source, output, preparation)
    return output


def is_complete(source: Source, output: Path, preparation: Preparation) -> bool:
    """Whether ``output`` is the finished data set of these settings.

    Raises:
        ValueError: it is one of other settings, or something else.
    """
    description = output / DESCRIPTION
    if description.exists():
        check_settings(json.loads(description.read_text())["settings"], settings_of(source, preparation), output)
        return True
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not a data set: choose another output")
    return False


def merge(source: Source, output: Path, preparation: Preparation) -> None:
    """Join the parts of ``output``, give the whole its name, and remove the parts.

    Raises:
        ValueError: parts are missing, or no sample is left.
    """
    partial = output.with_name(f".{output.name}.merging-{this_process()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        parts = finished_parts(output, len(source.parts()))
        reports = [json.loads((part / REPORT).read_text()) for part in parts]
        duplicates = find_duplicates(parts) if preparation.filters.drop_duplicates else {}
        sums, counts = _join_buckets(parts, reports, duplicates, partial, preparation.chunk_mib)
        if not counts:
            raise ValueError(f"no sample is left: {_summary(reports)}; see {parts_folder(output)}/*/{REPORT}")
        _write_skipped(reports, partial / SKIPPED)
        removed = _total(reports, "removed")
        if duplicates:
            removed["duplicate"] = sum(map(len, duplicates.values()))
        description = {
            "format": FORMAT,
            "settings": settings_of(source, preparation),
            "read": sum(report["read"] for report in reports),
            "samples": {split: counts_of(counts, split) for split in SPLITS},
            "removed": removed,
            "skipped": _reasons(reports),
            "checksums": sums,
        }
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        publish(partial, output, DESCRIPTION)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        if not (output / DESCRIPTION).exists():  # else another process has done it
            raise
    shutil.rmtree(parts_folder(output), ignore_errors=True)


def find_duplicates(parts: Sequence[Path]) -> dict[tuple[str, str], set[int]]:
    """(part, bucket) to the positions of images whose very bytes come earlier in the data set."""
    places = [(part, file) for part in parts for file in sorted(part.glob(f"*/*/*/{DIGESTS}"))]
    digests = [np.fromfile(file, dtype=f"V{DIGEST_BYTES}") for _, file in places]
    first = np.zeros(sum(map(len, digests)), dtype=bool)
    first[np.unique(np.concatenate(digests), return_index=True)[1]] = True
    ends = np.cumsum([len(rows) for rows in digests])
    found = {}
    for (part, file), rows in zip(places, np.split(first, ends[:-1]), strict=True):
        if not rows.all():
            found[part.name, str(file.parent.relative_to(part))] = set(np.flatnonzero(~rows).tolist())
    return found


def _join_buckets(
    parts: Sequence[Path],
    reports: Sequence[dict[str, Any]],
    duplicates: dict[tuple[str, str], set[int]],
    target: Path,
    chunk_mib: int,
) -> tuple[dict[str, str], dict[str, int]]:
    """Make the buckets of ``target``; checksums by chunk file, and samples by bucket."""
    sums: dict[str, str] = {}
    counts: dict[str, int] = {}
    for bucket in sorted({bucket for report in reports for bucket in report["checksums"]}):
        folders, names = [], []
        for part, report in zip(parts, reports, strict=True):
            if bucket not in report["checksums"]:
                continue
            folder, of_part = part / bucket, report["checksums"][bucket]
            if twice := duplicates.get((part.name, bucket)):
                folder = target / "rewritten" / part.name / bucket
                _copy_without(part / bucket, twice, folder, chunk_mib)
                of_part = checksums(folder)
            folders.append(folder)
            names.append(part.name)
            sums |= {f"{bucket}/{part.name}-{file}": value for file, value in of_part.items()}
        counts[bucket] = join(folders, names, target / bucket)
    shutil.rmtree(target / "rewritten", ignore_errors=True)
    return sums, {bucket: count for bucket, count in counts.items() if count}


def _copy_without(folder: Path, positions: set[int], target: Path, chunk_mib: int) -> None:
    shards = Shards(folder)
    writer = ShardWriter(target, chunk_mib * 2**20)
    for position in range(len(shards)):
        if position not in positions:
            writer.write(shards.read([position])[0])
    writer.close()


def counts_of(counts: dict[str, int], split: str) -> dict[str, int]:
    """Samples by bucket of one split, without its name."""
    return {name.removeprefix(f"{split}/"): n for name, n in counts.items() if name.startswith(f"{split}/")}


def _skipped(reports: Sequence[dict[str, Any]]) -> Iterator[dict[str, str]]:
    return (skipped for report in reports for skipped in report["skipped"])


def _reasons(reports: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many were skipped, by the part of the reason that isn't particular to the sample."""
    return dict(Counter(skipped["reason"].split(":")[0] for skipped in _skipped(reports)))


def _total(reports: Sequence[dict[str, Any]], key: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report[key])
    return dict(total)


def _summary(reports: Sequence[dict[str, Any]]) -> str:
    counts = {"read": sum(report["read"] for report in reports)} | _total(reports, "removed") | _reasons(reports)
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())


def _write_skipped(reports: Sequence[dict[str, Any]], file: Path) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for skipped in _skipped(reports):
            stream.write(json.dumps(skipped, ensure_ascii=False) + "\n")
