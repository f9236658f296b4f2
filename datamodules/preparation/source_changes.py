"""What a data set was prepared from: the signature of each part of its source, and what has changed since.

OUTPUT/source.jsonl holds a line for each part: its report, with the name and the signature of the part. By these, a
later preparation sees which parts changed. It takes the chunks of all others from the existing data set.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nami_lightning.datamodules.preparation.parts_folder import REPORT, SOURCE, part_name
from nami_lightning.datamodules.sources.base import Source
from nami_lightning.datamodules.storage.shards import link_chunks
from nami_lightning.utils.atomic_write import publish, this_process, write_text


class Changes(NamedTuple):
    """How many files of a source were added, changed and removed since a data set was prepared."""

    added: int
    changed: int
    removed: int

    def __str__(self) -> str:
        return f"{self.added:,} files added, {self.changed:,} changed, {self.removed:,} removed"


def write_reports(folder: Path, reports: Sequence[dict[str, Any]]) -> None:
    """Write the reports of a data set's parts, completely or not at all."""
    write_text(folder / SOURCE, "".join(json.dumps(report, ensure_ascii=False) + "\n" for report in reports))


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """Return the reports of a data set's parts; none if it was prepared before signatures were stored.

    Raises:
        ValueError: the file can't be read.
    """
    try:
        with (folder / SOURCE).open(encoding="utf-8") as lines:
            reports = [json.loads(line) for line in lines]
        if not all(isinstance(one, dict) and isinstance(one.get("files"), dict) for one in reports):
            raise ValueError("a line names no files")
        return reports
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ValueError(
            f"{folder / SOURCE} is damaged ({error}): remove this one file; then only --rescan sees what changed"
        ) from error


def changes_since(source: Source, output: Path) -> Changes | None:
    """Return what changed in a source since ``output`` was prepared from it; None if nothing did.

    A data set without stored signatures counts as unchanged. So does one whose source is not there any more: a line
    says so.
    """
    old = _all_files(report["files"] for report in read_reports(output))
    if not old:
        return None
    try:
        new = _all_files(map(source.signature, source.parts()))
    except (OSError, ModuleNotFoundError) as error:
        print(f"{output} is used as it is, because its source can't be compared: {error}")
        return None
    if not new:
        print(f"{output} is used as it is, because its source holds no images now.")
        return None
    changed = sum(old[name] != new[name] for name in old.keys() & new.keys())
    changes = Changes(len(new.keys() - old.keys()), changed, len(old.keys() - new.keys()))
    return changes if any(changes) else None


def _all_files(signatures: Iterable[dict[str, str]]) -> dict[str, str]:
    files: dict[str, str] = {}
    for signature in signatures:
        files |= signature
    return files


def take_unchanged(output: Path, parts: dict[int, tuple[str, dict[str, str]]], folder: Path) -> None:
    """Make those of the parts that have not changed from the chunks of the existing data set.

    Args:
        output: the existing data set.
        parts: the name and the signature of each part that is to be made, by its number.
        folder: the folder of parts.
    """
    existing = {_digest(report["files"]): (number, report) for number, report in enumerate(read_reports(output))}
    for number, (name, signature) in parts.items():
        old_number, report = existing.get(_digest(signature), (0, None))
        if report is None:
            continue
        target = folder / part_name(number)
        partial = target.with_name(f".{target.name}.{this_process()}")
        try:
            for bucket in report["checksums"]:
                link_chunks(output / bucket, f"{part_name(old_number)}-", partial / bucket)
        except (
            FileNotFoundError,
            ValueError,
        ):  # it is damaged, so this part is made from the source
            shutil.rmtree(partial)
            continue
        partial.mkdir(parents=True, exist_ok=True)
        (partial / REPORT).write_text(json.dumps(report | {"part": name}, ensure_ascii=False), encoding="utf-8")
        publish(partial, target, REPORT)


def _digest(signature: dict[str, str]) -> str:
    return hashlib.blake2b(json.dumps(signature, sort_keys=True).encode(), digest_size=16).hexdigest()
