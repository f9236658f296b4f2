"""The colours and numbers of a source's images: converted where their meaning is clear, refused by name elsewhere."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngImageFile

from nami_lightning.datamodules.preparation.image_io import BROKEN_PROFILE, MAX_PIXELS, BadImage, open_image
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation
from nami_lightning.datamodules.sources import ImageFolder
from nami_lightning.datamodules.storage.dataset import PreparedDataset
from nami_lightning.datamodules.storage.shards import Record

ADOBE = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])
P3 = np.array([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]])
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])
"""The red, green and blue primaries in XYZ, adapted to D50."""


def profile_of(primaries: np.ndarray, gamma: float) -> bytes:
    """An ICC profile of three primaries and a gamma."""

    def fixed(values: object) -> bytes:
        return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in np.ravel(np.asarray(values)))

    xyz = {f"{name}XYZ".encode(): b"XYZ \0\0\0\0" + fixed(row) for name, row in zip("rgb", primaries, strict=True)}
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = xyz | {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve, b"wtpt": b"XYZ \0\0\0\0" + fixed((0.9642, 1, 0.8249))}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 79
    tags[b"cprt"] = b"text\0\0\0\0none\0\0\0\0"
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), b"", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed((0.9642, 1, 0.8249))
    return head.ljust(128, b"\0") + table + body


def in_srgb(colour: tuple[int, ...], primaries: np.ndarray, gamma: float) -> np.ndarray:
    """The same colour in sRGB, by the formulas."""
    linear = (np.array(colour) / 255) ** gamma @ primaries @ np.linalg.inv(SRGB)
    linear = linear.clip(0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


COLOUR = (200, 140, 110)


@pytest.mark.parametrize(("primaries", "gamma"), [(ADOBE, 2.2), (P3, 2.2), (SRGB, 2.2)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profiles_are_converted_to_srgb(primaries: np.ndarray, gamma: float, mode: str) -> None:
    image = Image.new("RGB", (8, 8), COLOUR)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    notes: list[str] = []
    found = open_image(encoded(image, icc_profile=profile_of(primaries, gamma)), notes)
    assert np.abs(np.array(found.getpixel((3, 3))) - in_srgb(COLOUR, primaries, gamma)).max() <= 1.5
    assert not notes
    assert not found.info
    if mode == "RGBA":  # transparent parts stay white
        image.putalpha(0)
        found = open_image(encoded(image, icc_profile=profile_of(primaries, gamma)))
        assert found.getpixel((3, 3)) == (255, 255, 255)


def test_profiles_of_other_kinds_of_images() -> None:
    notes: list[str] = []
    grey = encoded(Image.new("L", (8, 8), 140), icc_profile=profile_of(ADOBE, 1.0))
    assert open_image(grey, notes).getpixel((3, 3))[0] > 180  # type: ignore[index]
    assert not notes
    for number, (image, profile) in enumerate((
        (Image.new("RGB", (8, 8), COLOUR), b"no profile at all"),
        (Image.new("RGB", (8, 8), COLOUR), profile_of(ADOBE, 2.2)[:200]),
        (Image.new("RGB", (8, 8), COLOUR), ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
    ), 1):  # fmt: skip
        assert open_image(encoded(image, icc_profile=profile), notes).getpixel((3, 3)) == COLOUR
        assert notes == [BROKEN_PROFILE] * number
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", icc_profile=profile_of(ADOBE, 2.2))
    assert open_image(cmyk, notes).getpixel((3, 3))[0] > 240  # type: ignore[index]
    assert len(notes) == 4


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_no_profile_is_stored_and_broken_ones_are_counted(format: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, profile in (("good", profile_of(P3, 2.2)), ("broken", b"broken")):
        Image.new("RGB", (16, 16), COLOUR).save(tmp_path / "in" / f"{name}.png", icc_profile=profile)
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    preparation = Preparation([16], heldout_percent=0, format=format)  # type: ignore[arg-type]
    dataset = PreparedDataset(prepare(ImageFolder(str(tmp_path / "in")), tmp_path / "out", preparation, workers=1))
    assert dataset.description["notes"] == {BROKEN_PROFILE: 1}
    (bucket,) = dataset.buckets("train")
    for item in bucket.shards.read(range(2)):
        stored = Image.open(io.BytesIO(Record.from_item(item).image))
        assert not stored.info.keys() & {"icc_profile", "exif", "comment"}


def tiff(values: object, kind: type) -> bytes:
    return encoded(Image.fromarray(np.full((8, 8), values, kind)), "TIFF")


def test_numbers_are_converted_where_their_meaning_is_clear() -> None:
    for data, expected in (
        (tiff(0.5, np.float32), 128),
        (tiff(1, np.float32), 255),
        (tiff(0, np.float32), 0),
        (tiff(200, np.float32), 200),
        (tiff(32896, np.uint16), 128),
        (tiff(200, np.uint16), 1),
        (tiff(32896, np.int32), 128),
        (tiff(77, np.int32), 77),
        (encoded(Image.fromarray(np.full((8, 8), 200, np.uint16))), 1),
        (encoded(Image.fromarray(np.full((8, 8), 200, np.int32)), "PPM"), 1),
    ):
        assert open_image(data).getpixel((3, 3)) == (expected,) * 3


@pytest.mark.parametrize(
    ("values", "kind", "why"),
    [
        (np.nan, np.float32, "floats with no clear meaning: some are not finite"),
        (np.inf, np.float32, "floats with no clear meaning: some are not finite"),
        (-0.5, np.float32, "floats with no clear meaning: from -0.5 to -0.5"),
        (1.5, np.float32, "floats with no clear meaning: from 1.5 to 1.5"),
        (3000, np.float32, "floats with no clear meaning: from 3000 to 3000"),
        (2**30, np.int32, "integers with no clear meaning: from 1.07374e"),
        (-5, np.int32, "integers with no clear meaning: from -5 to -5"),
    ],
)
def test_numbers_without_a_clear_meaning_are_refused_and_named(values: float, kind: type, why: str) -> None:
    with pytest.raises(BadImage, match=why):
        open_image(tiff(values, kind))


def png_of(width: int, height: int) -> bytes:
    """The beginning of a PNG of this size, without its pixels."""
    data = bytearray(encoded(Image.new("1", (1, 1))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_the_limit_of_pixels_is_the_one_that_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(image: Image.Image) -> None:
        raise OSError("decoded")

    limit = Image.MAX_IMAGE_PIXELS
    small, large = png_of(16384, 16384), png_of(16385, 16384)
    monkeypatch.setattr(PngImageFile, "load", decode)
    with pytest.raises(BadImage, match=f"too large: {16385 * 16384:,} px; the limit is {MAX_PIXELS:,} px"):
        open_image(large)
    with pytest.raises(BadImage, match="not a readable image: decoded"):
        open_image(small)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_reasons_hold_no_addresses() -> None:
    with pytest.raises(BadImage, match=r"no format that Pillow knows$"):
        open_image(b"<html>404</html>")
