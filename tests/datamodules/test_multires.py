"""The DataModule on real shards: against the files themselves, and against itself on other numbers of ranks."""

import dataclasses
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.squares import Squares
from PIL import Image

from nami_lightning.cli.main import main
from nami_lightning.datamodules.aspect_buckets import Shape
from nami_lightning.datamodules.multi_resolution import MultiResolutionDataModule
from nami_lightning.datamodules.preparation.image_io import read_image
from nami_lightning.datamodules.preparation.prepare import prepare
from nami_lightning.datamodules.preparation.prepare_parts import Preparation
from nami_lightning.datamodules.step_dataset import StepLoader
from nami_lightning.datamodules.storage.dataset import Bucket, PreparedDataset
from nami_lightning.datamodules.storage.shards import Record
from nami_lightning.training.curriculum import Curriculum, Phase

TINY = Path(__file__).parents[1] / "tiny.yaml"
RESOLUTIONS = [8, 16, 32]
CURRICULUM = Curriculum([Phase(6, [4, 2, 1], 1e-3), Phase(6, [1, 2, 0], 1e-3), Phase(4, [0, 1, 4], 1e-4)], unit=4)
PREPARATION = Preparation(RESOLUTIONS, heldout_percent=20, aspect_step=2, format="png")
COUNT = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of many shapes, in buckets of 16 and 32 px and several aspect ratios."""
    return prepare(Squares(COUNT), tmp_path_factory.mktemp("squares") / "data", PREPARATION, workers=1)


def make_data(folder: Path, **settings: object) -> MultiResolutionDataModule:
    arguments = {"max_micro_batch": [8, 4, 2], "num_workers": 0} | settings
    return MultiResolutionDataModule(str(folder), RESOLUTIONS, CURRICULUM, **arguments)  # type: ignore[arg-type]


def stored(folder: Path, split: str = "train") -> dict[str, tuple[Bucket, Record]]:
    """id to its bucket and record."""
    found: dict[str, tuple[Bucket, Record]] = {}
    for bucket in PreparedDataset(folder).buckets(split):  # type: ignore[arg-type]
        records = [Record.from_item(item) for item in bucket.shards.read(range(len(bucket)))]
        found |= {record.id: (bucket, record) for record in records}
    return found


def test_a_step_is_micro_batches_of_one_stage_and_one_shape_coarsest_first(folder: Path) -> None:
    data = make_data(folder)
    batch = data.steps()[0]
    assert [(micro.stage, len(micro)) for micro in batch] == [(0, 8), (0, 8), (1, 4), (1, 4), (2, 2), (2, 2)]
    assert sorted(place for micro in batch for place in micro.global_indices) == list(range(28))
    assert [micro.stage for micro in data.steps()[12]] == [1, *[2] * 8]
    shapes: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set(), 2: set()}
    for step in range(len(data.steps())):
        of_step: dict[int, set[tuple[int, ...]]] = {}
        for micro in data.steps()[step]:
            of_step.setdefault(micro.stage, set()).add(tuple(micro.images.shape[1:]))
        for stage, found in of_step.items():
            assert len(found) == 1
            shapes[stage] |= found
    assert {(3, 8, 8), (3, 10, 6), (3, 6, 10)} <= shapes[0]
    assert {(3, 32, 32), (3, 40, 24), (3, 24, 40)} <= shapes[2]


def test_images_are_the_stored_files_reduced_by_cell_means(data_root: Path) -> None:
    folder = next(data_root.iterdir())
    files = stored(folder)
    for micro in make_data(folder).steps()[3]:
        side = RESOLUTIONS[micro.stage]
        for image, name, caption in zip(micro.images, micro.ids, micro.captions, strict=True):
            bucket, record = files[name]
            pixels = np.asarray(Image.open(io.BytesIO(record.image)).convert("RGB"), np.float64)
            factor = bucket.resolution // side
            expected = pixels.reshape(side, factor, side, factor, 3).mean((1, 3))
            assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 0.5 + 1e-9
            assert caption in record.captions


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_take_slices_of_the_same_global_batches(folder: Path, ranks: int) -> None:
    data = make_data(folder, max_micro_batch=[64, 64, 64])
    alone = data.steps()
    together = [data.steps(rank, ranks) for rank in range(ranks)]
    for step in range(len(alone)):
        parts = [steps[step] for steps in together]
        assert len({tuple((micro.stage, micro.images.shape[1:]) for micro in part) for part in parts}) == 1
        for which, micro in enumerate(alone[step]):
            assert [i for part in parts for i in part[which].ids] == micro.ids
            assert [p for part in parts for p in part[which].global_indices] == micro.global_indices
            assert [c for part in parts for c in part[which].captions] == micro.captions


def test_one_rank_then_two_then_one_give_the_batches_of_one(folder: Path) -> None:
    data = make_data(folder, max_micro_batch=[64, 64, 64])

    def ids(step: int, ranks: int) -> list[str]:
        batches = [data.steps(rank, ranks)[step] for rank in range(ranks)]
        return [name for which in zip(*batches, strict=True) for micro in which for name in micro.ids]

    uninterrupted = [ids(step, 1) for step in range(16)]
    assert [ids(step, 2 if 4 <= step < 11 else 1) for step in range(16)] == uninterrupted


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_each_sample_of_a_bucket_once_before_any_twice(folder: Path, stage: int) -> None:
    """In each stage's own stream through each bucket, whatever the lots."""
    steps = make_data(folder).steps()
    usable = {name: bucket for name, (bucket, _) in stored(folder).items() if bucket.resolution >= RESOLUTIONS[stage]}
    sizes = Counter(bucket.name for bucket in usable.values())
    streams: dict[str, list[str]] = {name: [] for name in sizes}
    for number in range(4 * COUNT):
        for name in steps.stage_batch(number, stage).ids:
            streams[usable[name].name].append(name)
    for bucket, size in sizes.items():
        for epoch in range(3):
            stream = streams[bucket][epoch * size : (epoch + 1) * size]
            assert sorted(stream) == sorted(name for name, of_name in usable.items() if of_name.name == bucket)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_goes_on_where_it_is_told(folder: Path, workers: int) -> None:
    steps = make_data(folder).steps()
    loader = StepLoader(steps, first=5, workers=workers, prefetch=2, pin_memory=False)
    assert len(loader) == 16
    batches = list(loader)
    assert [batch[0].step for batch in batches] == list(range(5, 16))
    assert all(a.ids == b.ids and torch.equal(a.images, b.images) for a, b in zip(batches[0], steps[5], strict=True))


