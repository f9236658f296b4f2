"""The report of ``lightning bench gpu``: its flow on the stand-in, and what it says when something fails."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nami_lightning.benchmarks.gpu import report as report_file
from nami_lightning.benchmarks.gpu.parity import (
    CPU,
    Skipped,
    distance,
    drawing,
    ema_on_the_host,
    training_in_float32,
    training_with_shards,
)
from nami_lightning.benchmarks.gpu.report import Report, check_parity, measure_gpu
from nami_lightning.benchmarks.gpu.section import Promise, Section, at_most
from nami_lightning.benchmarks.gpu.sizes import STAND_IN
from nami_lightning.benchmarks.gpu.training_speed import measure_training, random_micro_batch
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.runs.recipe import Recipe


def test_a_report_shows_each_promise_with_its_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def section(sizes: object, folder: Path) -> Section:
        promises = [at_most("small", 0.01, 0.1), at_most("large", 0.2, 0.1), Promise("none", "no GPU", "", None)]
        return Section("One", "Text.", tables=["| a |"], pictures=["one.png"], promises=promises)

    def broken(sizes: object, folder: Path) -> Section:
        raise RuntimeError("CUDA out of memory\nmore lines")

    monkeypatch.setattr(report_file, "SECTIONS", {"one": section, "broken": broken})
    report = Report(tmp_path / "report.md", STAND_IN)
    report.run("one")
    assert "| small | 0.01 | at most 0.1 | held |" in report.path.read_text()
    report.run("broken")
    text = report.path.read_text()
    assert "Promises: 1 held, 2 not held, 1 not run." in text
    assert "| large | 0.2 | at most 0.1 | not held |" in text
    assert "| broken | failed: CUDA out of memory | runs | not held |" in text
    assert "![One](one.png)" in text
    assert "no figure of a GPU" in text


def test_not_a_number_is_not_held() -> None:
    assert at_most("loss", float("nan"), 1.0).verdict == "not held"


def test_a_check_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: torch.device) -> list[Promise]:
        raise ValueError("wrong device")

    def skips(device: torch.device) -> list[Promise]:
        raise Skipped("no float8")

    monkeypatch.setattr(report_file, "CHECKS", (fails, skips, ema_on_the_host))
    rows = [promise.row for promise in check_parity(STAND_IN, Path()).promises]
    assert rows[0] == ["fails", "failed: wrong device", "runs", "not held"]
    assert rows[1] == ["skips", "not run: no float8", "", "not run"]
    assert rows[2][3] == "held"


@pytest.mark.parametrize("check", [training_in_float32, training_with_shards, drawing])
def test_the_cpu_agrees_with_itself(check: object) -> None:
    assert all(promise.held is not False for promise in check(CPU))  # type: ignore[operator]


def test_a_wrong_bridge_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check's own test: were the GPU's bridge off by a thousandth, the drawing would not be held."""
    reference, exact, calls = BridgeFlow.forward, BridgeFlow.forward, []

    def second_is_wrong(bridge: BridgeFlow, stage: int, coarse_end: torch.Tensor) -> torch.Tensor:
        calls.append(stage)
        return exact(bridge, stage, coarse_end) * (1.0 if len(calls) <= 2 else 1.001)

    monkeypatch.setattr(BridgeFlow, "forward", second_is_wrong)
    assert drawing(CPU)[0].held is False
    monkeypatch.setattr(BridgeFlow, "forward", reference)


def test_distances_are_relative_norms() -> None:
    reference = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert distance({"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([4.0])}, reference) == pytest.approx(0.1)
    assert distance({"a": torch.tensor([3.0, 0.0])}, reference) == float("inf")


def test_random_steps_train_as_a_recipe_does() -> None:
    training = replace(STAND_IN.training[0], bare_loop=False)
    measured = measure_training(training, replace(STAND_IN, training_steps=1))
    assert measured.seconds > 0
    assert measured.waits is None
    assert measured.memory is None


def test_random_encodings_have_the_shapes_of_the_recipe() -> None:
    micro = random_micro_batch(Recipe("nami_0.6b", []).make_model(), stage=1, samples=2)
    assert micro.images.shape == (2, 3, 0, 0)
    encodings = micro.encodings
    assert encodings is not None
    assert encodings.latents is not None
    assert encodings.coarse_latents is not None
    assert encodings.latents.mean.shape == (2, 16, 64, 64)
    assert encodings.coarse_latents.mean.shape == (2, 16, 32, 32)
    assert encodings.text.sequence.shape == (2, 256, 1024)


def test_without_a_gpu_the_command_says_what_to_do() -> None:
    options = Namespace(stand_in=False, output="report.md", sections=["parity"], minutes=None, overrides=[])
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(ValueError, match=r"needs a CUDA GPU: --stand_in"):
        measure_gpu(options)
