"""Images with NaN or infinite values are remembered: a second call generates none of them, unless it is asked to."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nami_lightning.cli.evaluate import generate_all
from nami_lightning.evaluation import generate as module
from nami_lightning.evaluation.generate import GeneratedImages, GenerationSettings, generate
from nami_lightning.evaluation.prompts import Item
from nami_lightning.pipelines.sampler_settings import SamplerSettings

ITEMS = [Item(name, f"a {name} cat", "open", {"kind": "open"}) for name in ("red", "big")]


class Pipeline:
    """Stands for a pipeline of diffusers; its images of some seeds of red cats are NaN, and it counts its images."""

    def __init__(self) -> None:
        self.bad_seeds: set[int] = set()
        self.generated: list[tuple[str, int]] = []

    def set_progress_bar_config(self, **_: Any) -> None: ...

    def __call__(
        self,
        prompt: Sequence[str],
        generator: Sequence[torch.Generator],
        output_type: str,
        num_inference_steps: int = 1,
    ) -> SimpleNamespace:
        images = np.zeros((len(prompt), 8, 8, 3), np.float32)
        for image, text, one in zip(images, prompt, generator, strict=True):
            self.generated.append((text, one.initial_seed()))
            if one.initial_seed() in self.bad_seeds and "red" in text:
                image[0, 0, 0] = np.nan
        return SimpleNamespace(images=images)

    def calls(self) -> list[tuple[str, int]]:
        """Return the prompts and seeds since the last call of this function."""
        calls, self.generated = self.generated, []
        return calls


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    pipeline = Pipeline()
    monkeypatch.setattr(module, "load_pipeline", lambda *_: pipeline)
    return pipeline


def test_they_are_generated_once(pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.bad_seeds = {43, 44}
    folder = GeneratedImages(tmp_path / "nami", "nami")
    generate("some/model", folder, ITEMS, ITEMS, 2, GenerationSettings(batch_size=3))
    assert len(pipeline.calls()) == 4
    assert "1 of 4 images have NaN" in capsys.readouterr().out
    generate("some/model", folder, ITEMS, ITEMS, 2, GenerationSettings(batch_size=1))
    assert pipeline.calls() == []
    assert "nami: 1 images had NaN or infinite values before, and are not generated again" in capsys.readouterr().out
    generate("some/model", folder, ITEMS, ITEMS, 3, GenerationSettings())
    assert pipeline.calls() == [("a red cat", 44), ("a big cat", 44)]
    saved = json.loads((folder.folder / "not_finite.json").read_text())["images"]
    assert [(one["item"], one["sample"], one["seed"]) for one in saved] == [("red", 1, 43), ("red", 2, 44)]
    assert not any(Path(one["image"]).exists() for one in saved)


def test_a_retry_generates_them_again_and_forgets_what_is_finite(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.bad_seeds = {42, 43}
    folder = GeneratedImages(tmp_path / "nami", "nami")
    generate("some/model", folder, ITEMS, ITEMS, 2, GenerationSettings())
    pipeline.calls()
    pipeline.bad_seeds = {43}
    generate("some/model", folder, ITEMS, ITEMS, 2, GenerationSettings(retry_not_finite=True))
    assert pipeline.calls() == [("a red cat", 42), ("a red cat", 43)]
    saved = json.loads((folder.folder / "not_finite.json").read_text())["images"]
    assert [one["seed"] for one in saved] == [43]


def test_with_other_settings_or_a_damaged_file_they_are_generated_again(pipeline: Pipeline, tmp_path: Path) -> None:
    """A model whose images all failed has no image that its settings would have to agree with."""
    pipeline.bad_seeds = {42}
    folder = GeneratedImages(tmp_path / "nami", "nami")
    generate("some/model", folder, ITEMS, ITEMS[:1], 1, GenerationSettings())
    generate("some/model", folder, ITEMS, ITEMS[:1], 1, GenerationSettings())
    assert pipeline.calls() == [("a red cat", 42)]
    generate("some/model", folder, ITEMS, ITEMS[:1], 1, GenerationSettings(SamplerSettings(num_inference_steps=2)))
    assert pipeline.calls() == [("a red cat", 42)]
    for content in ("{", "[]", '{"images": 1}'):
        (folder.folder / "not_finite.json").write_text(content)
        generate("some/model", folder, ITEMS, ITEMS[:1], 1, GenerationSettings())
        assert pipeline.calls() == [("a red cat", 42)]


def test_the_command_has_an_option_for_it(pipeline: Pipeline, tmp_path: Path) -> None:
    from nami_lightning.cli.main import make_parser

    pipeline.bad_seeds = {42}
    command = ["evaluate", "some/model", "--benchmark", "nami1k", "--output", str(tmp_path), "--names", "nami"]
    for arguments, count in (([], 2), ([], 0), (["--retry_not_finite"], 1)):
        options = make_parser().parse_args([*command, *arguments])
        generate_all(options, tmp_path, ITEMS, ITEMS)
        assert len(pipeline.calls()) == count
