"""Every kind of source gives the same samples of the same pictures, and none falls over a bad one."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.squares import SIZES, colour
from PIL import Image

from nami_lightning.datamodules.preparation.image_io import BadImage, open_image
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation
from nami_lightning.datamodules.sources import (
    HuggingFaceDataset,
    ImageFolder,
    OpenMoji,
    Parquet,
    WebDataset,
    find_source,
)
from nami_lightning.datamodules.storage.dataset import SKIPPED, SPLITS, PreparedDataset
from nami_lightning.datamodules.storage.shards import Record

COUNT = 24
PREPARATION = Preparation([16, 32], heldout_percent=0, aspect_step=4, format="png")


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", SIZES[number % len(SIZES)], colour(number)).save(file, "PNG")
    return file.getvalue()


def caption(number: int) -> str:
    return f"größe {number}, 猫"


def as_texts(folder: Path) -> Path:
    for number in range(COUNT):
        (folder / f"{number % 3}").mkdir(exist_ok=True)
        (folder / f"{number % 3}" / f"{number}.PNG").write_bytes(picture(number))
        text = caption(number).encode("utf-16" if number % 2 else "utf-8")
        (folder / f"{number % 3}" / f"{number}.txt").write_bytes(text)
    return folder


def as_metadata(folder: Path, write: Callable[[Path], object]) -> Path:
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(picture(number))
    write(folder)
    return folder


def as_jsonl(folder: Path) -> Path:
    rows = [json.dumps({"file_name": f"{number}.png", "text": caption(number)}) for number in range(COUNT)]
    return as_metadata(folder, lambda folder: (folder / "metadata.jsonl").write_text("\n".join(rows)))


def as_csv(folder: Path) -> Path:
    def write(folder: Path) -> None:
        with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file_name", "text"), *((f"{n}.png", caption(n)) for n in range(COUNT))])

    return as_metadata(folder, write)


def as_tars(folder: Path) -> Path:
    for first in range(0, COUNT, 10):
        with tarfile.open(folder / f"{first:05d}.tar", "w") as tar:
            for number in range(first, min(first + 10, COUNT)):
                members = {"png": picture(number), "txt": caption(number).encode(), "json": b'{"similarity": 0.3}'}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{number:05d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def as_parquet(folder: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    columns = {
        "key": [f"{number:05d}" for number in range(COUNT)],
        "caption": [caption(number) for number in range(COUNT)],
        "png": [picture(number) for number in range(COUNT)],
    }
    parquet.write_table(pyarrow.table(columns), folder / "00000.parquet", row_group_size=7)
    return folder


def as_saved(folder: Path) -> Path:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = {
        "image": [{"bytes": picture(n), "path": None} for n in range(COUNT)],
        "text": list(map(caption, range(COUNT))),
    }
    features = Features({"image": ImageFeature(decode=False), "text": Value("string")})
    Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def stored(folder: Path) -> set[tuple[str, str, bytes]]:
    """Bucket, caption and image file of every sample."""
    found = set()
    for bucket in PreparedDataset(folder).buckets("train"):
        for item in bucket.shards.read(range(len(bucket))):
            record = Record.from_item(item)
            (text,) = record.captions
            found.add((bucket.name, text, record.image))
    return found


@pytest.mark.parametrize("layout", [as_texts, as_jsonl, as_csv, as_tars, as_parquet, as_saved])
def test_the_same_samples_whatever_the_source(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = find_source(layout(tmp_path / "source"))
    found = stored(prepare(source, tmp_path / "out", PREPARATION, workers=1))
    names = {0: "32/32x32", 1: "32/40x24", 2: "32/24x40", 3: "16/16x16", 4: "32/24x40"}
    assert {(name, text) for name, text, _ in found} == {(names[n % 5], caption(n)) for n in range(COUNT)}
    for _, text, image in found:
        assert Image.open(io.BytesIO(image)).getpixel((3, 3)) == colour(int(text.split()[1].rstrip(",")))


def test_bad_samples_are_skipped_and_listed_and_nothing_is_read_outside(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(1))
    files = {"good": picture(0), "truncated": picture(0)[:60], "empty": b"", "latin": picture(0), "lone": picture(0)}
    for name, data in files.items():
        (folder / f"{name}.png").write_bytes(data)
        if name != "lone":
            (folder / f"{name}.txt").write_bytes("größe".encode("latin-1" if name == "latin" else "utf-8"))
    (folder / "sub").mkdir()
    row = {"file_name": "../../secret.png", "text": "a secret"}
    (folder / "sub" / "metadata.jsonl").write_text(json.dumps(row))
    out = prepare(find_source(folder), tmp_path / "out", PREPARATION, workers=1)
    assert {text for _, text, _ in stored(out)} == {"größe"}
    skipped = [json.loads(line) for line in (out / SKIPPED).read_text().splitlines()]
    reasons = {Path(row["id"]).stem: row["reason"] for row in skipped}
    assert reasons["empty"] == "zero bytes"
    assert "not a readable image" in reasons["truncated"]
    assert "UTF-8" in reasons["latin"]
    assert reasons["lone"] == "no caption"
    assert "secret" in reasons
    assert sum(sum(PreparedDataset(out).description["samples"][split].values()) for split in SPLITS) == 1


def test_a_tar_that_breaks_off_gives_what_comes_before(tmp_path: Path) -> None:
    file = as_tars(tmp_path) / "00000.tar"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for other in tmp_path.glob("0001*.tar"):
        other.unlink()
    (tmp_path / "00020.tar").unlink()
    out = prepare(find_source(tmp_path), tmp_path.parent / "out-tar", PREPARATION, workers=1)
    assert 1 <= len(stored(out)) < 10
    assert "damaged tar" in (out / SKIPPED).read_text()


def test_an_empty_place_has_no_source(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing lies at"):
        find_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=str(tmp_path)):
        find_source(tmp_path)


# --- images as people have them ------------------------------------------------------------------

GRADIENT = np.stack([np.arange(256) % 256 * np.ones((16, 1)), np.full((16, 256), 90), np.full((16, 256), 9)], 2)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(orientation: int) -> None:
    image = Image.fromarray(GRADIENT.astype(np.uint8))
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }  # fmt: skip
    laid = image
    for turn in turns.get(orientation, []):
        laid = laid.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(open_image(encoded(laid, "PNG", exif=exif))), np.asarray(image))


def test_every_mode_becomes_the_colours_that_it_means() -> None:
    rgb = Image.fromarray(GRADIENT.astype(np.uint8))
    cmyk = open_image(encoded(rgb.convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(np.asarray(cmyk).astype(int) - np.asarray(rgb)).max() <= 6
    grey16 = Image.fromarray((np.arange(256, dtype=np.uint16) * 257)[None].repeat(4, 0))
    assert np.array_equal(np.asarray(open_image(encoded(grey16, "PNG")))[0, :, 1], np.arange(256))
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert open_image(encoded(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    half = open_image(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "PNG")).getpixel((0, 0))
    assert half == (255, 204, 204)
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert open_image(encoded(palette, "PNG", transparency=palette.getpixel((0, 0)))).getpixel((1, 1)) == (
        255,
        255,
        255,
    )
    frames = [Image.new("RGB", (8, 8), shade) for shade in ("red", "blue")]
    for format in ("GIF", "WEBP"):
        first = open_image(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
        assert first.getpixel((4, 4))[0] > 240  # type: ignore[index]


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(BadImage, match="too large"):
        open_image(encoded(Image.new("1", (30_000, 30_000)), "PNG"))


# --- OpenMoji --------------------------------------------------------------------------------------


def test_openmoji_draws_and_captions() -> None:
    source = OpenMoji(["en", "de", "fr"], size=64)
    keys = source.keys()
    assert len(keys) > 3900
    assert len(set(keys)) == len(keys)
    samples = {sample.id: sample for part in source.parts()[:2] for sample in source.read(part)}
    assert len(samples) == 1000
    for sample in samples.values():
        assert open_image(sample.image).size == (64, 64)
        assert sample.captions
    assert len({sample.group for sample in samples.values()}) < len(samples)


def test_a_flag_is_called_so_in_each_language() -> None:
    source = OpenMoji(["en", "de", "es"], size=16)
    samples = (sample for part in source.parts() for sample in source.read(part))
    costa_rica = next(sample for sample in samples if sample.id == "1F1E8-1F1F7")
    assert costa_rica.captions == ["flag: Costa Rica", "flagge costa rica", "bandera costa rica"]


@pytest.mark.parametrize("kind", [ImageFolder, WebDataset, Parquet, HuggingFaceDataset])
def test_a_folder_with_a_slash_is_the_same_folder(kind: Any) -> None:
    assert kind("photos/").settings() == kind("./photos").settings() == kind("photos").settings()


def test_openmoji_refuses_a_language_it_has_not() -> None:
    with pytest.raises(ValueError, match="tlh"):
        OpenMoji(["tlh"])


def test_openmoji_in_ink_is_blue_where_the_colours_are_dark() -> None:
    pictures = []
    for source in (OpenMoji(limit=3, size=32), OpenMoji(limit=3, size=32, style="ink")):
        files = [sample.image for sample in source.read("0000-0003")]
        pictures.append(np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files]).astype(float))
    light = pictures[0] @ [0.299, 0.587, 0.114] / 255
    dark_blue, white = np.array([0x10, 0x28, 0x8C]), np.array([255, 255, 255])
    expected = dark_blue + light[..., None] * (white - dark_blue)
    assert np.abs(pictures[1] - expected).max() < 3
    assert "style" not in OpenMoji().settings()
    assert OpenMoji(style="ink").settings()["style"] == "ink"
