"""Data sets in a store that speaks S3, behind a cache smaller than they are, against the same on a local disk."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Value
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers.squares import Squares
from moto.server import ThreadedMotoServer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nami_lightning.cli.main import main
from nami_lightning.datamodules.multi_resolution import MultiResolutionDataModule
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation
from nami_lightning.datamodules.step_dataset import StepDataset, StepLoader
from nami_lightning.datamodules.storage import remote as remote_module
from nami_lightning.datamodules.storage.chunk_cache import CacheSettings
from nami_lightning.datamodules.storage.chunk_file import DamagedChunk
from nami_lightning.datamodules.storage.dataset import PreparedDataset
from nami_lightning.datamodules.storage.prefetch import TRAINING, bytes_needed
from nami_lightning.datamodules.storage.remote import FetchFailed, Remote
from nami_lightning.training.curriculum import Curriculum, Phase

TINY = Path(__file__).parents[1] / "tiny.yaml"
RESOLUTIONS = [16, 32]
STEPS = 300
CURRICULUM = Curriculum([Phase(STEPS, [1, 1], 1e-3)], unit=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two buckets of forty chunks each, and some held-out samples."""
    settings = Preparation(RESOLUTIONS, heldout_percent=3, format="png")
    squares = Squares(400, sizes=[(40, 40), (20, 20), (40, 40)])
    return prepare(squares, tmp_path_factory.mktemp("squares") / "data", settings, workers=1)


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    """A store on this machine."""
    access = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        for name, value in (access | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}"}).items():
            patch.setenv(name, value)
        store = fsspec.filesystem("s3")
        store.mkdir("bucket")
        yield store
        server.stop()


@pytest.fixture(scope="module")
def url(store: Any, folder: Path) -> str:
    """The same data set in the store."""
    store.put(str(folder), "bucket/sets/squares", recursive=True)
    return "s3://bucket/sets/squares"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bytes of chunks that were fetched, by any process."""
    count = Value("q", 0)
    download = Remote.download

    def counting(self: Remote, file: str, target: Path, size: int, *others: Any) -> None:
        download(self, file, target, size, *others)
        with count.get_lock():
            count.value += target.stat().st_size

    monkeypatch.setattr(Remote, "download", counting)
    return count


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again at once."""
    monkeypatch.setattr(remote_module, "DELAYS", (0.0, 0.0))


def make_data(folder: str | Path, cache: Path | None = None, size: object = "1MB", **settings: object) -> Any:
    arguments = {"max_micro_batch": [2, 2], "num_workers": 0, "shuffle_window": 2, "validation_samples": 2} | settings
    arguments["cache"] = CacheSettings(str(cache), str(size))
    return MultiResolutionDataModule(str(folder), RESOLUTIONS, CURRICULUM, **arguments)  # type: ignore[arg-type]


def needed_by(data: Any) -> int:
    """The smallest cache that it takes."""
    return bytes_needed(data.steps(), data.heldout(2).chunks())


def ids(*ranks: StepDataset, step: int) -> list[list[str]]:
    """Of each stage's samples in a global batch."""
    batches = zip(*(steps[step] for steps in ranks), strict=True)
    return [[name for micro in of_stage for name in micro.ids] for of_stage in batches]


def kept(cache: Path) -> int:
    """Bytes of chunks in a cache."""
    sizes = 0
    for path in cache.rglob("*.bin"):
        with suppress(FileNotFoundError):  # removed meanwhile
            sizes += path.stat().st_size
    return sizes


def bytes_read(steps: StepDataset, count: int) -> float:
    """Bytes of the epochs, or parts of them, that all cursors go through in the first ``count`` steps."""
    refs = [ref for step in range(count) for stage in range(2) for ref in steps.sample_refs(stage, step)[1]]
    buckets = [steps.images.buckets[ref.bucket] for ref in refs]
    return sum(sum(bucket.shards.chunk_bytes) / len(bucket) for bucket in buckets)


