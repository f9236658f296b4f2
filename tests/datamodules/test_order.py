"""The order of samples: each exactly once an epoch, in proportion, and the same however it is cut."""

import itertools
from fractions import Fraction

import pytest

from nami_lightning.datamodules.order import BucketOrder, Schedule, apportion


@pytest.mark.parametrize("sizes", [[1], [3, 5], [0, 4, 4], [1, 100, 7], [17, 0, 3, 100], [5, 5, 5]])
def test_apportion_grows_by_one_draw_at_a_time_and_is_exact_after_a_cycle(sizes: list[int]) -> None:
    before = [0] * len(sizes)
    for draws in range(1, 2 * sum(sizes) + 1):
        counts = apportion(draws, sizes)
        assert sum(b - a for a, b in zip(before, counts, strict=True)) == 1
        assert all(b >= a for a, b in zip(before, counts, strict=True))
        before = counts
    assert before == [2 * size for size in sizes]


def test_apportion_is_websters_method() -> None:
    """Against its definition: the draws sorted by the exact times (i + 1/2) / size."""
    sizes = [4, 9, 2, 30]
    times = sorted((Fraction(2 * i + 1, 2 * size), b) for b, size in enumerate(sizes) for i in range(size))
    for draws in range(sum(sizes) + 1):
        expected = [sum(1 for _, bucket in times[:draws] if bucket == b) for b in range(len(sizes))]
        assert apportion(draws, sizes) == expected


def test_schedule_draws_from_buckets_of_the_stage_or_higher_in_proportion() -> None:
    schedule = Schedule([10, 20, 30])
    reads = {read.bucket: read.count for read in schedule.reads(1, 0, 50)}
    assert reads == {1: 20, 2: 30}
    assert [read.bucket for read in schedule.reads(2, 0, 7)] == [2]
    assert Schedule([10, 20, 30], top_only=True).reads(0, 0, 4)[0].bucket == 2


@pytest.mark.parametrize("window", [1, 2, 100])
def test_every_sample_once_an_epoch_and_epochs_differ(window: int) -> None:
    order = BucketOrder(0, "64", [5, 3, 7, 2, 9], window)
    first, second = order(0, 26), order(26, 26)
    assert sorted(first) == sorted(second) == list(range(26))
    assert first != second


def test_the_same_stream_however_it_is_cut() -> None:
    whole = BucketOrder(1, "64", [4, 4, 4, 1], 2)(0, 60)
    other = BucketOrder(1, "64", [4, 4, 4, 1], 2)
    pieces = [other(first, 7) for first in range(0, 56, 7)]
    assert list(itertools.chain(*pieces)) == whole[:56]
    assert BucketOrder(2, "64", [4, 4, 4, 1], 2)(0, 60) != whole


def test_a_window_keeps_its_chunks_together() -> None:
    """How far samples mix: those of one window come before those of the next."""
    order = BucketOrder(0, "64", [10] * 6, window=2)(0, 60)
    chunks = [[index // 10 for index in order[first : first + 20]] for first in (0, 20, 40)]
    assert all(len(set(window)) == 2 for window in chunks)
    assert any(list(window) != sorted(window) for window in chunks)
