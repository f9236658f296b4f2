"""A data set read whole: every file against its checksum, every sample to the end of its image."""

import json
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from nami_lightning.datamodules.aspect_buckets import Shape
from nami_lightning.datamodules.precomputed.records import Layout
from nami_lightning.datamodules.storage.chunk_checks import Checked, Chunk, Damage, check_chunk, size_of
from nami_lightning.datamodules.storage.chunk_file import ChunkFile
from nami_lightning.datamodules.storage.dataset import (
    DESCRIPTION,
    ENCODINGS,
    SPLITS,
    PreparedDataset,
    parse_bucket_name,
)
from nami_lightning.datamodules.storage.shards import INDEX, read_index

LISTED = 20
"""Faults of one file that are printed."""

WHAT_TO_DO = """\
What to do: copy the files named above again from another copy of this data set. If there is none, or the copy has the
same fault, prepare the data set again: it is made from its source, so nothing is lost but time."""


def report(folder: Path, workers: int) -> int:
    """Verify a data set and print what is damaged, and what to do; the exit status: 1 if anything is."""
    damages = verify(folder, workers)
    if not damages:
        print(f"{folder}: every file is what it was when it was made, and every sample can be read.")
        return 0
    by_file: dict[str, list[Damage]] = defaultdict(list)
    for damage in damages:
        by_file[damage.file].append(damage)
    for file, of_file in by_file.items():
        print(f"{folder / file}")
        for damage in of_file[:LISTED]:
            print("  " + (f"sample {damage.sample}: " if damage.sample else "") + damage.problem)
        if len(of_file) > LISTED:
            print(f"  and {len(of_file) - LISTED:,} more")
    print(f"\n{len(damages):,} fault(s) in {len(by_file):,} file(s) of {folder}.\n{WHAT_TO_DO}")
    return 1


def verify(folder: Path, workers: int) -> list[Damage]:
    """Read every chunk of a data set once, and everything in it.

    Checked: each chunk's checksum and its counts; that each sample has an id of its own, valid captions, and an image
    that can be decoded to its end and is no smaller than its bucket's shape.

    Args:
        folder: of a prepared data set.
        workers: processes.

    Returns:
        What is wrong, in the order of the files.

    Raises:
        FileNotFoundError: no data set is there.
        ValueError: it is of another format.
    """
    description = PreparedDataset(folder).description
    chunks, damages = list_chunks(folder, description)
    of_encodings, wrong = encoding_chunks(folder)
    chunks, damages = chunks + of_encodings, damages + wrong
    hashes = []
    with (
        ProcessPoolExecutor(max(1, workers)) as pool,
        tqdm(
            desc=f"verifying {folder}",
            total=sum(size_of(chunk) for chunk in chunks),
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
        ) as bar,
    ):
        for checked in _in_order(pool, chunks, ahead=4 * max(1, workers)):
            damages += checked.damages
            hashes.append(np.frombuffer(checked.ids, dtype=np.uint64))
            bar.update(checked.size)
    return damages + repeated_ids(chunks, hashes)


def list_chunks(folder: Path, description: dict[str, Any]) -> tuple[list[Chunk], list[Damage]]:
    """All chunk files of the samples, and what is wrong with the lists of them."""
    sums: dict[str, str] = dict(description["checksums"])
    encodings = description.get("encodings")
    layout = None if encodings is None else Layout(**encodings["layout"])
    chunks, damages = [], []
    for split in SPLITS:
        for name, samples in description["samples"][split].items():
            bucket = f"{split}/{name}"
            of_bucket = {file: sums.pop(file) for file in list(sums) if file.startswith(f"{bucket}/")}
            found, wrong = _bucket_chunks(folder, bucket, samples, of_bucket, parse_bucket_name(name)[1])
            chunks += [replace(chunk, layout=layout) for chunk in found]
            damages += wrong
    damages += [Damage(DESCRIPTION, f"it names {file}, of a bucket that it doesn't name") for file in sums]
    return chunks, damages


def _bucket_chunks(
    folder: Path, bucket: str, samples: int, sums: dict[str, str], shape: Shape
) -> tuple[list[Chunk], list[Damage]]:
    damages = []
    file = f"{bucket}/{INDEX}"
    try:
        index = read_index(folder / bucket)
    except ValueError as error:
        index = {"chunks": [], "config": {}}
        damages.append(Damage(file, str(error)))
    else:
        held = sum(int(entry["chunk_size"]) for entry in index["chunks"])
        if not (folder / file).exists():
            damages.append(Damage(file, "it is missing"))
        elif held != samples:
            damages.append(Damage(file, f"its chunks hold {held:,} samples, but {DESCRIPTION} says {samples:,}"))
    entries = {f"{bucket}/{entry['filename']}": entry for entry in index["chunks"]}
    if len(entries) < len(index["chunks"]):
        damages.append(Damage(file, "it names a chunk twice"))
    if index["chunks"]:
        damages += [Damage(file, f"it doesn't name {name}") for name in sums if name not in entries]
    damages += [Damage(DESCRIPTION, f"it has no checksum of {name}") for name in entries if name not in sums]
    names = list(entries) + [name for name in sums if name not in entries]
    chunks = [Chunk(folder, name, sums.get(name, ""), entries.get(name, {}), index["config"], shape) for name in names]
    return chunks, damages


def encoding_chunks(folder: Path) -> tuple[list[Chunk], list[Damage]]:
    """The files of precomputed encodings against their checksums; to read them, verify their own folder."""
    chunks, damages = [], []
    for path in sorted(folder.glob(f"{ENCODINGS}/*/{DESCRIPTION}")):
        home = path.parent.relative_to(folder)
        try:
            about = json.loads(path.read_text())
        except ValueError as error:
            damages.append(Damage(str(home / path.name), f"it is not JSON: {error}"))
            continue
        sums = about.get("checksums", {}) if isinstance(about, dict) else {}
        chunks += [Chunk(folder, str(home / name), value, {}, {}, None) for name, value in sums.items()]
    return chunks, damages


def _in_order(pool: ProcessPoolExecutor, chunks: list[Chunk], ahead: int) -> Iterator[Checked]:
    """Results in order, with only so many chunks handed out at a time."""
    waiting: deque[Future[Checked]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(check_chunk, chunk))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def repeated_ids(chunks: list[Chunk], hashes: list[np.ndarray]) -> list[Damage]:
    """Samples that have another one's id; the chunks that hold them are opened again for their names."""
    found = np.concatenate([np.empty(0, np.uint64), *hashes])
    in_order = np.sort(found)
    repeated = in_order[1:][in_order[1:] == in_order[:-1]]
    starts = np.cumsum([0, *(len(of_chunk) for of_chunk in hashes)])
    first: dict[str, str] = {}
    damages = []
    opened: tuple[int, ChunkFile] | None = None
    for place in np.flatnonzero(np.isin(found, repeated)):
        number = int(np.searchsorted(starts, place, side="right")) - 1
        chunk = chunks[number]
        if opened is None or opened[0] != number:
            opened = number, ChunkFile(chunk.folder / chunk.file, chunk.entry, chunk.config)
        name = opened[1][int(place - starts[number])][0]
        if name in first:
            damages.append(Damage(chunk.file, f"a sample in {first[name]} has the same id", name))
        first.setdefault(name, chunk.file)
    return damages