def test_one_two_and_one_ranks_read_from_a_small_cache_what_one_reads_from_a_disk(
    folder: Path, url: str, tmp_path: Path, fetched: Any
) -> None:
    local = make_data(folder).steps()
    needed = needed_by(make_data(url, tmp_path))
    everything = sum(sum(bucket.shards.chunk_bytes) for bucket in local.images.buckets)
    assert needed < everything / 3
    for first, last, ranks in ((0, 110, 1), (110, 220, 2), (220, STEPS, 1)):
        caches = [make_data(url, tmp_path / "cache", needed) for _ in range(ranks)]
        parts = [data.steps(rank, ranks) for rank, data in enumerate(caches)]
        for step in range(first, last):
            assert ids(*parts, step=step) == ids(local, step=step)
            assert kept(tmp_path / "cache") <= needed
        for data in caches:  # as a process does at its end
            data.dataset.cache.hold(TRAINING, [])
    assert bytes_read(local, STEPS) > 3 * everything
    assert fetched.value <= 1.1 * bytes_read(local, STEPS)


def test_workers_of_two_ranks_fetch_a_cursors_epoch_once(folder: Path, url: str, tmp_path: Path, fetched: Any) -> None:
    """One stage, so that what is fetched is the data, epoch after epoch."""
    curriculum = Curriculum([Phase(100, [0, 2], 1e-3)], unit=2)
    local, needed = (make_data(where, tmp_path, num_workers=2, prefetch_factor=1) for where in (folder, url))
    local.curriculum = needed.curriculum = curriculum
    everything = sum(local.steps().images.buckets[1].shards.chunk_bytes)
    limit = needed_by(needed)
    assert limit < 0.8 * everything
    loaders = []
    for rank in range(2):
        data = make_data(url, tmp_path / "cache", limit, num_workers=2, prefetch_factor=1)
        data.curriculum = curriculum
        loaders.append(iter(StepLoader(data.steps(rank, 2), 0, 2, 1, pin_memory=False)))
    steps = local.steps()
    for step, parts in enumerate(zip(*loaders, strict=True)):
        assert [name for part in parts for micro in part for name in micro.ids] == ids(steps, step=step)[0] + ids(
            steps, step=step
        )[1]
    assert step == 99
    assert fetched.value <= 1.1 * bytes_read(steps, 100)


def test_the_next_windows_are_fetched_before_they_are_read(url: str, tmp_path: Path) -> None:
    """After a step of two samples a stage: of each bucket two windows of two chunks, for both stages alike."""
    data = make_data(url, tmp_path)
    steps = data.steps()
    steps[0]
    wanted = set(steps.chunks_ahead(0))
    assert len(wanted) == 8
    deadline = monotonic() + 60
    while not all((data.dataset.folder / name).exists() for name in wanted):
        assert monotonic() < deadline
        sleep(0.05)


def test_a_chunk_that_is_held_stays_until_its_process_dies(url: str, tmp_path: Path) -> None:
    dataset = PreparedDataset(url, CacheSettings(str(tmp_path), "1GB"))
    bucket = next(bucket for bucket in dataset.buckets("train") if bucket.resolution == 32)
    names = [bucket.shards.chunk_name(number) for number in range(40)]
    room = f"{2 * max(bucket.shards.chunk_bytes)}B"

    def read(numbers: list[int]) -> None:
        shards = PreparedDataset(url, CacheSettings(str(tmp_path), room)).buckets("train")[1].shards
        shards.read([sum(shards.chunk_sizes[:number]) for number in numbers])

    ready, done = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        assert dataset.cache is not None
        dataset.cache.hold("test", names[:1])
        bucket.shards.read([0])
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(1)
    os.read(ready[0], 1)
    kept = dataset.folder / names[0]
    read(list(range(1, 8)))
    assert kept.exists()
    os.kill(child, 9)
    os.waitpid(child, 0)
    read(list(range(1, 8)))
    assert not kept.exists()
    assert len(list(tmp_path.rglob("*.bin"))) <= 3
    assert not list(tmp_path.rglob("*.partial"))


