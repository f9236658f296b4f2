"""A prepared data set follows its source: what changed is prepared again, and nothing else is."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from helpers.squares import Squares
from test_sources import as_parquet, as_saved, picture, stored

from nami_lightning.datamodules import multi_resolution, sources
from nami_lightning.datamodules.preparation import parts_folder
from nami_lightning.datamodules.preparation.filters import Filters
from nami_lightning.datamodules.preparation.prepare import merge, prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation, prepare_parts
from nami_lightning.datamodules.sources import ImageFolder, folder
from nami_lightning.datamodules.sources.listing import Entry
from nami_lightning.datamodules.storage.dataset import DESCRIPTION, PreparedDataset
from nami_lightning.training.curriculum import Curriculum, Phase

PREPARATION = Preparation([16], heldout_percent=0, format="png")


def photos(path: Path, count: int) -> Path:
    path.mkdir(exist_ok=True)
    for number in range(count):
        (path / f"{number:02d}.png").write_bytes(picture(number))
        (path / f"{number:02d}.txt").write_text(f"photo {number}")
    return path


def texts(path: Path) -> list[str]:
    return sorted(text for _, text, _ in stored(path))


def write_later(file: Path, text: str) -> None:
    """Write a file with another time of modification, whatever the clock's steps."""
    before = file.stat().st_mtime_ns if file.exists() else 0
    file.write_text(text)
    os.utime(file, ns=(before + 10**9, before + 10**9))


def make(source: sources.Source, out: Path, rescan: bool = False) -> str:
    """Prepare; return the data set's identity."""
    return PreparedDataset(prepare(source, out, PREPARATION, workers=1, rescan=rescan)).identity


def test_captions_and_images_that_change_are_prepared_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "PART_SIZE", 4)
    source, out = ImageFolder(str(photos(tmp_path / "in", 12))), tmp_path / "out"
    assert len(source.parts()) > 2
    first = make(source, out)
    (out / "encodings").mkdir()
    (out / "encodings" / "mine").touch()
    assert make(source, out) == first
    assert "changed" not in capsys.readouterr().out
    write_later(tmp_path / "in" / "03.txt", "another caption")
    (tmp_path / "in" / "05.png").unlink()
    shutil.copy(tmp_path / "in" / "01.png", tmp_path / "in" / "aa.png")
    write_later(tmp_path / "in" / "aa.txt", "a new one")
    sample = ImageFolder._sample

    def log_and_sample(self: ImageFolder, entry: Entry, *fetched: dict[str, bytes | None]) -> object:
        with (tmp_path / "read").open("a") as file:
            file.write(f"{entry.name}\n")
        return sample(self, entry, *fetched)

    monkeypatch.setattr(ImageFolder, "_sample", log_and_sample)
    second = make(source, out)
    assert second != first
    assert "1 files added, 1 changed, 1 removed" in capsys.readouterr().out
    expected = {f"photo {n}" for n in range(12) if n not in (3, 5)} | {"another caption", "a new one"}
    assert set(texts(out)) == expected
    read = (tmp_path / "read").read_text().split()
    assert {"03.png", "aa.png"} <= set(read)
    assert len(read) < 11
    assert (out / "encodings" / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "read"]
    # The same as if it were made anew.
    assert make(source, tmp_path / "anew") == second
    assert (tmp_path / "anew" / DESCRIPTION).read_text() == (out / DESCRIPTION).read_text()


