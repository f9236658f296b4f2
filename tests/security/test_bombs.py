"""Images and archives that are small on disk and large in memory: bounded in pixels, bytes and time."""

import gzip
import io
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter

import pytest
from helpers.fuzz.sources import image_files
from PIL import Image

from nami_lightning.datamodules.preparation.image_io import MOST_SCANS, START_OF_SCAN, BadImage, open_image
from nami_lightning.datamodules.sources import ImageFolder, Parquet, Skipped, SourceSample, WebDataset, base
from nami_lightning.datamodules.sources import parquet as parquet_source
from nami_lightning.datamodules.sources import webdataset as tar_source

SIDE = 20_000
"""Of an image of more px than are decoded."""


def png(side: int) -> bytes:
    """Return a black image of 1 bit a pixel, which has few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    rows = b"".join(compressor.compress(bytes(1 + (side + 7) // 8)) for _ in range(side)) + compressor.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_images_of_too_many_pixels_are_not_decoded_wherever_they_are() -> None:
    inner = png(SIDE)
    assert len(inner) < 100_000
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    apple = b"icns" + struct.pack(">I", 16 + len(inner)) + b"ic07" + struct.pack(">I", 8 + len(inner)) + inner
    for data in (inner, icon, apple):
        begin = perf_counter()
        with pytest.raises(BadImage, match="too large: 400,000,000 px; the limit is 268,435,456 px"):
            open_image(data)
        assert perf_counter() - begin < 0.5  # decoding takes longer


def test_a_jpeg_of_many_passes_is_not_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("L", (64, 64)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data[data.rindex(START_OF_SCAN) : -2]
    assert open_image(data).size == (64, 64)
    with pytest.raises(BadImage, match=f"passes over the whole image; the limit is {MOST_SCANS}"):
        open_image(data[:-2] + last * MOST_SCANS + data[-2:])


# --- archives ------------------------------------------------------------------------------------------


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the limits be of megabytes, so that the tests are fast."""
    monkeypatch.setattr(base, "FREE_BYTES", 2**23)
    monkeypatch.setattr(tar_source, "MOST_IMAGE_BYTES", 2**20)
    monkeypatch.setattr(tar_source, "MOST_TEXT_BYTES", 2**16)


def pack(members: Iterable[tuple[str, bytes]], compress: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return gzip.compress(buffer.getvalue()) if compress else buffer.getvalue()


def read_tar(folder: Path, data: bytes) -> tuple[list[SourceSample | Skipped], int]:
    """Return what a tar holds, and the most bytes that Python held while it was read."""
    (folder / "a.tar").write_bytes(data)
    source = WebDataset(str(folder))
    (part,) = source.parts()
    tracemalloc.start()
    found = list(source.read(part))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, most


@pytest.mark.usefixtures("small_limits")
def test_a_large_file_in_a_tar_is_not_read(tmp_path: Path) -> None:
    image = image_files()[0]
    members = [
        ("0.png", bytes(5 * 2**20)),
        ("0.txt", b"a"),
        ("1.png", image),
        ("1.txt", bytes(2**17)),
        ("1.json", b"{}"),
    ]
    found, most = read_tar(tmp_path, pack([*members, ("2.png", image), ("2.txt", b"a cat")], compress=False))
    assert [type(one) for one in found] == [Skipped, Skipped, SourceSample]
    assert "too large: a .png of 5,242,880 bytes; the limit is 1,048,576" in found[0].reason  # type: ignore[union-attr]
    assert "too large: a .txt of 131,072 bytes" in found[1].reason  # type: ignore[union-attr]
    assert most < 2**20


@pytest.mark.usefixtures("small_limits")
def test_a_tar_that_unpacks_without_an_end_is_left(tmp_path: Path) -> None:
    good = [("0.png", image_files()[0]), ("0.txt", b"a cat")]
    found, most = read_tar(tmp_path, pack([*good, *((f"{number}.bin", bytes(2**20)) for number in range(64))]))
    assert isinstance(found[0], SourceSample)
    assert isinstance(found[-1], Skipped)
    assert "it unpacks to more than" in found[-1].reason
    assert len(found) < 64
    assert most < 2**26  # a block of the compressed file at a time


@pytest.mark.usefixtures("small_limits")
def test_a_header_of_a_tar_is_bounded(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**24
    (skipped,), most = read_tar(tmp_path, gzip.compress(header.tobuf() + bytes(2**24)))
    assert "damaged tar: a header of 16,777,216 bytes" in skipped.reason  # type: ignore[union-attr]
    assert most < 2**22


@pytest.mark.usefixtures("small_limits")
def test_a_sparse_file_of_a_tar_is_not_filled(tmp_path: Path) -> None:
    header = tarfile.TarInfo("0.png")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 0
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"00200000000\0"  # 16 MB of zeros, of which none is stored
    block[148:156] = b"        "
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    found, most = read_tar(tmp_path, bytes(block) + bytes(1024))
    assert [type(one) for one in found] == [Skipped]
    assert most < 2**20


def test_a_parquet_file_whose_rows_share_a_large_value_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(base, "FREE_BYTES", 2**23)
    image = image_files()[0] + bytes(2**20)
    table = pyarrow.table({"image": [image] * 400, "caption": ["a"] * 400})
    parquet.write_table(table, tmp_path / "a.parquet", dictionary_pagesize_limit=2**24)
    limit = base.most_unpacked((tmp_path / "a.parquet").stat().st_size)
    assert limit < 400 * len(image)
    source = Parquet(str(tmp_path))
    found = list(source.read(source.parts()[0]))
    assert len(found) - 1 == limit // (len(image) + parquet_source.LEAST_ROW_BYTES // 64)
    assert "unpacks to more than" in found[-1].reason  # type: ignore[union-attr]


def test_a_large_file_of_a_folder_is_not_read(tmp_path: Path) -> None:
    for name, size in (("0.png", base.MOST_IMAGE_BYTES + 1), ("1.txt", base.MOST_TEXT_BYTES + 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # no bytes are stored
    (tmp_path / "0.txt").write_text("a cat")
    (tmp_path / "1.png").write_bytes(image_files()[0])
    source = ImageFolder(str(tmp_path))
    first, second = source.read(source.parts()[0])
    assert isinstance(first, Skipped)
    assert first.reason.startswith("too large: 1,073,741,825 bytes")
    assert isinstance(second, Skipped)
    assert second.reason.startswith(".txt too large")