def test_a_cache_that_is_too_small_is_refused_with_what_it_needs(url: str, tmp_path: Path) -> None:
    needed = needed_by(make_data(url, tmp_path))
    assert make_data(url, tmp_path, needed).steps()
    with pytest.raises(ValueError, match=rf"data.cache.max_size is {needed - 1}, but .* need {needed:,} bytes"):
        make_data(url, tmp_path, needed - 1).steps()


@pytest.mark.parametrize(("text", "size"), [("50GB", 50 * 10**9), ("1.5 GiB", 3 * 2**29), ("7", 7), ("2kB", 2000)])
def test_sizes(text: str, size: int) -> None:
    assert CacheSettings(max_size=text).limit == size


@pytest.mark.parametrize("text", ["", "many", "-1GB", "1XB", "0"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"cache\.max_size"):
        CacheSettings(max_size=text)


# --- what goes wrong on the way ------------------------------------------------------------------


class Flaky(MemoryFileSystem):
    """A store whose connection breaks ``failures`` times, or whose files come broken."""

    protocol = "flaky"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("flaky:/")))

    failures = 0
    broken = 0
    tries = 0

    def get_file(self, rpath: str, lpath: str, *others: Any, **options: Any) -> None:
        Flaky.tries += 1
        super().get_file(rpath, lpath, *others, **options)
        if Flaky.failures:
            Flaky.failures -= 1
            Path(lpath).write_bytes(b"half")
            raise ConnectionResetError("the line is dead")
        if Flaky.broken:
            Flaky.broken -= 1
            content = bytearray(Path(lpath).read_bytes())
            content[-1] ^= 1
            Path(lpath).write_bytes(content)


