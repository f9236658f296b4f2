"""Sources that break off, and files beside an image that can't be read: what is whole is kept, the rest is named."""

import errno
import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_odd_sources import read, write, write_tar
from test_sources import picture

from nami_lightning.datamodules import image_formats
from nami_lightning.datamodules.preparation.image_io import BadImage, open_image
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation
from nami_lightning.datamodules.sources import (
    Columns,
    HuggingFaceDataset,
    ImageFolder,
    Parquet,
    Source,
    SourceSample,
    WebDataset,
    find_source,
)
from nami_lightning.datamodules.storage.dataset import SKIPPED, PreparedDataset
from nami_lightning.datamodules.storage.inspect import removal_lines

COUNT = 6


def noisy(number: int) -> bytes:
    """A picture with bytes behind it that no compression makes smaller."""
    return picture(number) + random.Random(number).randbytes(3000)


def prepared(source: Source, folder: Path) -> tuple[int, str, list[dict[str, str]]]:
    """Return how many samples a preparation keeps, its table, and its ``skipped.jsonl``."""
    dataset = PreparedDataset(prepare(source, folder, Preparation([16], heldout_percent=0), workers=1))
    skipped = [json.loads(line) for line in (folder / SKIPPED).read_text(encoding="utf-8").splitlines()]
    return sum(dataset.description["samples"]["train"].values()), "\n".join(removal_lines(dataset)), skipped


# --- files that break off ------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("after", ["image", "caption"])
def test_a_tar_that_breaks_off_costs_what_follows_in_it(compressed: bool, after: str, tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        name: data for n in range(COUNT) for name, data in ((f"{n}.png", noisy(n)), (f"{n}.txt", b"a text"))
    }
    for tar in ("0.tar", "1.tar"):
        write_tar(tmp_path / "in" / tar, files)
    broken = tmp_path / "in" / "0.tar"
    with tarfile.open(broken) as tar_file:
        end = tar_file.getmember("3.txt").offset  # the image 3.png is whole before it
    end += 1024 if after == "caption" else 0
    data = broken.read_bytes()
    if compressed:
        packer = gzip.GzipFile(fileobj=(packed := io.BytesIO()), mode="wb")
        packer.write(data[:end])
        packer.flush()
        data = packed.getvalue()
    broken.write_bytes(data if compressed else data[:end])
    source = find_source(tmp_path / "in")
    samples, skipped = read(source)
    whole = [0, 1, 2] if after == "image" else [0, 1, 2, 3]
    assert set(samples) == {f"0/{n}" for n in whole} | {f"1/{n}" for n in range(COUNT)}
    reason = f"damaged tar: it breaks off at byte {end:,} of its content, in or after 3"
    assert skipped == {"0.tar": reason}
    kept, table, listed = prepared(source, tmp_path / "out")
    assert kept == len(whole) + COUNT
    assert listed == [{"id": "0.tar", "reason": reason}]
    assert "skipped: damaged tar" in table
    assert ("the tar breaks off after it" in table) == (after == "caption")


def test_a_tar_of_nothing_costs_no_other(tmp_path: Path) -> None:
    write(tmp_path, {"0.tar": b"", "1.tar": bytes(10240), "2.tar": b"junk" * 999})
    write_tar(tmp_path / "3.tar", {"a.png": picture(0), "a.txt": "a text"})
    samples, skipped = read(find_source(tmp_path))
    assert set(samples) == {"3/a"}
    assert skipped == {
        "0.tar": "damaged tar: it breaks off at byte 0 of its content",
        "2.tar": "damaged tar: invalid header at byte 0 of its content",
    }


def test_a_parquet_file_that_breaks_off_costs_its_rows_alone(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {"png": [noisy(n) for n in range(COUNT)], "caption": ["a text"] * COUNT}
    for name in ("0", "1"):
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    (tmp_path / "0.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:12_345])
    samples, skipped = read(Parquet(str(tmp_path)))
    assert set(samples) == {f"1/{n:07d}" for n in range(COUNT)}
    assert set(skipped) == {"0.parquet"}
    assert skipped["0.parquet"].startswith("damaged Parquet file: ")
    assert skipped["0.parquet"].endswith("(the file ends at byte 12,345)")


def test_a_saved_dataset_that_breaks_off_is_one_clear_message(tmp_path: Path) -> None:
    import pyarrow
    from datasets import Dataset

    columns = {"png": [noisy(n) for n in range(COUNT)], "caption": ["a text"] * COUNT}
    Dataset(pyarrow.table(columns)).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:9999])
    with pytest.raises(ValueError, match=r"saved is damaged, or was not written by save_to_disk: "):
        HuggingFaceDataset(str(tmp_path / "saved")).parts()
    with pytest.raises(FileNotFoundError):
        HuggingFaceDataset(str(tmp_path / "nowhere")).parts()


