"""The curriculum, against schedules written out by hand."""

from itertools import accumulate
from typing import Any

import pytest

from nami_lightning.training.curriculum import Curriculum, Phase


def _phases() -> list[Phase]:
    return [
        Phase(steps=4, ratio=[4, 2, 1], learning_rate=1.0, warmup_steps=2),
        Phase(steps=3, ratio=[1, 1, 0], learning_rate=0.4, warmup_steps=3),
        Phase(steps=2, ratio=[0, 0, 1], learning_rate=0.1),
    ]


def _phase(settings: dict[str, Any]) -> Phase:
    return Phase(**settings)


def _curriculum(unit: int = 8, **changes: Any) -> Curriculum:
    """The three phases, with ``first``, ``second``, ``third`` replaced where given; None removes one."""
    phases: list[Phase | None] = [*_phases()]
    for name, phase in changes.items():
        phases[("first", "second", "third").index(name)] = phase
    return Curriculum([phase for phase in phases if phase is not None], unit)


def test_every_step_has_its_phase() -> None:
    curriculum = _curriculum()
    assert [curriculum.phase_index(step) for step in range(12)] == [0] * 4 + [1] * 3 + [2] * 5
    assert curriculum.total_steps == 9
    assert curriculum.num_stages == 3
    assert [curriculum.phase(step).ratio for step in (0, 3, 4, 6, 7, 100)] == [
        [4, 2, 1],
        [4, 2, 1],
        [1, 1, 0],
        [1, 1, 0],
        [0, 0, 1],
        [0, 0, 1],
    ]


def test_learning_rate_warms_up_linearly_from_the_phase_before() -> None:
    expected = [0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.1, 0.1]
    curriculum = _curriculum()
    assert [curriculum.learning_rate(step) for step in range(9)] == pytest.approx(expected)
    assert curriculum.learning_rate(50) == pytest.approx(0.1)


def test_the_papers_warm_up() -> None:
    """The n-th step of a warm-up over N steps has n/N of the learning rate."""
    curriculum = Curriculum([Phase(5000, [4, 2, 1], 1e-4, 1000)], 8)
    for step in (0, 1, 499, 999):
        assert curriculum.learning_rate(step) == pytest.approx(1e-4 * (step + 1) / 1000)
    assert curriculum.learning_rate(1000) == curriculum.learning_rate(4999) == 1e-4


def test_samples_are_parts_times_the_unit() -> None:
    curriculum = _curriculum(unit=8)
    assert curriculum.samples(0) == [32, 16, 8]
    assert curriculum.samples(5) == [8, 8, 0]
    assert curriculum.samples(8) == [0, 0, 8]


def test_runs_and_steps_with_a_stage_count_its_batches() -> None:
    curriculum = _curriculum(unit=3)
    for stage in range(3):
        batches = [curriculum.samples(step)[stage] for step in range(9)]
        assert [samples for steps, samples in curriculum.runs(stage) for _ in range(steps)] == [b for b in batches if b]
        before = [curriculum.steps_with(stage, step) for step in range(10)]
        assert before == list(accumulate([bool(batch) for batch in batches], initial=0))


# --- a resume with another recipe ----------------------------------------------------------------


@pytest.mark.parametrize("step", range(10))
def test_the_same_recipe_may_always_go_on(step: int) -> None:
    now = _curriculum()
    now.check_past(now.state_dict(), step)
    assert now.state_dict() == _curriculum().state_dict()


@pytest.mark.parametrize(
    ("key", "value"), [("steps", 5), ("ratio", [4, 2, 2]), ("learning_rate", 0.9), ("warmup_steps", 1)]
)
def test_a_completed_phase_is_frozen(key: str, value: Any) -> None:
    first = _phase({"steps": 4, "ratio": [4, 2, 1], "learning_rate": 1.0, "warmup_steps": 2} | {key: value})
    for step in (4, 5, 9):
        with pytest.raises(ValueError, match=rf"phases\[0\]\.{key} .* completed"):
            _curriculum(first=first).check_past(_curriculum().state_dict(), step)


@pytest.mark.parametrize(("key", "value"), [("ratio", [1, 2, 0]), ("learning_rate", 0.5), ("warmup_steps", 0)])
def test_a_running_phase_keeps_its_training(key: str, value: Any) -> None:
    second = _phase({"steps": 3, "ratio": [1, 1, 0], "learning_rate": 0.4, "warmup_steps": 3} | {key: value})
    with pytest.raises(ValueError, match=rf"phases\[1\]\.{key} .* running"):
        _curriculum(second=second).check_past(_curriculum().state_dict(), 5)
    _curriculum(second=second).check_past(_curriculum().state_dict(), 4)  # not begun yet


def test_a_running_phase_may_end_elsewhere_but_not_before_what_is_done() -> None:
    saved = _curriculum().state_dict()
    first = _phases()[0]
    for steps in (3, 6, 1000):
        _curriculum(first=Phase(steps, first.ratio, first.learning_rate, 2)).check_past(saved, 3)
    short = _curriculum(first=Phase(2, first.ratio, first.learning_rate, 2))
    with pytest.raises(ValueError, match=r"phases\[0\] would end at step 2.* done 3.* at least 3 steps"):
        short.check_past(saved, 3)


def test_a_running_phase_that_ends_where_it_is_can_be_followed_by_a_new_one() -> None:
    """The way out that the message names."""
    first = _phases()[0]
    edited = Curriculum([Phase(3, first.ratio, first.learning_rate, 2), Phase(9, [0, 1, 1], 0.2)], 8)
    edited.check_past(_curriculum().state_dict(), 3)
    assert edited.phase(3).ratio == [0, 1, 1]


def test_the_future_may_be_anything() -> None:
    saved = _curriculum().state_dict()
    _curriculum(third=Phase(50, [7, 0, 1], 3.0, 9)).check_past(saved, 7)
    _curriculum(third=None).check_past(saved, 6)
    longer = Curriculum([*_phases(), Phase(1, [1, 1, 1], 1.0)], 8)
    longer.check_past(saved, 9)
    assert longer.total_steps == _curriculum().total_steps + 1


def test_a_phase_of_the_past_cannot_be_removed() -> None:
    saved = _curriculum().state_dict()
    with pytest.raises(ValueError, match=r"phases\[2\] is running .* gone"):
        _curriculum(third=None).check_past(saved, 8)
    with pytest.raises(ValueError, match=r"phases\[1\] is completed .* gone"):
        _curriculum(second=None, third=None).check_past(saved, 7)
    with pytest.raises(ValueError, match=r"phases\[0\]\.steps .* completed"):
        _curriculum(first=None).check_past(saved, 7)


def test_the_unit_is_fixed() -> None:
    with pytest.raises(ValueError, match=r"unit was 8 .* is 4"):
        _curriculum(unit=4).check_past(_curriculum(unit=8).state_dict(), 0)


# --- bad phases ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"ratio": []}, "ratio"),
        ({"ratio": [0, 0]}, "ratio"),
        ({"ratio": [2, -1]}, "ratio"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"warmup_steps": 6}, "warmup_steps"),
    ],
)
def test_bad_phases_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _phase({"steps": 5, "ratio": [1, 1], "learning_rate": 1.0} | settings)


def test_bad_curricula_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one phase"):
        Curriculum([], 8)
    with pytest.raises(ValueError, match="one number a stage"):
        Curriculum([Phase(1, [1, 1], 1.0), Phase(1, [1], 1.0)], 8)
    with pytest.raises(ValueError, match="unit"):
        Curriculum(_phases(), 0)
