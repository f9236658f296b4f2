"""How much the workers of a rank read ahead: bounded by bytes, which are those of real steps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nami_lightning.cli.plan import bytes_read_ahead, planned_encodings
from nami_lightning.datamodules import MultiResolutionDataModule
from nami_lightning.datamodules.precomputed.records import Layout
from nami_lightning.datamodules.read_ahead import ReadAhead, largest_step, plan_read_ahead
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.curriculum import Curriculum, Phase

TINY = Path(__file__).parents[1] / "tiny.yaml"


@pytest.mark.parametrize(
    ("step", "limit", "expected"),
    [
        (10, 1000, (8, 4)),  # all that was asked for
        (10, 200, (8, 2)),
        (10, 95, (8, 1)),
        (10, 60, (6, 1)),
        (100, 60, (1, 1)),  # one step is always read ahead
    ],
)
def test_steps_ahead_stay_below_the_limit(step: int, limit: int, expected: tuple[int, int]) -> None:
    ahead = plan_read_ahead(step, limit, workers=8, prefetch_factor=4)
    assert (ahead.workers, ahead.steps) == expected
    assert ahead.total == step * expected[0] * expected[1]
    assert ahead.total <= max(limit, step)
    assert plan_read_ahead(step, limit, 0, 4) == ReadAhead(0, 4, step)


def test_the_paper_recipes_steps_on_eight_gpus_are_bounded() -> None:
    ratios = [4, 2, 1], [2, 4, 1], [1, 2, 4]
    curriculum = Curriculum([Phase(1, ratio, 1e-4) for ratio in ratios], unit=128)
    step = largest_step(curriculum, 8, lambda stage: 3 * (256 << stage) ** 2)
    assert 8 * 8 * 4 * step / 2**30 == pytest.approx(54.75, abs=0.01)  # eight ranks of eight workers, four steps each
    assert 8 * plan_read_ahead(step, 2 * 10**9, 8, 4).total / 2**30 == pytest.approx(13.7, abs=0.1)


def make(folder: Path, *settings: str) -> MultiResolutionDataModule:
    data = Recipe(TINY, ["--data.init_args.folder", str(folder), *settings]).make_data()
    assert isinstance(data, MultiResolutionDataModule)
    return data


def test_a_step_takes_as_many_bytes_as_are_counted(data_root: Path) -> None:
    data = make(data_root)
    steps = data.steps(ranks=2)
    largest = max(sum(micro.images.nbytes for micro in steps[number]) for number in (0, 20, 40))
    assert data.read_ahead(2, steps.images.sample_bytes).step_bytes == largest
    heldout = data.heldout(64)
    validated = max(heldout[number].images.nbytes for number in range(len(heldout)))
    assert data.read_ahead_in_validation(2, steps.images.sample_bytes).step_bytes == validated
    assert bytes_read_ahead(data, 2, None) == largest * 1 * 4 + validated  # one worker, four steps, and one micro-batch


@pytest.mark.parametrize("pyramid", ["encode", "pool"])
def test_encodings_take_as_many_bytes_as_are_counted(pyramid: str) -> None:
    layout = Layout([16, 32], pyramid, False, factor=2, channels=4, tokens=5, width=6, pooled_width=3)
    for stage, side in enumerate([16, 32] if pyramid == "encode" else [32, 32]):
        numbers = 2 * 4 * (side // 2) ** 2 + 5 * 6 + 3
        if pyramid == "encode" and stage:
            numbers += 2 * 4 * (side // 4) ** 2
        assert layout.sample_bytes(stage) == torch.zeros(numbers, dtype=torch.bfloat16).nbytes


def test_the_loader_keeps_to_the_limit(data_root: Path) -> None:
    data = make(data_root, "--data.init_args.num_workers", "4", "--data.init_args.prefetch_memory", "60kB")
    module = SimpleNamespace(step=0)
    strategy = SimpleNamespace(root_device=SimpleNamespace(type="cpu"))
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1, lightning_module=module, strategy=strategy)
    data.trainer = trainer
    loader, validation = data.train_dataloader().loader, data.val_dataloader().loader
    step = 4 * 3 * (2 * 16**2 + 4 * 32**2) // 2
    assert loader.num_workers * loader.prefetch_factor * step <= 60_000
    assert (loader.num_workers, loader.prefetch_factor) == (60_000 // step, 1)
    assert (validation.num_workers, validation.prefetch_factor) == (1, 1)  # there is no room for more


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_a_validation_is_read_ahead_in_the_same_order(data_root: Path) -> None:
    data = make(data_root, "--data.init_args.num_workers", "2")
    strategy = SimpleNamespace(root_device=SimpleNamespace(type="cuda"))
    trainer: Any = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)
    data.trainer = trainer
    loader = data.val_dataloader()
    assert (loader.loader.num_workers, loader.loader.prefetch_factor, loader.loader.pin_memory) == (2, 1, True)
    read, expected = list(loader), data.heldout(data.validation_samples)
    assert len(read) == len(loader) == len(expected) > 2
    for number, micro in enumerate(read):
        assert (micro.ids, micro.stage) == (expected[number].ids, expected[number].stage)
        assert torch.equal(micro.images, expected[number].images)


def test_a_limit_that_is_no_size_is_refused(data_root: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.prefetch_memory must be a number of bytes"):
        make(data_root, "--data.init_args.prefetch_memory", "much")


def test_a_plan_of_stored_encodings_knows_their_layout(data_root: Path) -> None:
    recipe = Recipe(TINY, ["--data.init_args.folder", str(data_root)])
    module, data = recipe.make_model(), recipe.make_data()
    assert isinstance(data, MultiResolutionDataModule)
    assert planned_encodings(module, data, stored=False) is None
    layout = planned_encodings(module, data, stored=True)
    assert layout is not None
    assert (layout.width, layout.pooled_width, layout.tokens, layout.pixels) == (384, 384, 8, True)
