"""Check a whole data set: every file against its checksum, and every sample to the end of its image."""

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
"""The number of problems that are printed for each file."""

WHAT_TO_DO = """\
What to do: copy the files named above again from another copy of this data set. If there is no other copy, or it has
the same problem, make it again from its source, with lightning data prepare ... --rescan. That takes time, but nothing
is lost."""


def report(folder: Path, workers: int) -> int:
    """Check a data set, and print what is damaged and what to do.

    Returns:
        The exit status of the command: 0 if nothing is damaged, else 1.
    """
    damages = verify(folder, workers)
    if not damages:
        print(f"{folder}: every file is unchanged since it was made, and every sample can be read.")
        return 0
    by_file: dict[str, list[Damage]] = defaultdict(list)
    for damage in damages:
        by_file[damage.file].append(damage)
    for file, file_damages in by_file.items():
        print(f"{folder / file}")
        for damage in file_damages[:LISTED]:
            print("  " + (f"sample {damage.sample}: " if damage.sample else "") + damage.problem)
        if len(file_damages) > LISTED:
            print(f"  and {len(file_damages) - LISTED:,} more")
    print(f"\n{len(damages):,} problem(s) in {len(by_file):,} file(s) of {folder}.\n{WHAT_TO_DO}")
    return 1


def verify(folder: Path, workers: int) -> list[Damage]:
    """Read every chunk of a data set and everything in it, and return what is wrong.

    It checks the checksum and the counts of each chunk. It checks that each sample has its own id, valid captions, and
    an image that can be decoded to its end and is not smaller than its bucket's shape.

    Args:
        folder: the folder of a prepared data set.
        workers: the number of processes.

    Returns:
        The problems, in the order of the files.

    Raises:
        FileNotFoundError: the folder holds no data set.
        ValueError: the data set has another format.
    """
    description = PreparedDataset(folder).description
    chunks, damages = list_chunks(folder, description)
    more_chunks, more_damages = encoding_chunks(folder)
    chunks, damages = chunks + more_chunks, damages + more_damages
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
    """Return all chunk files of a data set, and what is wrong with the lists of them."""
    sums: dict[str, str] = dict(description["checksums"])
    encodings = description.get("encodings")
    layout = None if encodings is None else Layout(**encodings["layout"])
    chunks, damages = [], []
    for split in SPLITS:
        for name, samples in description["samples"][split].items():
            bucket = f"{split}/{name}"
            bucket_sums = {file: sums.pop(file) for file in list(sums) if file.startswith(f"{bucket}/")}
            bucket_chunks, bucket_damages = _bucket_chunks(
                folder, bucket, samples, bucket_sums, parse_bucket_name(name)[1]
            )
            chunks += [replace(chunk, layout=layout) for chunk in bucket_chunks]
            damages += bucket_damages
    damages += [Damage(DESCRIPTION, f"it lists {file}, but not the bucket of that file") for file in sums]
    return chunks, damages


def _bucket_chunks(
    folder: Path, bucket: str, samples: int, sums: dict[str, str], shape: Shape
) -> tuple[list[Chunk], list[Damage]]:
    """Return the chunk files of one bucket, and what is wrong with the lists of them."""
    damages = []
    file = f"{bucket}/{INDEX}"
    try:
        index = read_index(folder / bucket)
    except ValueError as error:
        index = {"chunks": [], "config": {}}
        damages.append(Damage(file, str(error)))
    else:
        stored = sum(int(entry["chunk_size"]) for entry in index["chunks"])
        if not (folder / file).exists():
            damages.append(Damage(file, "it is missing"))
        elif stored != samples:
            damages.append(Damage(file, f"its chunks hold {stored:,} samples, but {DESCRIPTION} says {samples:,}"))
    entries = {f"{bucket}/{entry['filename']}": entry for entry in index["chunks"]}
    if len(entries) < len(index["chunks"]):
        damages.append(Damage(file, "it lists a chunk twice"))
    if index["chunks"]:
        damages += [Damage(file, f"it doesn't list {name}") for name in sums if name not in entries]
    damages += [Damage(DESCRIPTION, f"it has no checksum of {name}") for name in entries if name not in sums]
    names = list(entries) + [name for name in sums if name not in entries]
    chunks = [Chunk(folder, name, sums.get(name, ""), entries.get(name, {}), index["config"], shape) for name in names]
    return chunks, damages


def encoding_chunks(folder: Path) -> tuple[list[Chunk], list[Damage]]:
    """Return the chunk files of precomputed encodings inside a data set of images, and what is wrong with their lists.

    Only the checksums of these files are checked. To check what is in them, verify their own folder.
    """
    chunks, damages = [], []
    for path in sorted(folder.glob(f"{ENCODINGS}/*/{DESCRIPTION}")):
        subfolder = path.parent.relative_to(folder)
        try:
            sums = PreparedDataset(path.parent).description["checksums"]
        except ValueError as error:
            damages.append(Damage(str(subfolder / path.name), str(error)))
            continue
        chunks += [Chunk(folder, str(subfolder / name), value, {}, {}, None) for name, value in sums.items()]
    return chunks, damages


def _in_order(pool: ProcessPoolExecutor, chunks: list[Chunk], ahead: int) -> Iterator[Checked]:
    """Yield the results of checking ``chunks`` in order, with at most ``ahead`` of them in work at a time."""
    waiting: deque[Future[Checked]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(check_chunk, chunk))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def repeated_ids(chunks: list[Chunk], hashes: list[np.ndarray]) -> list[Damage]:
    """Return the samples whose id another sample has too.

    The hashes find the repeated ids. The chunks that hold them are then opened again to read the ids themselves.
    """
    all_hashes = np.concatenate([np.empty(0, np.uint64), *hashes])
    in_order = np.sort(all_hashes)
    repeated = in_order[1:][in_order[1:] == in_order[:-1]]
    starts = np.cumsum([0, *(len(chunk_hashes) for chunk_hashes in hashes)])
    first: dict[str, str] = {}
    damages = []
    opened: tuple[int, ChunkFile] | None = None
    for position in np.flatnonzero(np.isin(all_hashes, repeated)):
        number = int(np.searchsorted(starts, position, side="right")) - 1
        chunk = chunks[number]
        if opened is None or opened[0] != number:
            opened = number, ChunkFile(chunk.folder / chunk.file, chunk.entry, chunk.config)
        name = opened[1][int(position - starts[number])][0]
        if name in first:
            damages.append(Damage(chunk.file, f"a sample in {first[name]} has the same id", name))
        first.setdefault(name, chunk.file)
    return damages
