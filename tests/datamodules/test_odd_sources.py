"""Sources as people have them: several captions, odd extensions, hidden files, and single records that are bad."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from test_sources import picture

from nami_lightning.datamodules import image_formats
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation, survey_lines
from nami_lightning.datamodules.sources import (
    Columns,
    HuggingFaceDataset,
    ImageFolder,
    Parquet,
    Skipped,
    Source,
    SourceSample,
    WebDataset,
    find_source,
)
from nami_lightning.datamodules.storage.dataset import PreparedDataset
from nami_lightning.datamodules.storage.inspect import removal_lines


def read(source: Source) -> tuple[dict[str, SourceSample], dict[str, str]]:
    """Return the samples of a source by id, and the reasons of those that it skips."""
    found = [sample for part in source.parts() for sample in source.read(part)]
    samples = {sample.id: sample for sample in found if isinstance(sample, SourceSample)}
    skipped = {sample.id: sample.reason for sample in found if isinstance(sample, Skipped)}
    assert len(samples) + len(skipped) == len(found)
    return samples, skipped


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def write_tar(file: Path, files: dict[str, bytes | str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            content = data.encode() if isinstance(data, str) else data
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


# --- several files say it --------------------------------------------------------------------------

SIDECARS: dict[str, bytes | str] = {
    "both.txt": "the text",
    "both.json": '{"caption": "the json", "similarity": 0.5}',
    "kohya.caption": "the caption file",
    "kohya.json": '{"caption": "the json"}',
    "same.txt": "the text\n",
    "same.json": '{"caption": "the text"}',
    "list.txt": "the text",
    "list.json": "[1, 2]",
    "broken.txt": "the text",
    "broken.json": "{",
    "json.json": '{"prompt": "the json"}',
    "empty.txt": " \n",
    "empty.json": '{"caption": "the json"}',
    "nothing.json": "[]",
}
CAPTIONS = {
    "both": "the text",
    "kohya": "the caption file",
    "same": "the text",
    "list": "the text",
    "broken": "the text",
    "json": "the json",
    "empty": "the json",
}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_the_text_beside_an_image_wins_and_the_table_counts_what_differs(kind: str, tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    for name in (*CAPTIONS, "nothing"):
        files |= {f"{name}.png": picture(0)} | {key: SIDECARS[key] for key in SIDECARS if Path(key).stem == name}
    source: Source
    if kind == "folder":
        source = ImageFolder(str(write(tmp_path / "in", files)))
    else:
        source = WebDataset(str(write_tar(tmp_path / "in" / "0.tar", files).parent))
    samples, skipped = read(source)
    assert {Path(name).stem: list(sample.captions) for name, sample in samples.items()} == {
        name: [caption] for name, caption in CAPTIONS.items()
    }
    assert next(sample.scores for name, sample in samples.items() if "both" in name) == {"similarity": 0.5}
    assert [reason for name, reason in skipped.items() if "nothing" in name] == [
        "its .json is damaged: a list, not an object"
    ]
    out = prepare(source, tmp_path / "out", Preparation([16], heldout_percent=0), workers=1)
    notes = {
        "captions differ: .txt is used, not caption in .json": 1,
        "captions differ: .caption is used, not caption in .json": 1,
        "a damaged .json, which is ignored": 2,
    }
    assert PreparedDataset(out).description["notes"] == notes
    table = "\n".join(removal_lines(PreparedDataset(out)))
    assert all(note in table for note in notes)


def test_metadata_stands_between_text_files_and_json(tmp_path: Path) -> None:
    rows = [{"file_name": name, "text": "the row"} for name in ("a.png", "b.png", "c.png")]
    files: dict[str, bytes | str] = {
        "a.png": picture(0), "a.txt": "the text", "b.png": picture(0), "b.json": '{"caption": "the json"}',
        "c.png": picture(0), "metadata.jsonl": "\n".join(map(json.dumps, rows)),
    }  # fmt: skip
    folder = str(write(tmp_path, files))
    samples, _ = read(ImageFolder(folder))
    assert {name: (list(sample.captions), len(sample.notes)) for name, sample in samples.items()} == {
        "a.png": (["the text"], 1),
        "b.png": (["the row"], 1),
        "c.png": (["the row"], 0),
    }
    samples, _ = read(ImageFolder(folder, Columns({"text": 1, "txt": 2})))
    assert samples["a.png"].captions == ["the row", "the text"]
    assert samples["a.png"].weights == [1, 2]


def test_columns_of_a_table_that_differ_are_counted(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {"jpg": [picture(0)] * 3, "caption": ["a", "b", None], "text": ["a", "c", "d"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    samples, _ = read(Parquet(str(tmp_path)))
    assert [list(sample.captions) for sample in samples.values()] == [["a"], ["b"], ["d"]]
    assert [list(sample.notes) for sample in samples.values()] == [
        [], ["captions differ: caption is used, not text"], [],
    ]  # fmt: skip


# --- what is found ---------------------------------------------------------------------------------


def test_all_that_pillow_reads_is_taken_and_the_rest_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = {"jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "ppm": "PPM", "tga": "TGA"}
    for extension, format in formats.items():
        Image.new("RGB", (32, 32), (9, 99, 199)).save(tmp_path / f"{extension}.{extension}", format)
        (tmp_path / f"{extension}.txt").write_text(extension)
    files: dict[str, bytes | str] = {
        "IMG_1.JPG": picture(0), "IMG_1.TXT": "shouted", "IMG_2.JPG": picture(0), "img_2.txt": "whispered",
        "A.png": picture(0), "A.txt": "A", "a.png": picture(0), "b.png": picture(0), "B/b.txt": "another folder",
        "phone.heic": b"\0", "phone.txt": "lonely", "notes.md": "no image", "noext": b"", "film.mpg": b"",
        ".hidden.png": picture(0), ".hidden/a.png": picture(0), "sub/.thumbs/a.png": picture(0),
        "__MACOSX/a.png": picture(0), "._A.png": b"",
    }  # fmt: skip
    source = find_source(write(tmp_path, files))
    assert isinstance(source, ImageFolder)
    samples, skipped = read(source)
    captions = {name: sample.captions[0] for name, sample in samples.items()}
    assert captions == {f"{name}.{name}": name for name in formats} | {
        "IMG_1.JPG": "shouted", "IMG_2.JPG": "whispered", "A.png": "A",
    }  # fmt: skip
    assert skipped == {"a.png": "no caption", "b.png": "no caption"}
    rows = {(row.extension, row.use, row.reason): row.files for row in source.survey()}
    assert rows.pop((".heic", "", "an image that Pillow reads with a plugin: pip install pillow-heif")) == 1
    assert rows == {
        **{(f".{name}", "image", ""): 1 for name in formats},
        (".jpg", "image", ""): 2,
        (".png", "image", ""): 3,
        (".txt", "caption", ""): 9,
        (".txt", "", "no image has this name"): 2,
        (".md", "", "not an image Pillow reads"): 1,
        (".mpg", "", "not an image Pillow reads"): 1,
        ("(none)", "", "not an image Pillow reads"): 1,
        (".png", "", "hidden"): 2,
        ("folder", "", "hidden"): 3,
    }
    assert "ignored: hidden" in "\n".join(survey_lines(source))


def test_plugins_of_pillow_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []

    class Plugin:
        register_heif_opener = staticmethod(lambda: registered.append("heif"))

    monkeypatch.setattr(image_formats, "import_module", lambda name: Plugin)
    image_formats.register_plugins.__wrapped__()
    assert registered == ["heif"]


def test_hidden_files_are_skipped_in_and_among_tars_and_parquet_files(tmp_path: Path) -> None:
    files = {
        name: picture(0) for name in ("a.png", "././b.png", ".h/c.png", "./d/.h/e.png", "._f.png", "__MACOSX/g.png")
    }
    captions = {name.replace("png", "txt"): "a text" for name in files}
    for name in ("a.tar", ".old/b.tar", ".c.tar", "sub/.old/d.tar"):
        write_tar(tmp_path / name, dict(sorted((files | captions).items())))
    (tmp_path / "a.csv").touch()
    source = find_source(tmp_path)
    samples, skipped = read(source)
    assert set(samples) == {"a/a", "a/b"}
    assert not skipped
    rows = {(row.extension, row.use or row.reason): row.files for row in source.survey()}
    assert rows == {(".tar", "read"): 1, (".csv", "not .tar"): 1, (".tar", "hidden"): 1, ("folder", "hidden"): 2}
    for name in ("a.parquet", ".old/b.parquet"):
        write(tmp_path / "table", {name: b"PAR1"})
    assert Parquet(str(tmp_path / "table")).files.parts() == ["a.parquet:4"]


def test_a_folder_of_two_kinds_is_refused_and_each_can_be_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": picture(0), "b.png": picture(1), "a.txt": "a", "b.txt": "b"})
    write_tar(tmp_path / "backup.tar", {"c.png": picture(0), "c.txt": "c"})
    with pytest.raises(ValueError, match=r"2 image files \(ImageFolder\), 1 .tar files \(WebDataset\): say which"):
        find_source(tmp_path)
    assert set(read(ImageFolder(str(tmp_path)))[0]) == {"a.png", "b.png"}
    assert set(read(find_source(f"{tmp_path}/*.tar"))[0]) == {"backup/c"}
    # What img2dataset writes beside its tars, and a trainer beside its images, is no second kind.
    (tmp_path / "backup.tar").unlink()
    write(tmp_path, {"00000.parquet": b"PAR1", "state.json": "{}"})
    assert isinstance(find_source(tmp_path), ImageFolder)


# --- one bad record ------------------------------------------------------------------------------------


def bad_texts(count: int, bad: int) -> list[bytes]:
    return [b"caf\xe9" if number == bad else b"caption %d" % number for number in range(count)]


def test_a_caption_that_is_not_utf8_costs_one_row(tmp_path: Path) -> None:
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    texts = pyarrow.array(bad_texts(100, 50), pyarrow.binary()).view(pyarrow.string())
    images = pyarrow.array([picture(number) for number in range(100)])
    lists = pyarrow.ListArray.from_arrays(list(range(101)), texts)
    for name, column in (("plain", texts), ("lists", lists), ("words", texts.dictionary_encode())):
        file = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.table({"png": images, "caption": column}), file, row_group_size=40)
        samples, skipped = read(Parquet(str(file)))
        assert len(samples) == 99, name
        assert skipped == {f"{name}/0000050": "caption is not UTF-8"}
        assert samples[f"{name}/0000099"].captions == ["caption 99"]
    Dataset(pyarrow.table({"png": images, "caption": texts})).save_to_disk(str(tmp_path / "saved"))
    samples, skipped = read(HuggingFaceDataset(str(tmp_path / "saved")))
    assert len(samples) == 99
    assert skipped == {"0000050": "caption is not UTF-8"}
    assert samples["0000099"].captions == ["caption 99"]


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    columns = {"png": [picture(number) for number in range(30)], "caption": [f"caption {n}" for n in range(30)]}
    parquet.write_table(pyarrow.table(columns), file, row_group_size=10, compression="zstd", use_dictionary=False)
    start = parquet.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(file.read_bytes())
    data[start : start + 200] = b"\xff" * 200
    file.write_bytes(data)
    samples, skipped = read(Parquet(str(file)))
    assert set(samples) == {f"a/{number:07d}" for number in (*range(10), *range(20, 30))}
    assert [(name, reason.split(":")[0]) for name, reason in skipped.items()] == [
        ("a.parquet rows 10 to 19", "damaged Parquet file")
    ]
    assert samples["a/0000029"].captions == ["caption 29"]


@pytest.mark.parametrize("kind", ["csv", "csv16", "jsonl"])
def test_a_bad_row_of_metadata_costs_one_image(kind: str, tmp_path: Path) -> None:
    texts = ["first", "x" * 200_000, "third", "\udce9", "fifth"]
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    if kind == "jsonl":
        (tmp_path / "1.txt").write_text("has a text all the same")
    table = io.StringIO()
    if kind == "jsonl":
        texts[1] = ""
        rows = [json.dumps({"file_name": f"{n}.png", "text": text}) for n, text in enumerate(texts)]
        table.write("\n".join([rows[0], "[", *rows[1:]]))
    else:
        pairs = [(f"{number}.png", text) for number, text in enumerate(texts)]
        csv.writer(table).writerows([("file_name", "text"), *pairs, ("x" * 5000, "a name that is too long")])
    encoding, errors = ("utf-16", "surrogatepass") if kind == "csv16" else ("utf-8", "surrogateescape")
    data = table.getvalue().encode(encoding, errors)
    (tmp_path / f"metadata.{kind.removesuffix('16')}").write_bytes(data)
    samples, skipped = read(ImageFolder(str(tmp_path)))
    assert {"0.png", "2.png", "4.png"} <= set(samples)
    assert "not UTF-8" in skipped["3.png"]
    if kind == "jsonl":
        assert samples["1.png"].captions == ["has a text all the same"]
        assert "damaged metadata" in skipped["metadata.jsonl:2"]
    else:
        assert skipped["x" * 5000] == "no such file"
        assert skipped["1.png"] == "caption of 200,000 characters: is a quotation mark not closed?"
