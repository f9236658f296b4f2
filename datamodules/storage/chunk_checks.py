"""One chunk of a data set read whole: its file against its checksum, its samples to the end of their images."""

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
    """Something that is not as it should be.

    Attributes:
        file: below the data set's folder.
        problem: what is wrong.
        sample: whose fault it is, if not all of the file's: its id, or its number in the file.
    """

    file: str
    problem: str
    sample: str = ""


@dataclass(frozen=True)
class Chunk:
    """What is known of a chunk file before it is read.

    Attributes:
        folder: the data set's.
        file: below it.
        checksum: that ``dataset.json`` gives; empty: it doesn't name the file.
        entry: of the index of its bucket; empty: it doesn't name the file.
        config: of that index.
        shape: of the bucket; None: the items are not samples.
        layout: of its encodings; None: it holds images.
    """

    folder: Path
    file: str
    checksum: str
    entry: dict[str, Any]
    config: dict[str, Any]
    shape: Shape | None
    layout: Layout | None = None


class Checked(NamedTuple):
    """What a worker found in a chunk: its bytes on disk, the hashes of its ids in order, and what is wrong."""

    size: int
    ids: bytes
    damages: list[Damage]


def size_of(chunk: Chunk) -> int:
    """Its bytes on disk; 0 if it is missing."""
    path = chunk.folder / chunk.file
    return path.stat().st_size if path.exists() else 0


def check_chunk(chunk: Chunk) -> Checked:
    """Read a chunk and everything in it."""
    path = chunk.folder / chunk.file
    damages: list[Damage] = []
    ids = b""
    try:
        if chunk.checksum and checksum(path) != chunk.checksum:
            damages.append(Damage(chunk.file, "its checksum is another: it was changed since it was written"))
        if chunk.shape is not None and chunk.entry:
            ids, of_samples = check_samples(chunk, ChunkFile(path, chunk.entry, chunk.config), chunk.shape)
            damages += of_samples
    except OSError as error:
        damages.append(Damage(chunk.file, f"it can't be read: {error.strerror}"))
    except DamagedChunk as error:
        damages.append(Damage(chunk.file, error.problem))
    return Checked(size_of(chunk), ids, damages)


def check_samples(chunk: Chunk, items: ChunkFile, shape: Shape) -> tuple[bytes, list[Damage]]:
    """The hashes of the ids of all samples of a chunk, and what is wrong with them."""
    ids, damages = [], []
    for number in range(len(items)):
        name = f"{chunk.file}/{number}"  # stands in for the id of a sample that can't be read
        try:
            record = (Record if chunk.layout is None else EncodedRecord).from_item(items[number])
            name = record.id
            if (
                problem := problem_of(record, shape)
                if isinstance(record, Record)
                else problem_of_encodings(record, chunk)
            ):
                damages.append(Damage(chunk.file, problem, name))
        except DamagedChunk as error:
            damages.append(Damage(chunk.file, error.problem, f"number {number}"))
        except Exception as error:
            damages.append(Damage(chunk.file, f"it is not a record ({error!r})", f"number {number}"))
        ids.append(hashlib.blake2b(str(name).encode(), digest_size=8).digest())
    return b"".join(ids), damages


def problem_of_captions(record: Record | EncodedRecord) -> str:
    """What is wrong with a sample's name and captions; empty if nothing is."""
    if not record.id or not isinstance(record.id, str):
        return f"its id is {record.id!r}"
    if not record.captions or not all(isinstance(caption, str) for caption in record.captions):
        return f"its captions are {record.captions}"
    if record.weights and (len(record.weights) != len(record.captions) or not 0 < sum(record.weights) < math.inf):
        return f"its captions' weights are {record.weights}, for {len(record.captions)} captions"
    return ""


def problem_of(record: Record, shape: Shape) -> str:
    """What is wrong with a sample; empty if nothing is."""
    return problem_of_captions(record) or problem_of_image(record.image, shape)


def problem_of_image(data: bytes | memoryview, shape: Shape) -> str:
    """What is wrong with a sample's image; empty if nothing is."""
    try:
        image = open_image(data)
    except BadImage as error:
        return str(error)
    if image.width < shape.width or image.height < shape.height:
        return f"its image is {image.width}x{image.height}, smaller than its bucket's {shape}"
    return ""


def problem_of_encodings(record: EncodedRecord, chunk: Chunk) -> str:
    """What is wrong with a sample of encodings; empty if nothing is."""
    if problem := problem_of_captions(record):
        return problem
    assert chunk.layout is not None
    if len(record.text) != len(record.captions):
        return f"it has {len(record.text)} text states for {len(record.captions)} captions"
    layout = chunk.layout
    resolution, shape = parse_bucket_name("/".join(Path(chunk.file).parts[1:3]))
    aspect, levels = aspect_of(shape, resolution), layout.levels(resolution)
    if (layout.pixels or record.image) and (problem := problem_of_image(record.image, shape)):
        return problem
    if len(record.latents) != len(levels):
        return f"it has {len(record.latents)} kinds of latents, not {len(levels)}"
    try:
        values = [layout.unpack_text(text).sequence for text in record.text]
        for data, level in zip(record.latents, levels, strict=True):
            values.append(from_bytes(data).view(-1, *layout.latents_shape(level, aspect)))
    except RuntimeError as error:
        return f"its encodings have the wrong size ({error})"
    return "" if all(bool(of.isfinite().all()) and of.numel() for of in values) else "its encodings are not finite"
