"""Images, captions, metadata, tars and Parquet files of chance, and prepared data sets that were changed."""

import gzip
import io
import json
import os
import random
import shutil
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from helpers.fuzz.cases import Fault, Refused, in_this_process, nothing_left_at, require
from helpers.fuzz.mutations import TEXTS, any_value, as_json, maybe_damaged, mutated_bytes, mutated_value
from helpers.squares import Squares
from nami_lightning.datamodules.image_formats import is_image
from nami_lightning.datamodules.preparation.image_io import MAX_PIXELS, open_image
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation
from nami_lightning.datamodules.sources import ImageFolder, Parquet, Source, WebDataset, find_source
from nami_lightning.datamodules.storage.dataset import SPLITS, PreparedDataset
from nami_lightning.datamodules.storage.shards import Record
from nami_lightning.datamodules.storage.verify import verify

PREPARATION = Preparation([8, 16], heldout_percent=20, format="png")
NAMES = ("{}", "{}", "sub/{}", "{} é", "\udcff{}", "-{}", "{}\n", ".{}")
"""Names of files, with a place for a number."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM", "JPEG2000", "TGA", "AVIF", "ICNS", "DDS", "PCX")
MODES = ("RGB", "L", "RGBA", "P", "CMYK", "I;16", "F", "1", "LA")
HARMFUL = (
    *("../out", "/etc/passwd", "/dev/zero", "a/../../b", "NUL", "x" * 300, "\x1b[31m", "a\nb", "é", "...", "-x", " "),
)


@cache
def image_files() -> list[bytes]:
    """Return small image files of all formats and modes."""
    files = []
    for format in FORMATS:
        for mode in MODES:
            for options in ({}, {"progressive": True}, {"compression": "tiff_lzw"}):
                buffer = io.BytesIO()
                try:
                    Image.effect_noise((24, 20), 60).convert(mode).save(buffer, format, **options)
                except (OSError, ValueError, KeyError, SystemError):
                    continue
                files.append(buffer.getvalue())
    return files


def image_case(rng: random.Random, folder: Path) -> None:
    """A damaged image file gives an image without metadata, or an error."""
    data = rng.choice(image_files())
    for _ in range(rng.randrange(4)):
        data = mutated_bytes(rng, data)
    if rng.random() < 0.05:
        data = rng.choice(image_files())[: rng.randrange(40)] + data
    notes: list[str] = []
    image = open_image(data, notes)
    require(image.mode == "RGB" and not image.info, "an image that is not plain RGB")
    require(0 < image.width * image.height <= MAX_PIXELS, "an image of too many pixels")


def any_image(rng: random.Random) -> bytes:
    """Return an image file; one of four is damaged."""
    data = rng.choice(image_files())
    return mutated_bytes(rng, data) if rng.random() < 0.25 else data


# --- sources -----------------------------------------------------------------------------------


def check_prepared(source: Source, output: Path, sent: int | None = None) -> None:
    """Prepare a source, and check that each sample is there or counted, and that the result is whole.

    Args:
        source: the source.
        output: of the data set.
        sent: the number of samples that must be accounted for at least; None: unknown.
    """
    output.parent.mkdir()
    around = {path.name for path in output.parent.parent.iterdir()}
    with in_this_process(), nothing_left_at(output):
        prepare(source, output, PREPARATION, workers=1)
    description = PreparedDataset(output).description
    kept = sum(sum(counts.values()) for counts in description["samples"].values())
    lost = sum(description["removed"].values()) + sum(description["skipped"].values())
    require(description["read"] == kept + lost, f"{description['read']} read, {kept} kept, {lost} counted as left out")
    require(sent is None or description["read"] >= sent, f"{sent} samples, but {description['read']} were read")
    with in_this_process():
        problems = [damage for damage in verify(output, 1) if "has the same id" not in damage.problem]
    require(not problems, f"what was prepared is damaged: {problems[:1]}")
    require(around == {path.name for path in output.parent.parent.iterdir()}, "files outside the folder")


def folder_case(rng: random.Random, folder: Path) -> None:
    """A folder of images with captions beside them and in metadata files, with odd names, links and pipes."""
    images = folder / "in" / "images"
    images.mkdir(parents=True)
    (folder / "in" / "secret.txt").write_text("a secret")
    (folder / "in" / "secret.png").write_bytes(image_files()[0])
    names = []
    for number in range(rng.randint(1, 5)):
        name = rng.choice(NAMES).format(number)
        path = images / f"{name}{rng.choice(['.png', '.jpg', '.JPG', '.webp', '.tif', '.bin'])}"
        path.parent.mkdir(exist_ok=True)
        match rng.randrange(12):
            case 0:
                path.symlink_to(rng.choice(["../secret.png", "nowhere", "/dev/zero", str(path), "/etc"]))
            case 1:
                os.mkfifo(path)
            case 2:
                path.mkdir()
            case _:
                path.write_bytes(any_image(rng))
        names.append(path.relative_to(images))
        for extension in (".txt", ".caption", ".json"):
            if rng.random() < 0.5:
                write_caption(rng, path.with_suffix(extension), extension)
    if rng.random() < 0.6:
        write_metadata(rng, images, [str(name) for name in names])
    source = ImageFolder(str(images), one_caption_a_line=rng.random() < 0.3, follow_links=rng.random() < 0.2)
    seen = [name for name in names if is_image(str(name)) and not any(part.startswith(".") for part in name.parts)]
    sent = sum((images / name).is_file() for name in set(seen))
    check_prepared(source, folder / "data" / "out", sent)
    if not source.follow_links:
        require("a secret" not in captions_of(folder / "data" / "out"), "a text outside the folder was read")


def write_caption(rng: random.Random, path: Path, extension: str) -> None:
    """Write a file beside an image."""
    text = rng.choice([*TEXTS, "a red cat", "two\nlines"])
    content = text.encode("utf-8", "surrogatepass")
    if extension == ".json":
        value = {"caption": text, "aesthetic": any_value(rng)}
        content = as_json(rng, mutated_value(rng, value) if rng.random() < 0.5 else value)
    try:
        if rng.random() < 0.1:
            path.symlink_to("../secret.txt")
        else:
            path.write_bytes(maybe_damaged(rng, content))
    except FileExistsError:
        return


def write_metadata(rng: random.Random, images: Path, names: list[str]) -> None:
    """Write a metadata.jsonl or a metadata.csv with rows for images, and for others."""
    rows = [{"file_name": name, "caption": rng.choice(["a cat", *TEXTS]), "group": any_value(rng)} for name in names]
    rows += [{"file_name": rng.choice([*HARMFUL, *TEXTS]), "text": "a secret"} for _ in range(rng.randrange(3))]
    if rng.random() < 0.5:
        lines = [json.dumps(mutated_value(rng, row) if rng.random() < 0.3 else row) for row in rows]
        (images / "metadata.jsonl").write_bytes(maybe_damaged(rng, "\n".join(lines).encode("utf-8", "surrogatepass")))
        return
    lines = ["file_name,caption", *(f'{row["file_name"]},"{row.get("caption")}"' for row in rows)]
    (images / "metadata.csv").write_bytes(maybe_damaged(rng, "\n".join(lines).encode("utf-8", "surrogatepass")))


def captions_of(folder: Path) -> str:
    """Return all captions of a data set."""
    buckets = [bucket for split in SPLITS for bucket in PreparedDataset(folder).buckets(split)]
    records = [Record.from_item(item) for bucket in buckets for item in bucket.shards.read(range(len(bucket)))]
    return "\n".join(caption for record in records for caption in record.captions)


def tar_case(rng: random.Random, folder: Path) -> None:
    """A tar with odd names, links, devices and damage."""
    (folder / "in").mkdir()
    buffer, sent = io.BytesIO(), 0
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as tar:
        for number in range(rng.randint(1, 5)):
            key = f"{number}" if rng.random() < 0.7 else f"{rng.choice(HARMFUL)}{number}"
            value = {"caption": rng.choice(TEXTS), "similarity": any_value(rng)}
            for extension, data in (
                (rng.choice(["jpg", "png", "webp", "cls"]), any_image(rng)),
                ("txt", rng.choice(["a cat", *TEXTS]).encode("utf-8", "surrogatepass")),
                ("json", as_json(rng, mutated_value(rng, value))),
            ):
                if rng.random() < 0.2:
                    continue
                header = tarfile.TarInfo(f"{key}.{extension}")
                if rng.random() < 0.1:
                    header.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
                    header.linkname = rng.choice(["/etc/passwd", "../secret", "0.jpg"])
                    tar.addfile(header)
                    continue
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
                sent += extension in ("jpg", "png", "webp") and key == f"{number}"
    data = buffer.getvalue()
    if rng.random() < 0.4:
        data, sent = mutated_bytes(rng, data), 0
    if rng.random() < 0.2:
        data = gzip.compress(data, 1)
        if rng.random() < 0.3:
            data, sent = mutated_bytes(rng, data), 0
    (folder / "in" / "a.tar").write_bytes(data)
    check_prepared(WebDataset(str(folder / "in")), folder / "data" / "out", sent)


def parquet_case(rng: random.Random, folder: Path) -> None:
    """A Parquet file with columns of odd types and names, and damage."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "in").mkdir()
    count = rng.randint(1, 6)
    images = [any_image(rng) if rng.random() < 0.9 else None for _ in range(count)]
    columns: dict[str, Any] = {"image": images}
    if rng.random() < 0.3:
        columns["image"] = [{"bytes": data, "path": rng.choice(HARMFUL)} for data in images]
    texts = [text for text in TEXTS if "\ud800" not in text]
    columns[rng.choice(["caption", "text", "other"])] = rng.choice(
        [
            [rng.choice(texts) for _ in range(count)],
            [[rng.choice(texts), None] for _ in range(count)],
            [b"\xff\xfe" for _ in range(count)],
            list(range(count)),
            [{"a": 1} for _ in range(count)],
        ]
    )
    if rng.random() < 0.3:
        columns[rng.choice(["key", "status", "similarity", "group"])] = [rng.choice(texts) for _ in range(count)]
    file = folder / "in" / "a.parquet"
    pq.write_table(pa.table(columns), file, row_group_size=rng.choice([1, 2, 100]))
    sent: int | None = count
    if rng.random() < 0.4:
        file.write_bytes(mutated_bytes(rng, file.read_bytes()))
        sent = None
    source = Parquet(str(folder / "in")) if rng.random() < 0.8 else find_source(folder / "in")
    check_prepared(source, folder / "data" / "out", sent)


