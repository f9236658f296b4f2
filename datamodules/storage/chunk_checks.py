"""Check one chunk of a data set: its file against its checksum, and each sample to the end of its image."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nami_lightning.datamodules.aspect_buckets import Shape, aspect_of
from nami_lightning.datamodules.precomputed.records import EncodedRecord, Layout, from_bytes
from nami_lightning.datamodules.preparation.image_io import BadImage, open_image
from nami_lightning.datamodules.storage.chunk_file import ChunkFile, DamagedChunk, checksum
from nami_lightning.datamodules.storage.dataset import parse_bucket_name
from nami_lightning.datamodules.storage.shards import Record


class Damage(NamedTuple):
    """A problem that a check found.

    Attributes:
        file: the damaged file, relative to the data set's folder.
        problem: what is wrong.
        sample: the sample that is damaged: its id, or its number in the file; empty if it is the file as a whole.
    """

    file: str
    problem: str
    sample: str = ""


@dataclass(frozen=True)
class Chunk:
    """What is known of a chunk file before it is read.

    Attributes:
        folder: the data set's folder.
        file: the chunk's path relative to that folder.
        checksum: the checksum in ``dataset.json``; empty if that doesn't list the file.
        entry: the entry in the index of its bucket; empty if that doesn't list the file.
        config: the config in that index.
        shape: the shape of the bucket; None if the items are not samples.
        layout: the layout of the encodings in it; None if it holds images.
    """

    folder: Path
    file: str
    checksum: str
    entry: dict[str, Any]
    config: dict[str, Any]
    shape: Shape | None
    layout: Layout | None = None


class Checked(NamedTuple):
    """The result of checking one chunk.

    Attributes:
        size: the chunk's bytes on disk.
        ids: the hashes of its samples' ids (8 bytes each), in order.
        damages: the problems.
    """

    size: int
    ids: bytes
    damages: list[Damage]


def size_of(chunk: Chunk) -> int:
    """Return the chunk's bytes on disk, 0 if it is missing."""
    path = chunk.folder / chunk.file
    return path.stat().st_size if path.exists() else 0


def check_chunk(chunk: Chunk) -> Checked:
    """Read a chunk and everything in it, and return what is wrong."""
    path = chunk.folder / chunk.file
    damages: list[Damage] = []
    ids = b""
    try:
        if chunk.checksum and checksum(path) != chunk.checksum:
            damages.append(Damage(chunk.file, "its checksum is wrong: the file was changed after it was written"))
        if chunk.shape is not None and chunk.entry:
            ids, sample_damages = check_samples(chunk, ChunkFile(path, chunk.entry, chunk.config), chunk.shape)
            damages += sample_damages
    except OSError as error:
        damages.append(Damage(chunk.file, f"it can't be read: {error.strerror}"))
    except DamagedChunk as error:
        damages.append(Damage(chunk.file, error.problem))
    return Checked(size_of(chunk), ids, damages)


def check_samples(chunk: Chunk, items: ChunkFile, shape: Shape) -> tuple[bytes, list[Damage]]:
    """Return the hashes of the ids of all samples of a chunk, and what is wrong with the samples."""
    ids, damages = [], []
    for number in range(len(items)):
        name = f"{chunk.file}/{number}"  # used as the id of a sample that can't be read
        try:
            record = (Record if chunk.layout is None else EncodedRecord).from_item(items[number])
            name = record.id
            if (
                problem := find_problem(record, shape)
                if isinstance(record, Record)
                else find_encodings_problem(record, chunk)
            ):
                damages.append(Damage(chunk.file, problem, name))
        except DamagedChunk as error:
            damages.append(Damage(chunk.file, error.problem, f"number {number}"))
        except Exception as error:
            damages.append(Damage(chunk.file, f"it is not a record ({error!r})", f"number {number}"))
        ids.append(hashlib.blake2b(str(name).encode(), digest_size=8).digest())
    return b"".join(ids), damages


def find_captions_problem(record: Record | EncodedRecord) -> str:
    """Return what is wrong with a sample's id and captions, or an empty text."""
    if not record.id or not isinstance(record.id, str):
        return f"its id is {record.id!r}"
    if not record.captions or not all(isinstance(caption, str) for caption in record.captions):
        return f"its captions are {record.captions}"
    if record.weights and (len(record.weights) != len(record.captions) or not 0 < sum(record.weights) < math.inf):
        return f"its captions' weights are {record.weights}, for {len(record.captions)} captions"
    return ""


def find_problem(record: Record, shape: Shape) -> str:
    """Return what is wrong with a sample of images, or an empty text."""
    return find_captions_problem(record) or find_image_problem(record.image, shape)


def find_image_problem(data: bytes | memoryview, shape: Shape) -> str:
    """Return what is wrong with a sample's image, or an empty text."""
    try:
        image = open_image(data)
    except BadImage as error:
        return str(error)
    if image.width < shape.width or image.height < shape.height:
        return f"its image is {image.width}x{image.height}, smaller than its bucket's {shape}"
    return ""


def find_encodings_problem(record: EncodedRecord, chunk: Chunk) -> str:
    """Return what is wrong with a sample of encodings, or an empty text."""
    if problem := find_captions_problem(record):
        return problem
    assert chunk.layout is not None
    if len(record.text) != len(record.captions):
        return f"it has {len(record.text)} text states for {len(record.captions)} captions"
    layout = chunk.layout
    resolution, shape = parse_bucket_name("/".join(Path(chunk.file).parts[1:3]))
    aspect, levels = aspect_of(shape, resolution), layout.levels(resolution)
    if (layout.pixels or record.image) and (problem := find_image_problem(record.image, shape)):
        return problem
    if len(record.latents) != len(levels):
        return f"it has {len(record.latents)} kinds of latents, not {len(levels)}"
    try:
        values = [layout.unpack_text(text).sequence for text in record.text]
        for data, level in zip(record.latents, levels, strict=True):
            values.append(from_bytes(data).view(-1, *layout.latents_shape(level, aspect)))
    except RuntimeError as error:
        return f"its encodings have the wrong size ({error})"
    finite = all(bool(tensor.isfinite().all()) and tensor.numel() for tensor in values)
    return "" if finite else "its encodings are not finite"
