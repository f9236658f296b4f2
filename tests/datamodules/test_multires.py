"""The DataModule on real shards: against the files themselves, and against itself on other numbers of ranks."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nami_lightning.curriculum import Curriculum, Phase
from nami_lightning.datamodules.multires import MultiResolutionDataModule, StepLoader
from nami_lightning.datamodules.prepare import open_buckets
from nami_lightning.datamodules.shards import Bucket, BucketWriter, Record, decode_image

RESOLUTIONS = [8, 16, 32]
CURRICULUM = Curriculum([Phase(6, [4, 2, 1], 1e-3), Phase(6, [1, 2, 0], 1e-3), Phase(4, [0, 1, 4], 1e-4)], unit=4)


@pytest.fixture
def folder(data_root: Path) -> Path:
    return next(data_root.iterdir())


def make_data(folder: Path, **settings: object) -> MultiResolutionDataModule:
    arguments = {"max_micro_batch": [8, 4, 2], "num_workers": 0} | settings
    return MultiResolutionDataModule(str(folder), RESOLUTIONS, CURRICULUM, **arguments)  # type: ignore[arg-type]


def test_a_step_is_micro_batches_of_one_stage_coarsest_first(folder: Path) -> None:
    batch = make_data(folder).steps()[0]
    assert [(micro.stage, len(micro)) for micro in batch] == [(0, 8), (0, 8), (1, 4), (1, 4), (2, 2), (2, 2)]
    assert [micro.images.shape[-1] for micro in batch] == [8, 8, 16, 16, 32, 32]
    assert sorted(place for micro in batch for place in micro.places) == list(range(28))
    assert [micro.stage for micro in make_data(folder).steps()[12]] == [1, *[2] * 8]


def test_images_are_the_stored_files_reduced_by_cell_means(folder: Path) -> None:
    buckets = {r: open_buckets(folder, "train", [r])[0] for r in RESOLUTIONS}
    stored = {r: {record.id: record for record in bucket.read(range(len(bucket)))} for r, bucket in buckets.items()}
    for micro in make_data(folder).steps()[3]:
        side = RESOLUTIONS[micro.stage]
        for image, name, caption in zip(micro.images, micro.ids, micro.captions, strict=True):
            candidates = []
            for resolution in (r for r in RESOLUTIONS if r >= side):
                pixels = np.asarray(Image.open(io.BytesIO(stored[resolution][name].image)).convert("RGB"), np.float64)
                factor = resolution // side
                candidates.append(pixels.reshape(side, factor, side, factor, 3).mean((1, 3)))
            found = image.permute(1, 2, 0).numpy()
            assert min(np.abs(found - candidate).max() for candidate in candidates) <= 0.5 + 1e-9
            assert caption in stored[side][name].captions


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_take_slices_of_the_same_global_batches(folder: Path, ranks: int) -> None:
    data = make_data(folder, max_micro_batch=[64, 64, 64])
    alone = data.steps()
    together = [data.steps(rank, ranks) for rank in range(ranks)]
    for step in range(len(alone)):
        parts = [steps[step] for steps in together]
        assert len({tuple(micro.stage for micro in part) for part in parts}) == 1
        for which, micro in enumerate(alone[step]):
            assert [i for part in parts for i in part[which].ids] == micro.ids
            assert [p for part in parts for p in part[which].places] == micro.places
            assert [c for part in parts for c in part[which].captions] == micro.captions


def test_each_sample_exactly_once_an_epoch_of_a_stage(folder: Path) -> None:
    steps = make_data(folder).steps()
    size = len(steps.buckets[2])
    stream = [index for step in range(len(steps)) for micro in steps[step] if micro.stage == 2 for index in micro.ids]
    while len(stream) < size:
        stream += steps.stage_batch(len(stream) // 2, 2).ids
    assert set(Counter(stream[:size]).values()) == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_goes_on_where_it_is_told(folder: Path, workers: int) -> None:
    steps = make_data(folder).steps()
    loader = StepLoader(steps, first=5, workers=workers, prefetch=2, pin_memory=False)
    assert len(loader) == 16
    batches = list(loader)
    assert [batch[0].step for batch in batches] == list(range(5, 16))
    assert all(a.ids == b.ids and torch.equal(a.images, b.images) for a, b in zip(batches[0], steps[5], strict=True))


def test_a_pooled_pyramid_draws_the_finest_images_for_every_stage(folder: Path) -> None:
    batch = make_data(folder, latent_pyramid="pool").steps()[0]
    assert {micro.images.shape[-1] for micro in batch} == {32}


def test_heldout_is_the_same_on_any_number_of_ranks(folder: Path) -> None:
    data = make_data(folder)
    samples = len(open_buckets(folder, "heldout", [32])[0]) // 2 * 2

    def names(rank: int, ranks: int) -> list[tuple[int, str]]:
        heldout = data.heldout(samples, rank, ranks)
        return [(micro.stage, name) for i in range(len(heldout)) for micro in [heldout[i]] for name in micro.ids]

    halves = [names(rank, 2) for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(names(0, 1))
    assert [stage for stage, _ in halves[0]] == [stage for stage, _ in halves[1]]


def test_train_and_heldout_share_no_group(folder: Path) -> None:
    tones = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
    train, heldout = (
        {"-".join(c for c in r.id.split("-") if c not in tones) for r in bucket.read(range(len(bucket)))}
        for bucket in (open_buckets(folder, split, [32])[0] for split in ("train", "heldout"))
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
    shutil.rmtree(half / "train" / "16")
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
    with pytest.raises(ValueError, match="no bucket for \\[64\\]"):
        open_buckets(folder, "train", [32, 64])


def test_a_stage_without_images_is_refused(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    counts: dict[str, dict[str, int]] = {}
    for split in ("train", "heldout"):
        for resolution in RESOLUTIONS:
            records = [Record(str(i), image.getvalue(), ["x"]) for i in range(30)] if resolution == 8 else []
            writer = BucketWriter(tmp_path / split / str(resolution))
            for record in records:
                writer.write(record)
            writer.close()
            counts.setdefault(split, {})[str(resolution)] = writer.count
    (tmp_path / "dataset.json").write_text(json.dumps({"format": "nami-shards/1", "samples": counts}))
    with pytest.raises(ValueError, match=r"no bucket of 16 px or more holds an image .*8 px 30, 16 px 0, 32 px 0"):
        make_data(tmp_path).steps()


def test_a_damaged_chunk_names_its_folder(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "train" / "32", damaged)
    for chunk in damaged.glob("*.bin"):
        chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(RuntimeError, match=r"damaged.*prepare this data set again"):
        Bucket(damaged).read([0, 1])


def test_an_image_of_another_size_is_refused() -> None:
    image = io.BytesIO()
    Image.new("RGB", (10, 10)).save(image, "PNG")
    with pytest.raises(ValueError, match="10x10"):
        decode_image(image.getvalue(), 8)
