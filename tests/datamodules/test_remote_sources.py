"""Sources and outputs in stores: the same data set as on a disk, whatever breaks on the way."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers.in_this_process import InThisProcess
from helpers.squares import Squares
from helpers.stores import Web, s3_store

from nami_lightning.cli.main import main
from nami_lightning.datamodules.preparation import prepare_parts as prepare_parts_module
from nami_lightning.datamodules.preparation.filters import Filters
from nami_lightning.datamodules.preparation.parts_folder import OtherSettings
from nami_lightning.datamodules.preparation.prepare import is_complete, merge
from nami_lightning.datamodules.preparation.prepare_parts import Preparation, prepare_parts
from nami_lightning.datamodules.preparation.remote_output import RemoteOutput
from nami_lightning.datamodules.sources import ImageFolder, Parquet, Source, WebDataset, find_source
from nami_lightning.datamodules.storage import remote as remote_module
from nami_lightning.datamodules.storage import remote_files
from nami_lightning.datamodules.storage.chunk_cache import CacheSettings
from nami_lightning.datamodules.storage.dataset import SPLITS, PreparedDataset
from nami_lightning.datamodules.storage.remote import FetchFailed
from nami_lightning.datamodules.storage.remote_files import RemoteFile, expand_braces, list_remote
from nami_lightning.datamodules.storage.shards import Record

COUNT = 24
PREPARATION = Preparation([16, 32], heldout_percent=10, aspect_step=4, format="png")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No waiting, no processes, and an empty memory."""
    monkeypatch.setattr(remote_module, "DELAYS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(prepare_parts_module, "ProcessPoolExecutor", InThisProcess)
    list_remote.cache_clear()
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same squares as image files, as tars and as Parquet files."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("squares")
    folders = {kind: root / kind for kind in ("files", "tars", "parquet")}
    (folders["files"] / "deeper").mkdir(parents=True)
    for kind in ("tars", "parquet"):
        folders[kind].mkdir()
    for first in range(0, COUNT, 10):
        samples = [Squares().sample(number) for number in range(first, min(first + 10, COUNT))]
        with tarfile.open(folders["tars"] / f"{first:05d}.tar", "w") as tar:
            for sample in samples:
                for extension, data in (("png", sample.image), ("txt", sample.captions[0].encode())):
                    info = tarfile.TarInfo(f"{int(sample.id):05d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        columns = {"image": [one.image for one in samples], "text": [one.captions[0] for one in samples]}
        parquet.write_table(pyarrow.table(columns), folders["parquet"] / f"{first:05d}.parquet", row_group_size=4)
        for sample in samples:
            where = folders["files"] / ("deeper" if first else "")
            (where / f"{int(sample.id):05d}.png").write_bytes(sample.image)
    rows = [
        json.dumps({"file_name": f"{'deeper/' if n >= 10 else ''}{n:05d}.png", "text": f"square {n}"})
        for n in range(COUNT)
        if n % 2
    ]
    (folders["files"] / "metadata.jsonl").write_text("\n".join(rows))
    for n in range(0, COUNT, 2):
        (folders["files"] / ("deeper" if n >= 10 else "") / f"{n:05d}.txt").write_text(f"square {n}")
    (folders["files"] / ".hidden.png").write_bytes(b"")
    return folders


def make(source: Source, output: Path | str, preparation: Preparation = PREPARATION) -> Path | str:
    if not is_complete(source, output, preparation):
        prepare_parts(source, output, preparation, workers=1)
        merge(source, output, preparation)
    assert is_complete(source, output, preparation)
    return output


def contents(output: Path | str, tmp_path: Path) -> dict[str, object]:
    """All records of a data set, by bucket, and its identity, which has the checksum of each chunk."""
    dataset = PreparedDataset(output, CacheSettings(str(tmp_path / "cache"), "100MB"))
    found: dict[str, object] = {"identity": dataset.identity}
    for split in SPLITS:
        for bucket in dataset.buckets(split):
            items = bucket.shards.read(range(len(bucket)))
            found[f"{split}/{bucket.name}"] = [Record.from_item(item) for item in items]
    return found


def put(folder: Path, name: str) -> str:
    """Copy a folder to a store in this process's memory; its URL there."""
    fsspec.filesystem("memory").put(str(folder), f"/{name}", recursive=True)
    return f"memory://{name}"


def test_a_command_reads_from_a_store_and_writes_to_it_what_it_does_on_a_disk(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With worker processes; on the moto server."""
    monkeypatch.undo()
    settings = ["--resolutions", "16", "32", "--heldout_percent", "10", "--aspect_step", "4", "--format", "png"]
    expected = contents(make(find_source(folders["tars"]), tmp_path / "disk"), tmp_path)
    with s3_store() as store:
        store.put(str(folders["tars"]), "bucket/tars", recursive=True)
        command = ["data", "prepare", "--source", "s3://bucket/tars/*.tar", "--output", "s3://bucket/made/set"]
        assert main([*command, *settings, "--workers", "2"]) == 0
        assert "kept" in capsys.readouterr().out
        assert contents("s3://bucket/made/set", tmp_path) == expected
        assert main([*command, *settings]) == 0
        assert "is complete" in capsys.readouterr().out
        assert store.find("bucket/made/set.parts") == []


@pytest.mark.parametrize(("kind", "source"), [("files", ImageFolder), ("tars", WebDataset), ("parquet", Parquet)])
def test_each_kind_of_source_gives_the_same_from_a_disk_a_store_and_a_web_server(
    folders: dict[str, Path], tmp_path: Path, kind: str, source: type[Source]
) -> None:
    local, remote = find_source(folders[kind]), find_source(put(folders[kind], "in"))
    assert isinstance(local, source)
    assert isinstance(remote, source)
    assert [(row.extension, row.files, row.use) for row in remote.survey() if row.use] == [
        (row.extension, row.files, row.use) for row in local.survey() if row.use
    ]
    expected = contents(make(local, tmp_path / "disk"), tmp_path)
    assert contents(make(remote, tmp_path / "from a store"), tmp_path) == expected
    assert contents(make(local, "memory://sets/out"), tmp_path) == expected
    with Web(folders[kind], breaks=3) as server:
        assert contents(make(find_source(server.url), tmp_path / "from a web server"), tmp_path) == expected


def test_a_broken_transfer_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "BLOCK_BYTES", 1000)
    data = bytes(range(256)) * 40
    (tmp_path / "file.tar").write_bytes(data)
    with Web(tmp_path, breaks=4) as server:
        url = f"{server.url}/file.tar"
        with io.BufferedReader(RemoteFile(url, len(data)), 1000) as file:
            assert file.read() == data
            file.seek(-5, io.SEEK_END)
            assert file.read() == data[-5:]
        asked = server.asked
    assert {last - first + 1 for first, last in asked} <= {1000, 240, 5}
    assert sum(last - first + 1 for first, last in asked[:-1]) < len(data) * 1.4
    again = [first for (first, _), (second, _) in pairwise(asked) if first == second]
    assert again == [first for first, _ in asked[3:-1:4]]


def test_a_server_without_parts_of_files_is_named(folders: dict[str, Path]) -> None:
    with Web(folders["tars"], parts=False) as server:
        source = WebDataset(server.url)
        part = source.parts()[1]
        content = list(source.read(part))  # the file is asked for as a whole, so it is taken as it comes
        assert len(content) == 10
        with (
            RemoteFile(f"{server.url}/00010.tar", 10_000) as file,
            pytest.raises(FetchFailed, match="no Range requests"),
        ):
            file.read(100)


def test_a_store_that_fails_is_no_damaged_file(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, path: str, **settings: object) -> bytes:
        raise OSError("the store is down")

    for kind in ("tars", "parquet", "files"):
        source = find_source(put(folders[kind], kind))
        part = source.parts()[0]
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "cat_file", fail)
            with pytest.raises(FetchFailed, match=r"the store is down.*4 tries"):
                list(source.read(part))


def test_numbered_files_need_no_list(folders: dict[str, Path], tmp_path: Path) -> None:
    assert expand_braces("s3://a/{08..11}/x{0..1}.tar")[:3] == [
        "s3://a/08/x0.tar",
        "s3://a/08/x1.tar",
        "s3://a/09/x0.tar",
    ]
    with Web(folders["tars"]) as server:
        source = find_source(f"{server.url}/000{{10..10}}.tar")
        assert [part.split(":")[0] for part in source.parts()] == ["00010.tar"]
    with pytest.raises(FileNotFoundError, match="memory://nothing"):
        find_source("memory://nothing")
    with pytest.raises(FetchFailed, match="nothing://x can't be listed"):
        find_source("nothing://x")


@pytest.mark.parametrize("writes", [0, 5, 20])
def test_a_half_made_data_set_is_none_and_is_finished_later(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """The process ends at the Nth file that it writes to the store."""
    source, url = find_source(folders["tars"]), "memory://sets/out"
    expected = contents(make(source, tmp_path / "disk"), tmp_path)
    left = writes

    def stopping(action: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            action(*arguments)

        return write

    with monkeypatch.context() as patch:
        for name in ("write", "_write_bytes"):
            patch.setattr(RemoteOutput, name, stopping(getattr(RemoteOutput, name)))
        with pytest.raises(KeyboardInterrupt):
            make(source, url)
    with pytest.raises(FileNotFoundError, match="no finished data set"):
        PreparedDataset(url)
    assert contents(make(source, url), tmp_path) == expected
    chunks = {f"{split}/{bucket}" for split in SPLITS for bucket in PreparedDataset(url).description["samples"][split]}
    files = fsspec.filesystem("memory").find("/sets/out")
    assert len([file for file in files if file.endswith(".bin")]) == len(PreparedDataset(url).description["checksums"])
    assert len([file for file in files if file.endswith("index.json")]) == len(chunks)
    assert fsspec.filesystem("memory").find("/sets/out.parts") == []


def test_duplicates_are_dropped_in_a_store_too(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("in", "copies"):
        shutil.copytree(folders["tars"], tmp_path / "tars" / kind)
    preparation = Preparation([16, 32], heldout_percent=0, format="png", filters=Filters(drop_duplicates=True))
    source = find_source(tmp_path / "tars")
    expected = contents(make(source, tmp_path / "disk", preparation), tmp_path)
    found = contents(make(source, "memory://sets/out", preparation), tmp_path)
    assert {**found, "identity": ""} == {**expected, "identity": ""}
    description = PreparedDataset("memory://sets/out").description
    assert description["removed"]["duplicate"] == COUNT
    files = fsspec.filesystem("memory").find("/sets/out")
    assert {file.removeprefix("/sets/out/") for file in files if file.endswith(".bin")} == set(description["checksums"])


def test_what_is_at_an_url_already_is_not_overwritten(folders: dict[str, Path], tmp_path: Path) -> None:
    source = find_source(put(folders["tars"], "in"))
    fsspec.filesystem("memory").pipe("/other/thesis.pdf", b"...")
    with pytest.raises(ValueError, match=r"memory://other holds something else.*thesis\.pdf"):
        make(source, "memory://other")
    make(source, "memory://sets/out")
    with pytest.raises(OtherSettings, match="format was png and is jpeg now"):
        make(source, "memory://sets/out", Preparation([16, 32], heldout_percent=10, aspect_step=4, format="jpeg"))
    store = fsspec.filesystem("memory")
    store.pipe("/in/00000.tar", store.cat("/in/00010.tar"))
    with pytest.raises(ValueError, match=r"1 changed.*is not replaced"):
        make(source, "memory://sets/out")