def test_every_kind_of_source_is_known_by_its_files(tmp_path: Path) -> None:
    def write_tar(path: Path, text: str) -> None:
        with tarfile.open(path, "w") as tar:
            for name, data in (("a.png", picture(1)), ("a.txt", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    for name in ("tars", "table", "metadata"):
        (tmp_path / name).mkdir()
    write_tar(tmp_path / "tars" / "a.tar", "one")
    (tmp_path / "metadata" / "a.png").write_bytes(picture(1))
    rows = tmp_path / "metadata" / "metadata.jsonl"
    rows.write_text(json.dumps({"file_name": "a.png", "text": "one"}))
    table = as_parquet(tmp_path / "table") / "00000.parquet"
    saved = as_saved(tmp_path / "table")
    found: list[sources.Source] = [
        sources.WebDataset(str(tmp_path / "tars")),
        sources.Parquet(str(table)),
        sources.HuggingFaceDataset(str(saved)),
        ImageFolder(str(tmp_path / "metadata")),
    ]
    before = [[kind.signature(part) for part in kind.parts()] for kind in found]
    assert before == [[kind.signature(part) for part in kind.parts()] for kind in found]
    write_tar(tmp_path / "tars" / "a.tar", "two")
    rows.write_text(json.dumps({"file_name": "a.png", "text": "two"}))
    for path in (tmp_path / "tars" / "a.tar", table, saved / "state.json"):
        os.utime(path, ns=(10**18, 10**18))
    for kind, old in zip(found, before, strict=True):
        assert [kind.signature(part) for part in kind.parts()] != old


def test_files_that_keep_size_and_time_are_found_by_a_rescan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = ImageFolder(str(photos(tmp_path / "in", 3))), tmp_path / "out"
    first = make(source, out)
    file = tmp_path / "in" / "01.txt"
    times = file.stat().st_mtime_ns
    file.write_text("PHOTO 1")
    os.utime(file, ns=(times, times))
    assert make(source, out) == first
    assert make(source, out, rescan=True) != first
    assert texts(out) == ["PHOTO 1", "photo 0", "photo 2"]
    capsys.readouterr()
    os.utime(file, ns=(times + 10**9, times + 10**9))
    stamp = (out / DESCRIPTION).stat().st_mtime_ns
    make(source, out)
    assert "1 changed" in (said := capsys.readouterr().out)
    assert "stays as it is" in said
    make(source, out)
    assert "changed" not in capsys.readouterr().out
    assert (out / DESCRIPTION).stat().st_mtime_ns == stamp


def test_damaged_chunks_are_made_again_from_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PART_SIZE", 2)
    source, out = ImageFolder(str(photos(tmp_path / "in", 6))), tmp_path / "out"
    first = make(source, out)
    chunk, other = sorted(out.rglob("*.bin"))[:2]
    content = chunk.read_bytes()
    chunk.write_bytes(b"damage" + content[6:])
    assert make(source, out, rescan=True) == first
    assert chunk.read_bytes() == content
    chunk.unlink()
    other.unlink()
    photos(tmp_path / "in", 7)
    make(source, out)
    assert texts(out) == [f"photo {n}" for n in range(7)]


def test_a_data_set_without_signatures_or_without_its_source_is_used_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = ImageFolder(str(photos(tmp_path / "in", 3))), tmp_path / "out"
    first = make(source, out)
    shutil.move(tmp_path / "in", tmp_path / "away")
    assert make(source, out) == first
    assert "used as it is" in capsys.readouterr().out
    (tmp_path / "in").mkdir()
    assert make(source, out) == first
    assert "holds no images now" in capsys.readouterr().out
    (out / "source.jsonl").unlink()
    photos(tmp_path / "in", 5)
    assert make(source, out) == first
    assert capsys.readouterr().out == ""
    assert make(source, out, rescan=True) != first
    assert len(texts(out)) == 5


def test_what_was_wrong_and_is_mended_is_read_again(tmp_path: Path) -> None:
    source, out = ImageFolder(str(photos(tmp_path / "in", 3))), tmp_path / "out"
    for file in (tmp_path / "in").glob("*.txt"):
        file.unlink()
    with pytest.raises(ValueError, match="no sample is left: read 3, no caption 3"):
        make(source, out)
    photos(tmp_path / "in", 4)
    make(source, out)
    assert texts(out) == [f"photo {n}" for n in range(4)]
    # The source that is bad now costs nothing of what is there.
    for file in (tmp_path / "in").glob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match="no sample is left"):
        make(source, out)
    assert texts(out) == [f"photo {n}" for n in range(4)]


def test_duplicates_return_when_their_original_goes(tmp_path: Path) -> None:
    preparation = Preparation([16], heldout_percent=0, format="png", filters=Filters(drop_duplicates=True))
    source, out = ImageFolder(str(photos(tmp_path / "in", 2))), tmp_path / "out"
    (tmp_path / "in" / "01.png").write_bytes(picture(0))
    prepare(source, out, preparation, workers=1)
    assert texts(out) == ["photo 0"]
    (tmp_path / "in" / "00.png").unlink()
    prepare(source, out, preparation, workers=1)
    assert texts(out) == ["photo 1"]


def test_a_replacement_that_is_interrupted_anywhere_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = ImageFolder(str(photos(tmp_path / "in", 2))), tmp_path / "out"
    make(source, out)
    rename = Path.rename
    for number in range(4):
        photos(tmp_path / "in", 3 + number)
        (out / f"note {number}").touch()
        prepare_parts(source, out, PREPARATION, workers=1)
        left = [number]

        def stop(self: Path, target: Path, left: list[int] = left) -> Path:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", stop)
            with pytest.raises(KeyboardInterrupt):
                merge(source, out, PREPARATION)
        make(source, out)
        assert texts(out) == [f"photo {n}" for n in range(3 + number)]
        assert {path.name for path in out.glob("note *")} == {f"note {n}" for n in range(number + 1)}
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "in" and path.name[0] != ".") == ["out"]