@pytest.mark.parametrize("end", ["", "\n"])
def test_metadata_that_breaks_off_gives_no_wrong_caption(end: str, tmp_path: Path) -> None:
    """A CSV that ends within quotation marks would make one caption of all that follows them."""
    rows = f'file_name,text\n0.png,"a ""quoted""\ntext"\n1.png,"never closed\n2.png,two\n3.png,three{end}'
    for kind, text in (
        ("csv", rows),
        ("jsonl", '{"file_name": "0.png", "text": "a \\"quoted\\"\\ntext"}\n{"file_name": "1.png", "te'),
    ):
        folder = write(tmp_path / kind, {f"{n}.png": picture(n) for n in range(4)} | {f"metadata.{kind}": text})
        samples, skipped = read(ImageFolder(str(folder)))
        assert {name: list(sample.captions) for name, sample in samples.items()} == {"0.png": ['a "quoted"\ntext']}
        row = {"csv": "metadata.csv:4", "jsonl": "metadata.jsonl:2"}[kind]
        assert skipped.pop(row).startswith("damaged metadata: ")
        assert skipped == dict.fromkeys(("1.png", "2.png", "3.png"), "no caption")


def test_a_csv_without_a_last_line_end_is_whole(tmp_path: Path) -> None:
    write(tmp_path, {"0.png": picture(0), "1.png": picture(1), "metadata.csv": 'file_name,text\n0.png,a\n1.png,"b"'})
    samples, skipped = read(ImageFolder(str(tmp_path)))
    assert {name: sample.captions[0] for name, sample in samples.items()} == {"0.png": "a", "1.png": "b"}
    assert not skipped


# --- files beside an image -------------------------------------------------------------------------

JSON = '{"caption": "the json"}'


