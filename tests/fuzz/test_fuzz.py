"""Inputs of chance, a few of each kind: a right result or one clear error. ``make fuzz`` runs ten thousand."""

import pytest
from helpers.fuzz.cases import Surface, run_surface
from helpers.fuzz.surfaces import SURFACES

CASES = 300
"""Of all surfaces together."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.name)
def test_any_input_ends_well(surface: Surface) -> None:
    counts = run_surface(surface, range(max(4, surface.share * CASES // 10_000)))
    assert counts.faults == {}
    assert counts.right + counts.refused > 0


def test_shares_are_of_ten_thousand_cases() -> None:
    assert sum(surface.share for surface in SURFACES) == 10_000