def test_parts_of_other_settings_block_nothing_and_are_found_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no sample is left"):
        prepare(Squares(20), out, Preparation([128]), workers=1)
    prepare_parts(Squares(20), out, PREPARATION, workers=1, shard=(0, 1))
    assert "resolutions was [128] and is [16] now" in capsys.readouterr().out
    with pytest.raises(parts_folder.OtherSettings, match="resolutions was"):
        prepare_parts(Squares(20), out, Preparation([128]), workers=1, shard=(0, 2))
    prepare_parts(Squares(20), out, Preparation([128]), workers=1)
    capsys.readouterr()
    make(Squares(20), out)
    assert "2 of 2 parts are done already" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]


def test_a_recipe_follows_its_source_and_refuses_a_data_set_of_another(tmp_path: Path) -> None:
    curriculum = Curriculum([Phase(2, [1], 1e-3)], unit=4)

    def data(source: ImageFolder | None, folder: Path) -> multi_resolution.MultiResolutionDataModule:
        return multi_resolution.MultiResolutionDataModule(
            str(folder), [16], curriculum, [4], source=source, preparation=PREPARATION, num_workers=1
        )

    source = ImageFolder(str(photos(tmp_path / "in", 2)))
    assert texts(data(source, tmp_path / "data").dataset.folder) == ["photo 0", "photo 1"]
    photos(tmp_path / "in", 3)
    assert texts(data(source, tmp_path / "data").dataset.folder) == ["photo 0", "photo 1", "photo 2"]
    other = ImageFolder(str(photos(tmp_path / "other", 1)))
    made = data(source, tmp_path / "data").dataset.folder
    with pytest.raises(ValueError, match=r"source.path was .*--data.init_args.source null") as error:
        data(other, made).prepare_data()
    assert "remove" not in str(error.value)
    assert len(texts(data(None, made).dataset.folder)) == 3


def test_the_current_folder_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ImageFolder(str(photos(tmp_path / "in", 2)))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path(), Path(".."), Path("/"), tmp_path / "here"):
        with pytest.raises(ValueError, match="is the current folder, or above it: name a folder"):
            prepare(source, output, PREPARATION, workers=1)
    monkeypatch.chdir(tmp_path)
    make(source, Path("here"))
    monkeypatch.chdir(tmp_path / "here")
    assert make(source, Path()) == PreparedDataset(tmp_path / "here").identity
