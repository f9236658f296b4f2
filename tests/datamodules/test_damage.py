"""Training data that is damaged: an error that says where, or another sample in its place, the same for everybody."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.squares import Squares

from nami_lightning.datamodules.multi_resolution import MultiResolutionDataModule
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation
from nami_lightning.datamodules.step_dataset import HeldoutLoader, StepDataset, StepLoader
from nami_lightning.datamodules.storage.chunk_file import DamagedChunk, DamagedSample, DataError
from nami_lightning.datamodules.storage.dataset import Bucket, PreparedDataset
from nami_lightning.training.curriculum import Curriculum, Phase

STEPS = 60
CURRICULUM = Curriculum([Phase(STEPS, [1, 1], 1e-3)], unit=4)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred squares in ten chunks; some are held out."""
    settings = Preparation([8, 16], heldout_percent=20, format="png")
    return prepare(Squares(100, [(20, 20)]), tmp_path_factory.mktemp("squares") / "data", settings, workers=1)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "data"))


def make_data(folder: Path, damaged: str = "error", **settings: Any) -> MultiResolutionDataModule:
    arguments: dict[str, Any] = {"max_micro_batch": [4, 4], "num_workers": 0, "shuffle_window": 2} | settings
    return MultiResolutionDataModule(str(folder), [8, 16], CURRICULUM, damaged=damaged, **arguments)  # type: ignore[arg-type]


def train(folder: Path) -> Bucket:
    return PreparedDataset(folder).buckets("train")[0]


def damage_image(folder: Path, number: int) -> set[str]:
    """Make the ``number``-th image of the first chunk undecodable."""
    path = train(folder).shards.chunk_file(0)
    content = bytearray(path.read_bytes())
    begin = -1
    for _ in range(number + 1):
        begin = content.index(PNG, begin + 1)
    content[begin + 16 : begin + 40] = bytes(24)
    path.write_bytes(content)
    return {train(folder).shards.read([number])[0][0]}


def damage_chunk(folder: Path, number: int) -> set[str]:
    """Cut a chunk short."""
    shards = train(folder).shards
    first = sum(shards.chunk_sizes[:number])
    names = {name for name, *_ in shards.read(range(first, first + shards.chunk_sizes[number]))}
    path = shards.chunk_file(number)
    path.write_bytes(path.read_bytes()[:-10])
    return names


def remove_chunk(folder: Path, number: int) -> set[str]:
    names = damage_chunk(folder, number)
    train(folder).shards.chunk_file(number).unlink()
    return names


DAMAGES = [damage_image, damage_chunk, remove_chunk]


def ids(steps: StepDataset, step: int) -> list[str]:
    return [name for micro in steps[step] for name in micro.ids]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_an_error_that_names_the_file(
    folder: Path, damage: Callable[[Path, int], set[str]], workers: int
) -> None:
    names = damage(folder, 1)
    loader = StepLoader(make_data(folder).steps(), 0, workers, 2, pin_memory=False)
    with pytest.raises(DamagedChunk, match=r"train/16/16x16/\S+.bin is damaged: ") as caught:
        list(loader)
    if damage is damage_image:
        assert isinstance(caught.value, DamagedSample)
        assert f"(sample '{names.pop()}') can't be decoded: " in str(caught.value)


def test_damage_of_held_out_samples_is_an_error_that_names_the_file(folder: Path) -> None:
    shards = PreparedDataset(folder).buckets("heldout")[0].shards
    shards.chunk_file(0).unlink()
    with pytest.raises(DamagedChunk, match=r"heldout/8/8x8/\S+.bin is damaged: |heldout/16/16x16/\S+.bin is damaged: "):
        list(HeldoutLoader(make_data(folder).heldout(8), 2, 1, pin_memory=False))


@pytest.mark.parametrize("damage", DAMAGES)
def test_others_stand_in_for_damaged_samples_wherever_they_are_read(
    whole: Path, folder: Path, damage: Callable[[Path, int], set[str]]
) -> None:
    names = damage(folder, 1)
    undamaged, alone = make_data(whole).steps(), make_data(folder, "skip").steps()
    two = [make_data(folder, "skip", max_micro_batch=[2, 2]).steps(rank, 2) for rank in range(2)]
    met, order = set(), make_data(whole).steps().orders[0]
    stream = [name for name, *_ in train(whole).shards.read(order(0, 5 * order.size))]
    for step in range(STEPS):
        expected, got = ids(undamaged, step), ids(alone, step)
        assert got == [
            name if name not in names else next(other for other in stream[ref.position :] if other not in names)
            for stage in (0, 1)
            for name, ref in zip(expected[4 * stage :], alone.sample_refs(stage, step)[1], strict=False)
        ]
        parts = [steps[step] for steps in two]
        assert got == [name for both in zip(*parts, strict=True) for micro in both for name in micro.ids]
        replaced = sum(name in names for name in expected)
        assert sum(len(micro.damaged) for micro in alone[step]) == replaced
        met |= names & set(expected)
    assert met == names


def test_skipping_changes_nothing_where_nothing_is_damaged(whole: Path) -> None:
    plain, skipping = make_data(whole).steps(), make_data(whole, "skip").steps()
    for step in range(20):
        for a, b in zip(plain[step], skipping[step], strict=True):
            assert (a.ids, a.captions, b.damaged) == (b.ids, b.captions, [])
            assert torch.equal(a.images, b.images)


def test_the_loader_counts_what_was_skipped_and_names_it_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (name,) = damage_image(folder, 0)
    loader = StepLoader(make_data(folder, "skip").steps(), 0, 2, 2, pin_memory=False)
    times = sum(len(micro.damaged) for batch in loader for micro in batch)
    assert loader.damaged == times > 1
    messages = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 1
    assert f"sample '{name}'" in messages[0]


def test_a_bucket_without_a_readable_sample_is_an_error(folder: Path) -> None:
    shutil.rmtree(folder / "train" / "16" / "16x16", ignore_errors=True)
    (folder / "train" / "16" / "16x16").mkdir(parents=True)
    whole_index = {"chunks": [{"filename": "a.bin", "chunk_size": 3, "chunk_bytes": 99}], "config": {}}
    (folder / "train" / "16" / "16x16" / "index.json").write_text(json.dumps(whole_index))
    description = json.loads((folder / "dataset.json").read_text())
    description["samples"]["train"]["16/16x16"] = 3
    (folder / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"a.bin is damaged.* No other sample of its bucket can be read"):
        make_data(folder, "skip").steps()[0]


def test_damaged_held_out_samples_are_skipped_too(folder: Path) -> None:
    bucket = PreparedDataset(folder).buckets("heldout")[0]
    path = bucket.shards.chunk_file(0)
    names = {name for name, *_ in bucket.shards.read(range(bucket.shards.chunk_sizes[0]))}
    path.write_bytes(b"")
    with pytest.raises(DamagedChunk):
        list(make_data(folder).heldout(8))  # type: ignore[call-overload]
    heldout = make_data(folder, "skip").heldout(8)
    micros = [heldout[number] for number in range(len(heldout))]
    assert {len(micro) for micro in micros} == {4}
    assert not names & {name for micro in micros for name in micro.ids}
