"""The hash of a local encoder: the same for all ranks, read once, and read again when a file changes."""

import multiprocessing
import os
import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import pytest

from nami_lightning.models import encoder_revisions
from nami_lightning.models.encoder_revisions import revision_of


def expected_hash(folder: Path) -> str:
    total = blake2b(digest_size=16)
    for name in ("config.json", "model.safetensors"):
        total.update(name.encode() + b"\0" + blake2b((folder / name).read_bytes(), digest_size=16).digest())
    return total.hexdigest()


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "README.md").write_text("not a file of the model")
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """How many times contents were hashed since the last call, in all processes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(encoder_revisions, "REMEMBERED_FROM", 0)
    sound, log = encoder_revisions._hash_contents, tmp_path / "reads"

    def hash_and_log(files: list[Path]) -> str:
        with log.open("a") as file:
            file.write(".")
        return sound(files)

    def count() -> int:
        number = len(log.read_text()) if log.exists() else 0
        log.write_text("")
        return number

    monkeypatch.setattr(encoder_revisions, "_hash_contents", hash_and_log)
    return count


def test_ranks_that_start_together_read_a_folder_once(encoder: Path, reads: Callable[[], int], tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as ranks:
        assert set(ranks.map(revision_of, [str(encoder)] * 8)) == {expected_hash(encoder)}
        ranks.close()  # not ended by SIGTERM, which a fork may have learnt to ignore in an earlier test
        ranks.join()
    assert reads() == 1
    moved = encoder.rename(tmp_path / "moved")
    assert revision_of(str(moved)) == expected_hash(moved)
    assert reads() == 1


def test_a_file_that_changes_is_read_again_even_if_its_size_and_time_are_the_same(
    encoder: Path, reads: Callable[[], int]
) -> None:
    before = revision_of(str(encoder))
    weights = encoder / "model.safetensors"
    time = weights.stat().st_mtime_ns
    weights.write_bytes(bytes(999) + b"1")
    os.utime(weights, ns=(time, time))
    assert revision_of(str(encoder)) == expected_hash(encoder) != before
    assert reads() == 2


def test_a_half_written_entry_or_no_cache_at_all_only_costs_time(
    encoder: Path, reads: Callable[[], int], tmp_path: Path
) -> None:
    revision_of(str(encoder))
    (entry,) = (tmp_path / "cache" / "nami_lightning" / "encoder_hashes").iterdir()
    entry.write_text("half")
    assert revision_of(str(encoder)) == expected_hash(encoder) == entry.read_text()
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    assert revision_of(str(encoder)) == expected_hash(encoder)
    assert reads() == 3
