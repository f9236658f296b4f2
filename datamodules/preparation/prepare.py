"""Make a data set from a source: prepare its parts, then merge them.

Merging links the chunks of the parts. It rewrites only chunks that hold duplicates.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nami_lightning.datamodules.preparation.parts_folder import (
    REPORT,
    SETTINGS,
    SOURCE,
    check_settings,
    check_unused,
    checksums,
    finish_replacing,
    finished_parts,
    merging,
    parts_folder,
    write_description,
)
from nami_lightning.datamodules.preparation.prepare_parts import (
    DIGEST_BYTES,
    DIGESTS,
    RESCAN,
    Preparation,
    prepare_parts,
    settings_of,
)
from nami_lightning.datamodules.preparation.remote_output import RemoteOutput
from nami_lightning.datamodules.preparation.source_changes import changes_since, write_reports
from nami_lightning.datamodules.sources.base import Source
from nami_lightning.datamodules.storage.dataset import DESCRIPTION, FORMAT, SKIPPED, SPLITS, PreparedDataset
from nami_lightning.datamodules.storage.remote import is_remote
from nami_lightning.datamodules.storage.shards import Shards, ShardWriter, join


def prepare(
    source: Source, output: Path, preparation: Preparation, workers: int, rescan: bool = False, keep: bool = False
) -> Path:
    """Make the data set at ``output``, continue an interrupted preparation, or do nothing if it is complete.

    If the source has changed since the data set was made, the changed parts are prepared again. The data set is then
    replaced as a whole.

    Args:
        source: where the images come from.
        output: the data set's folder. Until it is complete, ``OUTPUT.parts`` beside it holds the finished parts.
        preparation: how the images are prepared.
        workers: the number of processes.
        rescan: read the whole source again, because files may have changed with size and time of modification kept.
        keep: leave a complete data set as it is, even if its source has changed since it was made.

    Returns:
        ``output``.

    Raises:
        ValueError: the source is empty, or ``output`` was made with other settings.
    """
    if not is_complete(source, output, preparation, rescan, keep):
        prepare_parts(source, output, preparation, workers, rescan=rescan)
        merge(source, output, preparation)
    return output


def is_complete(
    source: Source, output: Path | str, preparation: Preparation, rescan: bool = False, keep: bool = False
) -> bool:
    """Return whether ``output`` is the finished data set of these settings; if its source changed, print how.

    With ``keep`` it counts as finished although its source changed. A data set in a store is never replaced.

    Raises:
        ValueError: it is a data set of other settings, or something else; or it lies in a store and would be replaced.
        FetchFailed: a store can't be reached, or it refuses access.
    """
    if is_remote(output):
        return _is_complete_in_store(source, RemoteOutput(str(output)), preparation, rescan)
    output = Path(output)
    finish_replacing(output)
    if not (output / DESCRIPTION).exists():
        check_unused(output, "is not a data set")
        return False
    try:
        description = PreparedDataset(output).description
    except ValueError as error:  # damaged, of another version, or a file of somebody else's with this name
        raise ValueError(f"{output} holds no data set that can be used ({error}): choose another output") from error
    check_settings(description["settings"], settings_of(source, preparation), output)
    if rescan:
        print(f"{output}: all of its source is read again.")
        return False
    if changes := changes_since(source, output):
        if keep:
            print(
                f"{output}: its source has changed ({changes}), but a run that resumes goes on with the data set as it "
                "was prepared. To prepare it again: --accept_changed_data, or --fresh"
            )
            return True
        print(f"{output}: its source has changed ({changes}), so what changed is prepared again.")
        return False
    return True


def _is_complete_in_store(source: Source, store: RemoteOutput, preparation: Preparation, rescan: bool) -> bool:
    description = store.description()
    if description is None:
        return False
    check_settings(description["settings"], settings_of(source, preparation), store.url)
    changes = "all of its source is to be read again" if rescan else changes_since(source, store.fetch_reports())
    store.close()
    if changes:
        raise ValueError(
            f"{store.url} is complete, but its source has changed ({changes}), and a data set in a store is not "
            "replaced, because runs may be reading it: choose another output"
        )
    return True


def merge(source: Source, output: Path | str, preparation: Preparation) -> None:
    """Merge the parts into the data set at ``output``, a folder or a URL, and remove them.

    An existing data set is replaced only if the new one differs from it, or if all of the source was read again: its
    files may be damaged.

    Raises:
        ValueError: parts are missing, the source changed after parts were made, or no sample is left.
        FetchFailed: a store can't be reached, or it refuses access.
    """
    store = RemoteOutput(str(output)) if is_remote(output) else None
    output = store.pull() if store else Path(output)
    existing = output / DESCRIPTION
    old = json.loads(existing.read_text(encoding="utf-8")) if existing.exists() else None
    with store.merging() if store else merging(output, replace=old is not None) as partial:
        names = source.parts()
        parts = finished_parts(output, len(names))
        reports = [json.loads((part / REPORT).read_text(encoding="utf-8")) for part in parts]
        made_with = json.loads((parts_folder(output) / SETTINGS).read_text())
        rescan = made_with.pop(RESCAN, False)
        check_settings(made_with, settings_of(source, preparation), parts_folder(output))
        if changed := [number for number, name in enumerate(names) if reports[number]["part"] != name]:
            raise ValueError(
                f"the source changed after {len(changed)} of its parts were made (part {changed[0]} is the first): run "
                "the preparation again, then merge"
            )
        duplicates = find_duplicates(parts) if preparation.filters.drop_duplicates else {}
        sums, counts = _join_buckets(parts, reports, duplicates, partial, preparation.chunk_mib, store)
        if not counts:
            raise ValueError(f"no sample is left: {_summarize(reports)}; see {parts_folder(output)}/*/{REPORT}")
        _write_skipped(reports, partial / SKIPPED)
        removed = _add_counts(reports, "removed")
        if duplicates:
            removed["duplicate"] = sum(map(len, duplicates.values()))
        description = {
            "format": FORMAT,
            "settings": settings_of(source, preparation),
            "read": sum(report["read"] for report in reports),
            "samples": {split: split_counts(counts, split) for split in SPLITS},
            "removed": removed,
            "notes": _add_counts(reports, "notes"),
            "skipped": _count_reasons(reports),
            "checksums": sums,
        }
        write_reports(partial, reports)
        if old is not None and not rescan and _is_same(old, description):
            print(f"{output} stays as it is: what is prepared from the source now is the same.")
            for name in (SKIPPED, SOURCE):
                (partial / name).replace(output / name)
            shutil.rmtree(partial)
            return
        write_description(partial, description)


def _is_same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Return whether two descriptions say the same; those of older versions lack some keys."""
    return all(old.get(key, value) == value for key, value in new.items())


