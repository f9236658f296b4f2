"""Data sets in a store that speaks S3, behind a cache smaller than they are, against the same on a local disk."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing import Value
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer
from squares import Squares

from nami_lightning.curriculum import Curriculum, Phase
from nami_lightning.datamodules import remote as remote_module
from nami_lightning.datamodules.ahead import RemoteStepDataset, bytes_needed
from nami_lightning.datamodules.cache import CacheSettings, ChunkCache
from nami_lightning.datamodules.chunks import DamagedChunk
from nami_lightning.datamodules.dataset import PreparedDataset
from nami_lightning.datamodules.multires import MultiResolutionDataModule
from nami_lightning.datamodules.parts import Preparation
from nami_lightning.datamodules.prepare import prepare
from nami_lightning.datamodules.remote import FetchFailed, Remote
from nami_lightning.datamodules.stream import StepDataset, StepLoader

RESOLUTIONS = [16, 32]
STEPS = 400
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


def ids(*ranks: StepDataset, step: int) -> list[list[str]]:
    """Of each stage's samples in a global batch."""
    batches = zip(*(steps[step] for steps in ranks), strict=True)
    return [[name for micro in of_stage for name in micro.ids] for of_stage in batches]


def kept(cache: Path) -> int:
    """Bytes of chunks in a cache, whole or claimed."""
    return sum(path.stat().st_size for path in cache.rglob("*.bin"))


def bytes_read(steps: StepDataset, count: int) -> float:
    """Bytes of the epochs, or parts of them, that all cursors go through in the first ``count`` steps."""
    buckets = steps.images.buckets
    of_stages = [
        steps.images.read([place])[0] and (stage, place.bucket)
        for step in range(count)
        for stage in range(2)
        for place in steps.lot(stage, step)[1]
    ]
    return sum(
        times / len(buckets[bucket]) * sum(buckets[bucket].shards.chunk_bytes)
        for (_, bucket), times in Counter(of_stages).items()
    )


def test_one_two_and_one_ranks_read_from_a_small_cache_what_one_reads_from_a_disk(
    folder: Path, url: str, tmp_path: Path, fetched: Any
) -> None:
    local = make_data(folder).steps()
    needed = bytes_needed(make_data(url, tmp_path).steps(), [])
    everything = sum(sum(bucket.shards.chunk_bytes) for bucket in local.images.buckets)
    limit = needed + 3000
    assert limit < everything / 2
    alone = make_data(url, tmp_path / "cache", limit).steps()
    two = [make_data(url, tmp_path / "cache", limit).steps(rank, 2) for rank in range(2)]
    for step in range(STEPS):
        ranks = two if 130 <= step < 260 else [alone]
        assert ids(*ranks, step=step) == ids(local, step=step)
        assert kept(tmp_path / "cache") <= limit
    assert bytes_read(local, STEPS) > 4 * everything
    assert fetched.value <= 1.1 * bytes_read(local, STEPS)
