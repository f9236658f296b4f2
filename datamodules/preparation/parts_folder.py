"""The folder of parts, ``OUTPUT.parts``: the finished parts of a data set that is not complete yet.

Data sets of images and of encodings are both made in parts. The folder holds the settings that all parts share, and
each finished part under its number. When all are finished, they are merged into the data set, and the folder is
removed. Parts of other settings are kept beside it, as ``OUTPUT.parts.HASH``, until a data set is complete.
"""

import glob
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nami_lightning.datamodules.storage.chunk_file import checksum
from nami_lightning.datamodules.storage.dataset import DESCRIPTION, SKIPPED, SPLITS
from nami_lightning.datamodules.storage.shards import read_index
from nami_lightning.utils.atomic_write import publish, replacing, this_process

SETTINGS = "settings.json"
SOURCE = "source.jsonl"
"""In a data set: the reports of its parts, with the signatures of the parts of the source."""
REPORT = "report.json"
PREVIOUS = "previous"
"""The data set that is being replaced, until the new one has its name."""
OURS = re.compile(rf"\d{{6,}}|\..*|{re.escape(SETTINGS)}|{PREVIOUS}|merging-.*|complete-.*", re.DOTALL)
"""The names of what may be in a folder of parts."""


def parts_folder(output: Path) -> Path:
    """Return the folder that holds the parts of ``output`` until they are merged."""
    output = output.resolve()
    return output.parent / f"{output.name}.parts"


def part_name(number: int) -> str:
    """Return the name of a part's folder."""
    return f"{number:06d}"


def start_or_resume(folder: Path, settings: dict[str, Any], shared: bool = False) -> None:
    """Start a folder of parts, or continue with the one of the same settings; parts of other settings are set aside.

    Args:
        folder: the folder of parts.
        settings: the settings that all its parts share.
        shared: other machines make parts in the same folder, so it must not be set aside.

    Raises:
        OtherSettings: it is shared, and has other settings.
        ValueError: it has files of somebody else's, or can't be made.
    """
    check_ours(folder)
    file = folder / SETTINGS
    if file.exists():
        existing = json.loads(file.read_text())
        if existing == settings:
            return
        if shared:
            check_settings(existing, settings, folder)
        changes = "; ".join(changed_settings(existing, settings))
        print(f"The unfinished parts in {folder} were made with other settings ({changes}), so new ones are made.")
        set_aside(folder)
    if (aside := _aside(folder, settings)).exists():
        aside.rename(folder)
        return
    try:
        with replacing(file) as partial:
            partial.write_text(json.dumps(settings, indent=2))
    except OSError as error:
        raise ValueError(
            f"{folder}, for the unfinished parts, can't be made ({error.strerror}): choose another output"
        ) from error


def check_ours(folder: Path) -> None:
    """Refuse a folder of parts with files that no preparation wrote, because it is removed in the end.

    Raises:
        ValueError: it has such files.
    """
    foreign = [path.name for path in folder.iterdir() if not OURS.fullmatch(path.name)] if folder.is_dir() else []
    if foreign:
        raise ValueError(
            f"{folder} is for unfinished parts, but holds something else ({min(foreign)}): move it, or choose another "
            "output"
        )


def set_aside(folder: Path) -> None:
    """Keep a folder of parts under a name that tells its settings; the same settings find it again."""
    aside = _aside(folder, json.loads((folder / SETTINGS).read_text()))
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def _aside(folder: Path, settings: dict[str, Any]) -> Path:
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=6).hexdigest()
    return folder.with_name(f"{folder.name}.{digest}")


class OtherSettings(ValueError):
    """An error for a folder that was made with other settings; the message names those that changed."""


def check_settings(existing: dict[str, Any], wanted: dict[str, Any], folder: Path | str) -> None:
    """Refuse to continue in a folder that was made with other settings.

    Raises:
        OtherSettings: the settings differ.
    """
    if changes := "; ".join(changed_settings(existing, wanted)):
        raise OtherSettings(f"{folder} was made with other settings ({changes}): choose another output")


