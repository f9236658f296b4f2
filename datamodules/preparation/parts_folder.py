"""The folder of parts, ``OUTPUT.parts``: the finished parts of a data set that is not complete yet.

Data sets of images and of encodings are both made in parts. The folder holds the settings that all parts share, and
each finished part under its number. When all are finished, they are merged into the data set, and the folder is
removed.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nami_lightning.datamodules.storage.chunk_file import checksum
from nami_lightning.datamodules.storage.dataset import DESCRIPTION
from nami_lightning.datamodules.storage.shards import read_index
from nami_lightning.utils.atomic_write import publish, replacing, this_process

SETTINGS = "settings.json"
REPORT = "report.json"


def parts_folder(output: Path) -> Path:
    """Return the folder that holds the parts of ``output`` until they are merged."""
    return output.with_name(f"{output.name}.parts")


def part_name(number: int) -> str:
    """Return the name of a part's folder."""
    return f"{number:06d}"


def start_or_resume(folder: Path, settings: dict[str, Any]) -> None:
    """Start a folder of parts, or check that the existing one has the same settings.

    Raises:
        ValueError: it has other settings; the message names those that changed.
    """
    file = folder / SETTINGS
    if file.exists():
        check_settings(json.loads(file.read_text()), settings, folder)
        return
    with replacing(file) as partial:
        partial.write_text(json.dumps(settings, indent=2))


def check_settings(existing: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Refuse to continue in a folder that was made with other settings.

    Raises:
        ValueError: the settings differ; the message names those that changed.
    """
    if changes := "; ".join(changed_settings(existing, wanted)):
        raise ValueError(f"{folder} was made with other settings ({changes}): choose another output, or remove it")


def changed_settings(existing: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a text like ``source.path was photos and is pictures now`` for each innermost key whose value changed."""
    for key in sorted(existing.keys() | wanted.keys()):
        old, new = existing.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changed_settings(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {old} and is {new} now"


def check_unused(output: Path, problem: str) -> None:
    """Refuse an output that already has some content.

    Raises:
        ValueError: it is a file, or a folder that is not empty; the message states ``problem``.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and {problem}: choose another output")


def unfinished_parts(folder: Path, numbers: Sequence[int]) -> list[int]:
    """Return those of ``numbers`` whose parts are not finished, and print how many are."""
    missing = [number for number in numbers if not (folder / part_name(number)).exists()]
    if len(missing) < len(numbers):
        print(f"{len(numbers) - len(missing)} of {len(numbers)} parts are done already.")
    return missing


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
def merging(output: Path) -> Iterator[Path]:
    """Give a temporary folder for the merged parts; when the block ends, publish it as ``output`` and remove the parts.

    If another process has published ``output`` first, its folder stays, and an error in this block is ignored.
    """
    partial = output.with_name(f".{output.name}.merging-{this_process()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        publish(partial, output, DESCRIPTION)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        if not (output / DESCRIPTION).exists():
            raise
    shutil.rmtree(parts_folder(output), ignore_errors=True)


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write the ``dataset.json`` of a data set; call this last, because it marks the data set as complete."""
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def checksums(folder: Path) -> dict[str, str]:
    """Return the BLAKE2b checksum of every chunk of a folder of shards, by file name."""
    return {chunk["filename"]: checksum(folder / chunk["filename"]) for chunk in read_index(folder)["chunks"]}
