"""A network that gives NaN while callbacks generate: a warning, no picture, and the training goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nami_lightning.cli.main import main
from nami_lightning.models.transformer import NamiTransformer2DModel

PHASES = "[{steps: 4, ratio: [1, 1, 1], learning_rate: 1.0e-3}]"


def test_images_that_are_not_finite_end_no_training(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    forward = NamiTransformer2DModel.forward

    def spoilt(self: NamiTransformer2DModel, hidden_states: Any, *others: Any, **named: Any) -> Any:
        """Give NaN where no gradient is computed: to the callbacks, but not to the steps of training."""
        output = forward(self, hidden_states, *others, **named)
        return output if torch.is_grad_enabled() else output * float("nan")

    monkeypatch.setattr(NamiTransformer2DModel, "forward", spoilt)
    metrics = (
        "{class_path: nami_lightning.callbacks.Metrics, init_args: {samples: 4, sampler: {num_inference_steps: 3}}}"
    )
    assert main(["run", *tiny, "--curriculum.phases", PHASES, "--trainer.callbacks+", metrics]) == 0
    run = tmp_path / "runs" / "tiny"
    assert (run / "checkpoints" / "step=0000004.ckpt").exists()
    assert not list(run.glob("samples/*.png"))
    said = "\n".join(str(warning.message) for warning in recwarn)
    assert "No grid of samples at step 4: NaN or infinite values in image 0 (prompt 'red apple', seed 0, sinc" in said
    assert "No metrics at step 4, since 4 of 4 images are not finite" in said