def test_a_file_beside_an_image_that_cannot_be_read_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image has one caption that can be read; the other file is a broken link, a folder, forbidden or no text."""
    problems = ("gone", "loop", "outside", "folder", "forbidden", "binary")
    write(tmp_path / "else", {"a.json": '{"caption": "outside"}', "a.txt": "outside"})
    folder = tmp_path / "in"
    for problem in problems:
        write(folder, {f"{problem}-txt.png": picture(0), f"{problem}-txt.txt": "the text"})
        write(folder, {f"{problem}-json.png": picture(0), f"{problem}-json.json": JSON})
        for name, other in (("txt", "json"), ("json", "txt")):
            file = folder / f"{problem}-{name}.{other}"
            if problem == "folder":
                file.mkdir()
            elif problem == "binary":
                file.write_bytes(b"\x93\xfa")
            elif problem == "forbidden":
                file.write_text("secret")
            else:
                targets = {"gone": Path("nothing"), "loop": file, "outside": tmp_path / "else" / f"a.{other}"}
                file.symlink_to(targets[problem])
    write(folder, {"alone.png": picture(0)})
    (folder / "alone.txt").symlink_to("nothing")
    read_bytes = Path.read_bytes

    def forbid(path: Path) -> bytes:
        data = read_bytes(path)
        if data == b"secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return data

    monkeypatch.setattr(Path, "read_bytes", forbid)
    for one_caption_a_line in (False, True):
        source = ImageFolder(str(folder), one_caption_a_line=one_caption_a_line)
        samples, skipped = read(source)
        captions = {name: list(sample.captions) for name, sample in samples.items()}
        texts = {"txt": "the text", "json": "the json"}
        assert captions == {f"{problem}-{name}.png": [texts[name]] for problem in problems for name in texts}
        assert skipped == {"alone.png": ".txt is a link to nothing"}
        noted = {name for name, sample in samples.items() if sample.notes}
        assert noted == {name for name in captions if not name.startswith("folder")}
    several, _ = read(ImageFolder(str(folder), Columns({"txt": 1, "caption": 2})))
    assert {name: list(sample.captions) for name, sample in several.items()} == captions


def test_a_link_beside_an_image_in_a_tar_costs_nothing(tmp_path: Path) -> None:
    file = write_tar(
        tmp_path / "0.tar", {"a.png": picture(0), "a.txt": "the text", "b.png": picture(0), "b.json": JSON}
    )
    with tarfile.open(file, "a") as tar:
        for name, kind in (("b.txt", tarfile.SYMTYPE), ("c.json", tarfile.SYMTYPE), ("c.txt", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../elsewhere"
            tar.addfile(info)
        for name, data in (("c.caption", b"the caption"), ("c.png", picture(0))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    samples, skipped = read(WebDataset(str(file)))
    assert {name: list(sample.captions) for name, sample in samples.items()} == {
        "0/a": ["the text"], "0/b": ["the json"], "0/c": ["the caption"],
    }  # fmt: skip
    assert not skipped
    assert [len(sample.notes) for sample in samples.values()] == [0, 1, 1]


# --- formats that need a plugin --------------------------------------------------------------------


def test_a_format_of_a_plugin_is_read_with_it_and_named_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    files: dict[str, bytes | str] = {"a.hif": heic, "a.txt": "a text", "b.jxl": b"\xff\x0a\x7f", "b.txt": "a text"}
    write_tar(tmp_path / "0.tar", files)
    monkeypatch.setattr(
        image_formats.Image, "registered_extensions", lambda: {".png": "PNG"}
    )  # as without any plugin, whatever is installed here
    image_formats.image_extensions.cache_clear()
    try:
        _, skipped = read(WebDataset(str(tmp_path)))
    finally:
        monkeypatch.undo()
        image_formats.image_extensions.cache_clear()
    needs = "an image that Pillow reads with a plugin: pip install"
    assert skipped == {
        "0/a": f"{needs} pillow-heif (only hif, txt)",
        "0/b": f"{needs} pillow-jxl-plugin (only jxl, txt)",
    }
    monkeypatch.setattr(Image, "open", lambda *_: (_ for _ in ()).throw(Image.UnidentifiedImageError("no plugin")))
    for data, message in (
        (heic, f"^{needs} pillow-heif$"),
        (b"\xff\x0a\x7f", f"^{needs} pillow-jxl-plugin$"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", f"^{needs} pillow-jxl-plugin$"),
        (b"no image", "no format that Pillow knows"),
    ):
        with pytest.raises(BadImage, match=message):
            open_image(data)


# --- odd values ------------------------------------------------------------------------------------


def test_odd_values_in_json_cost_no_other_image(tmp_path: Path) -> None:
    """A number that no float holds and lists in lists ended the whole preparation once."""
    huge = "1" + "0" * 400
    files: dict[str, bytes | str] = {
        "huge.json": f'{{"caption": "huge", "similarity": {huge}, "aesthetic": 5}}',
        "infinite.json": '{"caption": "infinite", "similarity": 1e999, "aesthetic": "nan", "aesthetic_score": 3}',
        "deep.json": '{"caption": ' + "[" * 900 + '"deep"' + "]" * 900 + "}",
        "twice.json": '{"caption": "one", "caption": "two"}',
        "list.json": '{"caption": ["one", ["two", null]]}',
        "number.json": '{"caption": 7}',
    }
    write(tmp_path, files | {name.replace("json", "png"): picture(0) for name in files})
    samples, skipped = read(ImageFolder(str(tmp_path)))
    assert {name: (list(sample.captions), sample.scores) for name, sample in samples.items()} == {
        "huge.png": (["huge"], {"aesthetic": 5.0}),
        "infinite.png": (["infinite"], {"aesthetic": 3.0}),
        "twice.png": (["two"], {}),
        "list.png": (["one", "two"], {}),
    }
    deep = skipped.pop("deep.png")  # which of the two recursions ends first depends on Python
    assert "lists in lists" in deep or "recursion" in deep
    assert skipped == {"number.png": "caption is not a text: int"}


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_metadata_that_is_no_file_costs_nothing(kind: str, tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(0), "a.txt": "a text", "metadata.csv": "file_name,text\na.png,a row"})
    if kind == "link":
        (tmp_path / "metadata.jsonl").symlink_to("nothing")
    else:
        os.mkfifo(tmp_path / "metadata.jsonl")
    samples, skipped = read(ImageFolder(str(tmp_path)))
    assert list(samples) == ["a.png"]
    assert skipped == {"metadata.jsonl": "damaged metadata: a link to nothing, or no file"}


def test_samples_of_one_name_in_a_tar_are_all_read(tmp_path: Path) -> None:
    """As in a tar to which another one was appended."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(3):
            for name, data in (("a.png", picture(number)), ("a.txt", b"text %d" % number)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    source = WebDataset(str(tmp_path))
    found = [sample for part in source.parts() for sample in source.read(part)]
    assert [(sample.image, list(sample.captions)) for sample in found if isinstance(sample, SourceSample)] == [
        (picture(number), [f"text {number}"]) for number in range(3)
    ]


# --- images as cameras and programs write them -----------------------------------------------------

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
"""EXIF's orientations, as what must be done with the stored pixels."""


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    image.save(file := io.BytesIO(), format, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_images_are_upright(orientation: int, format: str) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    shown = open_image(encoded(Image.fromarray(stored), format, exif=exif, **options))
    assert np.array_equal(np.asarray(shown), TURNS[orientation](stored))
    assert not shown.getexif()


def test_the_first_frame_of_a_film_is_taken_and_an_unknown_orientation_is_none() -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"):
        shown = open_image(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
        assert shown.size == (20, 10)
        assert np.abs(np.asarray(shown).astype(int) - (255, 0, 0)).max() <= 3, format
    for orientation in (0, 9, 255):
        exif = Image.Exif()
        exif[0x112] = orientation
        assert open_image(encoded(frames[0], "PNG", exif=exif)).size == (20, 10)


def test_tiny_and_very_long_images_are_no_errors(tmp_path: Path) -> None:
    for name, size in {"dot": (1, 1), "column": (1, 5000), "row": (60_000, 20), "square": (20, 20)}.items():
        write(tmp_path / "in", {f"{name}.png": encoded(Image.new("RGB", size), "PNG"), f"{name}.txt": name})
    kept, table, skipped = prepared(ImageFolder(str(tmp_path / "in")), tmp_path / "out")
    assert (kept, skipped) == (2, [])
    assert "too small for the smallest bucket  2" in table
