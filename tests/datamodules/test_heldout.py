"""Held-out samples on many ranks: each counts once, and all ranks run the same micro-batches."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nami_lightning.datamodules.aspect_buckets import Aspect
from nami_lightning.datamodules.multi_resolution import MultiResolutionDataModule
from nami_lightning.datamodules.stage_images import StageImages
from nami_lightning.datamodules.step_dataset import HeldoutDataset
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.batch import MicroBatch
from nami_lightning.training.module import NamiModule

TINY = Path(__file__).parents[1] / "tiny.yaml"
ASPECTS = [(64, 64), (72, 56), (56, 72), (80, 48), (48, 80), (88, 40), (40, 88), (96, 32), (32, 96)]


class Bucket(SimpleNamespace):
    """So many samples of one aspect ratio, that nobody reads."""

    def __len__(self) -> int:
        return int(self.samples)


class Named(StageImages):
    """Gives micro-batches without pixels, whose ids say where each sample lies."""

    def micro_batch(self, step: int, stage: int, aspect: Aspect, refs: Any, places: list[int], *_: Any) -> MicroBatch:
        names = [f"{ref.bucket}/{ref.record}" for ref in refs]
        return MicroBatch(step, stage, torch.empty(len(refs), 3, 0, 0), names, names, places)


def nine_aspects() -> Named:
    aspects = [Aspect(*(torch.tensor(sides) / 64).tolist()) for sides in ASPECTS]
    sizes = [9000, 3000, 2000, 1000, 700, 500, 300, 200, 90]
    buckets: Any = [Bucket(resolution=64, aspect=a, samples=n) for a, n in zip(aspects, sizes, strict=True)]
    return Named(buckets, [64], False)


@pytest.mark.parametrize("ranks", [1, 2, 3, 64])
@pytest.mark.parametrize("samples", [1024, 400, 8])
def test_every_sample_counts_once_whatever_the_number_of_ranks(samples: int, ranks: int) -> None:
    parts = [HeldoutDataset(nine_aspects(), samples, [16], rank, ranks) for rank in range(ranks)]
    shapes = [[(part.stage, part.aspect, len(part.refs)) for part in one.parts] for one in parts]
    assert all(shape == shapes[0] for shape in shapes)
    micros = [one[number] for one in parts for number in range(len(one))]
    counted = Counter(name for micro in micros for name in micro.ids[: len(micro) - micro.padding])
    assert len(counted) == samples
    assert set(counted.values()) == {1}
    places = sorted(place for micro in micros for place in micro.global_indices[: len(micro) - micro.padding])
    assert places == list(range(samples))
    assert sum(len(micro) for micro in micros) < samples + 9 * ranks


def losses(module: NamiModule, data: MultiResolutionDataModule, ranks: int) -> dict[str, float]:
    """The validation's results of so many ranks, one after the other."""
    sums = []
    for rank in range(ranks):
        module.on_validation_epoch_start()
        heldout = data.heldout(7, rank, ranks)
        for number in range(len(heldout)):
            module.validation_step(heldout[number], number)
        sums.append(module.losses_by_tau.sums)
    module.losses_by_tau.sums = torch.stack(sums).sum(0)
    strategy: Any = SimpleNamespace(reduce=lambda value, reduce_op: value)
    return {name: float(value.detach()) for name, value in module.losses_by_tau.means(strategy).items()}


def test_a_validation_has_the_same_results_on_any_number_of_ranks(data_root: Path) -> None:
    recipe = Recipe(TINY, ["--data.init_args.folder", str(data_root)])
    module, data = recipe.make_model(), recipe.make_data()
    assert isinstance(data, MultiResolutionDataModule)
    module.configure_model()
    alone = losses(module, data, 1)
    assert {f"val/loss_stage{stage}" for stage in (1, 2, 3)} <= set(alone)
    for ranks in (2, 3, 64):
        assert losses(module, data, ranks) == pytest.approx(alone, rel=1e-5)


def test_padding_repeats_the_sample_that_it_stands_for() -> None:
    one = HeldoutDataset(nine_aspects(), 8, [16], 0, 1)
    alone = dict(row for number in range(len(one)) for row in rows(one[number]))
    for rank in range(64):
        heldout = HeldoutDataset(nine_aspects(), 8, [16], rank, 64)
        for number in range(len(heldout)):
            whole = replace(heldout[number], padding=0)
            assert all(alone[name] == place for name, place in rows(whole))


def rows(micro: MicroBatch) -> list[tuple[str, int]]:
    return list(zip(micro.ids, micro.global_indices, strict=True))
