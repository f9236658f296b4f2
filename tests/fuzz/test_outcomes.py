"""The fuzzer itself: it finds each kind of fault."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fuzz import cases
from helpers.fuzz.cases import Surface, nothing_left_at, require, run_case

from nami_lightning.cli.argument_types import parse_shard
from nami_lightning.evaluation.prompts import check_id


def fails_within_a_library(rng: random.Random, folder: Path) -> None:
    int("x")


def ends_the_process(rng: random.Random, folder: Path) -> None:
    raise SystemExit(1)


def hangs(rng: random.Random, folder: Path) -> None:
    while True:
        pass


def is_wrong(rng: random.Random, folder: Path) -> None:
    require(1 + 1 == 3, "a wrong result")


def leaves_a_file(rng: random.Random, folder: Path) -> None:
    with nothing_left_at(folder / "out"):
        (folder / "out").write_text("half")
        check_id("..", "line 1")


def refuses(rng: random.Random, folder: Path) -> None:
    parse_shard("4/2")


def works(rng: random.Random, folder: Path) -> None:
    parse_shard(f"{rng.randrange(2)}/2")


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        (fails_within_a_library, "fault", "ValueError at test_outcomes.py"),
        (ends_the_process, "fault", "SystemExit"),
        (hangs, "fault", "hangs"),
        (is_wrong, "fault", "a wrong result"),
        (leaves_a_file, "fault", "after an error out is there"),
        (refuses, "refused", "--shard must be I/N"),
        (works, "right", ""),
    ],
)
def test_outcomes(
    case: Callable[[random.Random, Path], None], kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "SECONDS", 0.2)
    found = run_case(Surface("a surface", case, 0), 1)
    assert found[0] == kind
    assert text in found[1]