def test_a_pooled_pyramid_draws_the_finest_images_for_every_stage(folder: Path) -> None:
    data = make_data(folder, latent_pyramid="pool")
    assert {micro.images.shape[-1] * micro.images.shape[-2] for micro in data.steps()[0]} <= {32 * 32, 24 * 40}
    heldout = data.heldout(8)
    assert all(min(heldout[i].images.shape[-2:]) >= 24 for i in range(len(heldout)))


def test_random_crops_are_windows_of_the_stored_image_and_move(tmp_path: Path) -> None:
    settings = dataclasses.replace(PREPARATION, resolutions=[32], aspect_step=None, crop="random")
    folder = prepare(Gradients(40, [(64, 33)]), tmp_path / "data", settings, workers=1)
    micro = make_data(folder).steps()[0][-1]
    lefts = micro.images[:, 0, 0, 0].tolist()
    assert len(set(lefts)) > 1
    for image, left in zip(micro.images, lefts, strict=True):
        steps = image[0, 0].int().diff()
        assert ((steps >= 3) & (steps <= 5)).all()
        assert left <= 4 * 31
    heldout = make_data(folder).heldout(8)[0]
    assert len(set(heldout.images[:, 0, 0, 0].tolist())) == 1


def test_a_stages_stream_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    """Chance too: here where the windows lie."""
    settings = dataclasses.replace(PREPARATION, resolutions=[32], aspect_step=None, crop="random")
    data = make_data(prepare(Gradients(40, [(64, 33)]), tmp_path / "data", settings, workers=1))
    for number in range(6):
        one = data.steps().stage_batch(number, 2)
        of_two = data.steps(number % 2, 2).stage_batch(number // 2, 2)
        assert (one.ids, one.global_indices) == (of_two.ids, of_two.global_indices)
        assert torch.equal(one.images, of_two.images)


class Gradients(Squares):
    """Their red rises by four a px from left to right."""

    def sample(self, number: int):  # type: ignore[no-untyped-def]
        width, height = self.sizes[number % len(self.sizes)]
        row = np.stack([np.arange(width) * 4 % 256, np.full(width, number), np.zeros(width)], 1).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.broadcast_to(row, (height, width, 3)).copy()).save(file, "PNG")
        return dataclasses.replace(super().sample(number), image=file.getvalue())