# --- prepared data sets ------------------------------------------------------------------------


@cache
def prepared_files() -> dict[str, bytes]:
    """Return the files of a small data set."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, in_this_process():
        output = prepare(Squares(12, [(20, 20), (30, 20)]), Path(folder) / "data", PREPARATION, workers=1)
        return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def dataset_case(rng: random.Random, folder: Path) -> None:
    """A prepared data set with a changed file: what is read is what was written, or an error says which file."""
    output = folder / "data"
    for name, content in prepared_files().items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(content)
    name = rng.choice(sorted(prepared_files()))
    content = prepared_files()[name]
    if name.endswith(".json") and rng.random() < 0.8:
        content = as_json(rng, mutated_value(rng, json.loads(content)))
    else:
        content = mutated_bytes(rng, content)
    match rng.randrange(10):
        case 0:
            (output / name).unlink()
        case 1:
            (output / name).unlink()
            (output / name).symlink_to(rng.choice(["/dev/zero", "/etc/passwd", "nowhere"]))
        case _:
            (output / name).write_bytes(content)
    with in_this_process():
        damages = verify(output, 1)
    if damages:
        raise Refused(str(damages[0]))
    try:
        captions_of(output)
    except Exception as error:
        raise Fault(f"verify finds nothing, but reading ends in {error!r}") from error
    shutil.rmtree(output)