def find_duplicates(parts: Sequence[Path]) -> dict[tuple[str, str], set[int]]:
    """Return the positions, by (part, bucket), of images whose file has exactly the bytes of an earlier one."""
    files = [(part, file) for part in parts for file in sorted(part.glob(f"*/*/*/{DIGESTS}"))]
    digests = [np.fromfile(file, dtype=f"V{DIGEST_BYTES}") for _, file in files]
    first = np.zeros(sum(map(len, digests)), dtype=bool)
    first[np.unique(np.concatenate(digests), return_index=True)[1]] = True
    ends = np.cumsum([len(rows) for rows in digests])
    duplicates = {}
    for (part, file), is_first in zip(files, np.split(first, ends[:-1]), strict=True):
        if not is_first.all():
            duplicates[part.name, str(file.parent.relative_to(part))] = set(np.flatnonzero(~is_first).tolist())
    return duplicates


def _join_buckets(
    parts: Sequence[Path],
    reports: Sequence[dict[str, Any]],
    duplicates: dict[tuple[str, str], set[int]],
    target: Path,
    chunk_mib: int,
    store: RemoteOutput | None,
) -> tuple[dict[str, str], dict[str, int]]:
    """Make the buckets of ``target``; return the checksums of the chunk files, and the samples of each bucket."""
    sums: dict[str, str] = {}
    counts: dict[str, int] = {}
    for bucket in sorted({bucket for report in reports for bucket in report["checksums"]}):
        folders, names = [], []
        for part, report in zip(parts, reports, strict=True):
            if bucket not in report["checksums"]:
                continue
            folder, name, part_sums = part / bucket, part.name, report["checksums"][bucket]
            if positions := duplicates.get((part.name, bucket)):
                folder = target / "rewritten" / part.name / bucket
                if store:  # a chunk in a store keeps its content for good, so what is made of it has another name
                    store.fetch_chunks(part.name, bucket, part_sums)
                    name = f"{part.name}-distinct"
                _copy_without(part / bucket, positions, folder, chunk_mib)
                part_sums = checksums(folder)
            folders.append(folder)
            names.append(name)
            sums |= {f"{bucket}/{name}-{file}": value for file, value in part_sums.items()}
        counts[bucket] = join(folders, names, target / bucket, in_store=store is not None)
    shutil.rmtree(target / "rewritten", ignore_errors=True)
    return sums, {bucket: count for bucket, count in counts.items() if count}


def _copy_without(folder: Path, positions: set[int], target: Path, chunk_mib: int) -> None:
    """Copy a folder of shards without the samples at ``positions``."""
    shards = Shards(folder)
    writer = ShardWriter(target, chunk_mib * 2**20)
    for position in range(len(shards)):
        if position not in positions:
            writer.write(shards.read([position])[0])
    writer.close()


def split_counts(counts: dict[str, int], split: str) -> dict[str, int]:
    """Return the samples of each bucket of one split, by the bucket's name without the split."""
    return {name.removeprefix(f"{split}/"): n for name, n in counts.items() if name.startswith(f"{split}/")}


def _all_skipped(reports: Sequence[dict[str, Any]]) -> Iterator[dict[str, str]]:
    return (skipped for report in reports for skipped in report["skipped"])


def _count_reasons(reports: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return how many samples were skipped for each reason, without the details that follow a colon in the reason."""
    return dict(Counter(skipped["reason"].split(":")[0] for skipped in _all_skipped(reports)))


def _add_counts(reports: Sequence[dict[str, Any]], key: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report[key])
    return dict(total)


def _summarize(reports: Sequence[dict[str, Any]]) -> str:
    counts = (
        {"read": sum(report["read"] for report in reports)} | _add_counts(reports, "removed") | _count_reasons(reports)
    )
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())


def _write_skipped(reports: Sequence[dict[str, Any]], file: Path) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for skipped in _all_skipped(reports):
            stream.write(json.dumps(skipped, ensure_ascii=False) + "\n")