def test_heldout_is_the_same_on_any_number_of_ranks(data_root: Path) -> None:
    data = make_data(next(data_root.iterdir()))
    samples = sum(map(len, data.dataset.buckets("heldout"))) // 2 * 2

    def names(rank: int, ranks: int) -> list[tuple[int, str]]:
        heldout = data.heldout(samples, rank, ranks)
        return [(micro.stage, name) for i in range(len(heldout)) for micro in [heldout[i]] for name in micro.ids]

    halves = [names(rank, 2) for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(names(0, 1))
    assert [stage for stage, _ in halves[0]] == [stage for stage, _ in halves[1]]


def test_heldout_has_places_of_its_own_for_every_sample_of_a_stage(folder: Path) -> None:
    heldout = make_data(folder).heldout(20)
    for stage in range(3):
        micros = [heldout[i] for i in range(len(heldout)) if heldout[i].stage == stage]
        places = [place for micro in micros for place in micro.global_indices]
        assert sorted(places) == list(range(len(places)))
        assert len({name for micro in micros for name in micro.ids}) == len(places)


def test_train_and_heldout_share_no_group(data_root: Path) -> None:
    tones = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
    for folder in data_root.iterdir():
        train, heldout = (
            {"-".join(code for code in name.split("-") if code not in tones) for name in stored(folder, split)}
            for split in ("train", "heldout")
        )
        assert train
        assert heldout
        assert not train & heldout


def test_an_uneven_split_is_refused_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"stage 1: 16 samples a step can't be split evenly over 3 rank"):
        make_data(folder).steps(rank=0, ranks=3)
    with pytest.raises(ValueError, match="stage 2: 8 samples"):
        make_data(folder, max_micro_batch=[8, 3, 2]).steps()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [("max_micro_batch", [1, 2], "one number a stage"), ("max_micro_batch", [1, 0, 2], "positive")],
)
def test_settings_that_do_not_fit_are_refused(folder: Path, setting: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_data(folder, **{setting: value})


def test_folders_that_are_no_data_set_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make_data(tmp_path / "nowhere").steps()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no finished data set"):
        make_data(tmp_path / "empty").steps()
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    shutil.rmtree(half / "train" / "32")
    with pytest.raises(ValueError, match="holds 0 samples, but"):
        make_data(half).steps()
    (half / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match="prepare it first"):
        make_data(half).steps()
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    description = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(description | {"format": "nami-shards/0"}))
    with pytest.raises(ValueError, match="nami-shards/0"):
        make_data(other).steps()


