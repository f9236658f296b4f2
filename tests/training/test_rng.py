"""Chance as a pure function, against scipy's distributions and hashes computed by ``b2sum``."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from nami_lightning.training import rng

SHAPE = (2, 4, 4)


def _fields(draws: rng.RandomNumbers) -> list[Tensor]:
    return [draws.noise, draws.normal, draws.uniform]


def test_seeds_are_the_same_on_every_machine() -> None:
    """The upper 63 of the 64 bits of ``printf 7/120/3/noise | b2sum -l 64``, and of another."""
    assert rng.derive_seed(7, 120, 3, "noise") == 0x830E3C78F1DC5ED4 >> 1
    assert rng.derive_seed(0, "validation", 11, "time") == 0x90A043101CA9C88C >> 1
    assert rng.derive_seed(1, 23) != rng.derive_seed(12, 3)


def test_draws_do_not_depend_on_their_company() -> None:
    together = rng.sample(0, 5, [0, 1, 2, 3], SHAPE)
    for places in ([2], [3, 1], [9, 0, 2]):
        for alone, all_of_them in zip(_fields(rng.sample(0, 5, places, SHAPE)), _fields(together), strict=True):
            for row, place in enumerate(places):
                if place < 4:
                    assert torch.equal(alone[row], all_of_them[place])


def test_draws_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    rng.sample(0, 0, [0], SHAPE)
    rng.sample_normal(0, 0, [0], "latents", SHAPE, "cpu")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("seed", "batch", "place"), [(1, 5, 2), (0, 6, 2), (0, "validation", 2), (0, 5, 3)])
def test_other_seeds_batches_and_places_draw_otherwise(seed: int, batch: int | str, place: int) -> None:
    for one, other in zip(
        _fields(rng.sample(0, 5, [2], SHAPE)), _fields(rng.sample(seed, batch, [place], SHAPE)), strict=True
    ):
        assert not torch.isclose(one, other).any()


def test_time_does_not_depend_on_the_size_of_the_noise() -> None:
    small, large = rng.sample(0, 5, [2], SHAPE), rng.sample(0, 5, [2], (4, 16, 16))
    assert torch.equal(small.normal, large.normal)
    assert torch.equal(small.uniform, large.uniform)


def test_purposes_are_independent() -> None:
    latents = rng.sample_normal(0, 5, [0, 1], "latents", SHAPE, "cpu")
    coarse = rng.sample_normal(0, 5, [0, 1], "coarse latents", SHAPE, "cpu")
    noise = rng.sample(0, 5, [0, 1], SHAPE).noise
    assert latents.shape == (2, *SHAPE)
    for one, other in ((latents, coarse), (latents, noise), (latents[0], latents[1])):
        assert not torch.isclose(one, other).any()
    assert torch.equal(rng.sample_normal(0, 5, [1], "latents", SHAPE, "cpu")[0], latents[1])


def test_draws_have_their_distributions() -> None:
    draws = rng.sample(0, 1, range(3000), SHAPE)
    assert draws.noise.shape == (3000, *SHAPE)
    assert stats.kstest(draws.noise.flatten().numpy(), "norm").pvalue > 0.01
    assert stats.kstest(draws.normal.numpy(), "norm").pvalue > 0.01
    for column in draws.uniform.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 0.01
    rows = torch.cat([draws.noise.flatten(1), draws.normal[:, None], draws.uniform], 1)
    correlation = torch.corrcoef(rows.T) - torch.eye(rows.shape[1])
    assert correlation.abs().max() < 5 / 3000**0.5  # of 630 pairs, none beyond five standard deviations