def changed_settings(existing: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a text like ``source.path was photos and is pictures now`` for each innermost key whose value changed."""
    for key in sorted(existing.keys() | wanted.keys()):
        old, new = existing.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changed_settings(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {old} and is {new} now"


def check_unused(output: Path, problem: str) -> None:
    """Refuse an output that already has some content, or that can't be replaced by a folder.

    Raises:
        ValueError: it is a file, a folder that is not empty (the message states ``problem``), the current folder, or a
            URL; or its folder of parts has files of somebody else's.
    """
    if ":/" in str(output):  # pathlib makes one slash of two
        raise ValueError(f"the output {output} is a URL: name a folder on this machine, and copy it afterwards")
    if Path.cwd().is_relative_to(output.resolve()):
        raise ValueError(
            f"the output {output} is the current folder, or above it: name a folder that is made for the data set, "
            f"{output / 'shards'} for example"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and {problem}: choose another output")
    check_ours(parts_folder(output))


def unfinished_parts(folder: Path, numbers: range) -> list[int]:
    """Return those of ``numbers`` whose parts are not finished, and print how many are."""
    missing = [number for number in numbers if not (folder / part_name(number)).exists()]
    if len(missing) < len(numbers):
        print(f"{len(numbers) - len(missing)} of {len(numbers)} parts are done already.")
    return missing


def remove_changed_parts(folder: Path, parts: dict[int, tuple[str, dict[str, str]]]) -> None:
    """Remove the finished parts that have another name or signature than ``parts`` says, by number."""
    for number, (name, signature) in parts.items():
        part = folder / part_name(number)
        if part.exists():
            report = json.loads((part / REPORT).read_text(encoding="utf-8"))
            if (report["part"], report["files"]) != (name, signature):
                shutil.rmtree(part)


def finished_parts(output: Path, count: int) -> list[Path]:
    """Return the folders of all ``count`` parts of ``output``, in order.

    Raises:
        ValueError: some parts are missing.
    """
    folder = parts_folder(output)
    parts = [folder / part_name(number) for number in range(count)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{len(missing)} of {len(parts)} parts are missing in {folder} ({names}): run their shards before merging"
        )
    return parts


@contextmanager
def merging(output: Path, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder for the merged parts; when the block ends, publish it as ``output`` and remove the parts.

    If the block removes the temporary folder, ``output`` stays as it is.

    Args:
        output: the data set's folder.
        replace: a data set at ``output`` is replaced. Else, if another process has published it first, it stays, and an
            error in this block is ignored.
    """
    output = output.resolve()
    partial, complete = (parts_folder(output) / f"{name}-{this_process()}" for name in ("merging", "complete"))
    for path in (partial, complete):
        shutil.rmtree(path, ignore_errors=True)
    try:
        yield partial
        if partial.exists() and replace:
            publish(partial, complete)
            output.rename(parts_folder(output) / PREVIOUS)
            complete.rename(output)
        elif partial.exists():
            publish(partial, output, DESCRIPTION)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        if replace or not (output / DESCRIPTION).exists():
            raise
    finish_replacing(output)
    for folder in (parts_folder(output), *_set_aside_of(output)):
        shutil.rmtree(folder, ignore_errors=True)


def finish_replacing(output: Path) -> None:
    """Finish what an interrupted replacement of a data set has begun: one of the two is at ``output`` afterwards.

    What other programs or ``lightning data encode`` wrote into the replaced data set moves to the new one.
    """
    folder = parts_folder(output)
    previous = folder / PREVIOUS
    if not previous.exists():
        return
    if not output.exists():
        previous.rename(output)
        return
    for path in previous.iterdir():
        if path.name not in (DESCRIPTION, SKIPPED, SOURCE, *SPLITS) and not (output / path.name).exists():
            path.rename(output / path.name)
    shutil.rmtree(folder)


def _set_aside_of(output: Path) -> list[Path]:
    folder = parts_folder(output)
    pattern = f"{glob.escape(folder.name)}.{'[0-9a-f]' * 12}"
    return list(folder.parent.glob(pattern))


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write the ``dataset.json`` of a data set; call this last, because it marks the data set as complete."""
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def checksums(folder: Path) -> dict[str, str]:
    """Return the BLAKE2b checksum of every chunk of a folder of shards, by file name."""
    return {chunk["filename"]: checksum(folder / chunk["filename"]) for chunk in read_index(folder)["chunks"]}