def test_a_stage_without_images_and_resolutions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    settings = dataclasses.replace(PREPARATION, resolutions=[8], aspect_step=None)
    folder = prepare(Squares(), tmp_path / "coarse", settings, workers=1)
    with pytest.raises(ValueError, match=r"no bucket of 16 px or more holds an image .*8/8x8 \d+\)"):
        make_data(folder).steps()
    settings = dataclasses.replace(PREPARATION, resolutions=[20], aspect_step=None)
    folder = prepare(Squares(), tmp_path / "odd", settings, workers=1)
    with pytest.raises(ValueError, match="20 px are no multiple of a stage's 8 px"):
        make_data(folder).steps()


def test_an_image_that_is_too_small_is_refused() -> None:
    image = io.BytesIO()
    Image.new("RGB", (10, 10)).save(image, "PNG")
    with pytest.raises(ValueError, match="10x10"):
        read_image(image.getvalue(), Shape(8, 8), 2)


# --- collections of odd sizes --------------------------------------------------------------------


def one_stage(folder: Path, samples: int, steps: int = 8) -> MultiResolutionDataModule:
    """``samples`` of 16 px in a step."""
    curriculum = Curriculum([Phase(steps, [1], 1e-3)], unit=samples)
    return MultiResolutionDataModule(str(folder), [16], curriculum, [samples], num_workers=0)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six squares in one chunk."""
    settings = Preparation([16], heldout_percent=0, format="png")
    return prepare(Squares(6, [(20, 20)]), tmp_path_factory.mktemp("few") / "data", settings, workers=1)


def test_a_bucket_smaller_than_a_batch_is_gone_through_several_times(few: Path) -> None:
    counts: Counter[str] = Counter()
    for batch in (one_stage(few, 16).steps()[step] for step in range(3)):
        counts.update(batch[0].ids)
        assert len(batch[0]) == 16
        assert max(counts.values()) - min(counts.values()) <= 1
    assert counts == {str(number): 8 for number in range(6)}


def test_a_world_larger_than_the_chunks_reads_the_same(few: Path) -> None:
    alone = one_stage(few, 8).steps()
    world = [one_stage(few, 8).steps(rank, 8) for rank in range(8)]
    for step in range(8):
        assert [name for steps in world for name in steps[step][0].ids] == alone[step][0].ids


def test_an_empty_bucket_changes_nothing(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "data"))
    description = json.loads((other / "dataset.json").read_text())
    for of_split in description["samples"].values():
        of_split |= {"8/8x8": 0, "32/80x16": 0}
    (other / "dataset.json").write_text(json.dumps(description))
    steps, expected = make_data(other).steps(), make_data(folder).steps()
    assert [micro.ids for step in range(16) for micro in steps[step]] == [
        micro.ids for step in range(16) for micro in expected[step]
    ]


def test_a_stage_that_is_never_trained_needs_no_images(few: Path) -> None:
    curriculum = Curriculum([Phase(4, [2, 0], 1e-3)], unit=2)
    data = MultiResolutionDataModule(str(few), [16, 32], curriculum, [4, 4], num_workers=0)
    assert [micro.stage for step in range(4) for micro in data.steps()[step]] == [0] * 4


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00" * 100])
def test_a_description_that_is_not_json_is_refused(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=r"dataset.json is damaged: it is no description in JSON"):
        make_data(tmp_path).steps()


@pytest.mark.parametrize("ready", [False, True])
def test_shapes_that_are_no_whole_patches_are_refused(
    folder: Path, tmp_path: Path, ready: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a data set that is there, and of one that is still to be made."""
    arguments = ["run", str(TINY), "--output_dir", str(tmp_path)]
    if ready:
        arguments += ["--data.init_args.source", "null", "--data.init_args.folder", str(folder)]
    else:
        arguments += ["--data.init_args.folder", str(tmp_path / "made")]
        arguments += ["--data.init_args.preparation", "{resolutions: [8, 16, 32], aspect_step: 2}"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "aspect_step must be a multiple of 4 px, the patch size 4 times the autoencoder's factor 1" in error
    assert "at 8 px, stage 1's, the data set has images of 6x10, 10x6 px" in error
    assert not (tmp_path / "made").exists()
