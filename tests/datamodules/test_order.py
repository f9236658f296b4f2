"""The order of samples: each exactly once an epoch, in proportion, and the same however it is cut."""

import itertools
from collections import Counter
from fractions import Fraction

import pytest

from nami_lightning.datamodules.sample_order import BucketOrder, Read, StageBatches, apportion, reads


@pytest.mark.parametrize("sizes", [[1], [3, 5], [0, 4, 4], [1, 100, 7], [17, 0, 3, 100], [5, 5, 5]])
def test_apportion_grows_by_one_sample_at_a_time_and_is_exact_after_a_cycle(sizes: list[int]) -> None:
    before = [0] * len(sizes)
    for total in range(1, 2 * sum(sizes) + 1):
        counts = apportion(total, sizes)
        assert sum(b - a for a, b in zip(before, counts, strict=True)) == 1
        assert all(b >= a for a, b in zip(before, counts, strict=True))
        before = counts
    assert before == [2 * size for size in sizes]


def test_apportion_is_websters_method() -> None:
    """Against its definition: the samples sorted by their exact times (i + 1/2) / size."""
    sizes = [4, 9, 2, 30]
    times = sorted((Fraction(2 * i + 1, 2 * size), b) for b, size in enumerate(sizes) for i in range(size))
    for total in range(sum(sizes) + 1):
        expected = [sum(1 for _, bucket in times[:total] if bucket == b) for b in range(len(sizes))]
        assert apportion(total, sizes) == expected


def test_reads_are_in_proportion_and_go_on_where_they_stopped() -> None:
    assert {read.bucket: (read.first, read.count) for read in reads([20, 30], 0, 50)} == {0: (0, 20), 1: (0, 30)}
    assert {read.bucket: (read.first, read.count) for read in reads([20, 30], 50, 5)} == {0: (20, 2), 1: (30, 3)}
    assert reads([0, 7], 3, 2) == [Read(1, 3, 2)]
    assert reads([5], 3, 0) == []


@pytest.mark.parametrize("sizes", [[6], [60, 30, 10], [5, 0, 1]])
def test_batches_know_what_the_batches_before_them_took(sizes: list[int]) -> None:
    """Against counting: three phases of 20, 7 and 40 batches, of 8, 3 and 1 samples."""
    phases = [(20, 8), (7, 3), (40, 1)]
    batches = StageBatches(sizes, phases)
    taken = [0] * len(sizes)
    for number, samples in enumerate(samples for count, samples in phases for _ in range(count)):
        aspect, before = batches(number)
        assert before == taken[aspect]
        taken[aspect] += samples
    counts = Counter(batches(number)[0] for number in range(sum(sizes)))
    assert [counts[aspect] for aspect in range(len(sizes))] == sizes


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