@pytest.fixture
def flaky(folder: Path, impatient: None) -> Iterator[str]:
    """The data set in such a store."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    store = fsspec.filesystem("flaky")
    store.put(str(folder), "/squares", recursive=True)
    Flaky.failures = Flaky.broken = Flaky.tries = 0
    yield "flaky://squares"
    store.rm("/squares", recursive=True)
    Flaky.failures = Flaky.broken = 0


@pytest.mark.parametrize("fault", ["failures", "broken"])
def test_a_transfer_that_fails_is_tried_again(
    folder: Path, flaky: str, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    shards = PreparedDataset(flaky, CacheSettings(str(tmp_path))).buckets("train")[0].shards
    setattr(Flaky, fault, 2)
    assert shards.read([0]) == PreparedDataset(folder).buckets("train")[0].shards.read([0])
    assert Flaky.tries == 3
    assert sum("trying again" in record.message for record in caplog.records) == 2


def test_a_store_that_cannot_be_reached_is_an_error_that_names_the_file(flaky: str, tmp_path: Path) -> None:
    shards = PreparedDataset(flaky, CacheSettings(str(tmp_path))).buckets("train")[0].shards
    Flaky.failures = 100
    with pytest.raises(
        FetchFailed, match=r"flaky://squares/train/16/\S+.bin can't be fetched: .*line is dead.* 3 tries"
    ):
        shards.read([0])
    assert not list(tmp_path.rglob("*.partial"))
    Flaky.failures = 0
    assert shards.read([0])


def test_a_damaged_or_missing_remote_chunk_names_its_url(flaky: str, tmp_path: Path) -> None:
    shards = PreparedDataset(flaky, CacheSettings(str(tmp_path))).buckets("train")[0].shards
    Flaky.broken = 100
    with pytest.raises(DamagedChunk, match=r"flaky://\S+.bin is damaged: its checksum"):
        shards.read([0])
    store = fsspec.filesystem("flaky")
    store.rm(f"/squares/{shards.chunk_name(1)}")
    tries = Flaky.tries
    with pytest.raises(DamagedChunk, match=r"flaky://\S+.bin is damaged: it is missing"):
        shards.read([shards.chunk_sizes[0]])
    assert Flaky.tries == tries + 1


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("s3://bucket/nothing", "s3://bucket/nothing holds no finished data set"),
        ("s3://nobucket/nothing", "s3://nobucket/nothing holds no finished data set"),
        ("foo://bucket/nothing", "foo://bucket/nothing/dataset.json can't be fetched: Protocol not known: foo"),
    ],
)
def test_urls_without_a_data_set_are_refused(store: Any, tmp_path: Path, where: str, message: str) -> None:
    with pytest.raises((FileNotFoundError, FetchFailed), match=message):
        make_data(where, tmp_path).steps()


def test_any_url_that_fsspec_reads_will_do(folder: Path, tmp_path: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        there = PreparedDataset(f"http://127.0.0.1:{server.server_port}/", CacheSettings(str(tmp_path)))
        here = PreparedDataset(folder)
        for bucket, local in zip(there.buckets("train"), here.buckets("train"), strict=True):
            assert bucket.shards.read(range(9)) == local.shards.read(range(9))
        server.shutdown()


def test_a_source_is_not_prepared_into_a_store() -> None:
    with pytest.raises(ValueError, match="is remote, and data sets are made on a disk"):
        make_data("s3://bucket/data", source=Squares())


def test_a_data_set_that_was_made_anew_is_another_one(folder: Path, store: Any, tmp_path: Path) -> None:
    """Its old chunks, which have the same names, are not taken for the new ones."""
    names = []
    for first in (0, 1000):
        settings = Preparation([16], heldout_percent=0, format="png")
        made = prepare(Shifted(first), tmp_path / str(first), settings, workers=1)
        store.put(f"{made}/", "bucket/sets/again/", recursive=True)
        shards = PreparedDataset("s3://bucket/sets/again", CacheSettings(str(tmp_path))).buckets("train")[0].shards
        names.append([name for name, *_ in shards.read(range(len(shards)))])
    assert names == [[str(first + number) for number in range(10)] for first in (0, 1000)]


class Shifted(Squares):
    """Ten squares with other names."""

    def __init__(self, first: int) -> None:
        super().__init__(10, [(20, 20)])
        self.first = first

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"first": self.first}

    def sample(self, number: int) -> Any:
        return super().sample(self.first + number)


def test_show_prints_what_a_remote_data_set_is_and_verify_says_what_to_do(
    folder: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["data", "show", url]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(url)
    assert "16x16" in printed
    assert f"in {len(list(folder.rglob('*.bin')))} chunks" in printed
    assert "copy it to a disk" in printed
    assert not list(tmp_path.rglob("*.bin"))
    assert main(["data", "verify", url]) == 2
    assert f"{url} is remote" in capsys.readouterr().err


def test_a_run_trains_from_the_store_as_from_a_disk(folder: Path, store: Any, tmp_path: Path) -> None:
    """Bridges, training and validation, with a chunk missing in both places."""
    local = Path(shutil.copytree(folder, tmp_path / "squares"))
    PreparedDataset(local).buckets("train")[0].shards.chunk_file(3).unlink()
    where = "bucket/sets/missing"
    store.put(f"{local}/", f"{where}/", recursive=True)
    settings = ["--data.init_args.source", "null", "--data.init_args.damaged", "skip", "--output_dir", str(tmp_path)]
    settings += ["--data.init_args.num_workers", "2", "--data.init_args.prefetch_factor", "2"]
    settings += ["--data.init_args.cache", f"{{folder: {tmp_path / 'cache'}, max_size: 1MB}}"]
    settings += ["--curriculum.phases", "[{steps: 20, ratio: [2, 2, 1], learning_rate: 0.001}]"]
    for name, data in (("disk", str(local)), ("store", f"s3://{where}")):
        assert main(["run", str(TINY), *settings, "--name", name, "--data.init_args.folder", data]) == 0
    disk, remote = (scalars(tmp_path / name) for name in ("disk", "store"))
    compared = [name for name in disk if name.startswith(("train/", "val/", "data/"))]
    assert {"train/loss", "val/loss_stage3", "data/damaged"} <= set(compared)
    assert {name: remote[name] for name in compared} == {name: disk[name] for name in compared}
    assert max(disk["data/damaged"]) > 0


def scalars(run: Path) -> dict[str, list[float]]:
    """All that a run logged."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
