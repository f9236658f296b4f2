"""Going on from the authors' release: the packaged recipe, at a tiny size, on OpenMoji."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.checkpoint_contents import numbers, same_numbers
from helpers.processes import run
from helpers.tiny_release import convert, generate, write_release
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nami_lightning.cli.main import main
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.runs.run_dir import Run

pytest_plugins = "helpers.tiny_models"

NETWORK = {
    "in_channels": 4,
    "num_layers": "[2,0,0]",
    "num_single_layers": "[1,1,2]",
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": "[4,6,6]",
    "joint_attention_dim": 16,
    "pooled_projection_dim": 12,
}
SETTINGS = {f"model.transformer.init_args.{key}": value for key, value in NETWORK.items()} | {
    "resolutions": "[8,16,32]",
    "model.bridge.init_args.channels": 4,
    "model.autoencoder.factor": 2,
    "model.autoencoder.dtype": "float32",
    "model.text_encoder.dtype": "float32",
    "model.text_encoder.max_length": 24,
    "model.optimizer": "{class_path: torch.optim.AdamW}",
    "curriculum.unit": 2,
    "curriculum.phases": "[{steps: 60, ratio: [1, 2, 4], learning_rate: 0.003, warmup_steps: 20}]",
    "data.init_args.max_micro_batch": "[8,8,8]",
    "data.init_args.validation_samples": 8,
    "data.init_args.source": (
        "{class_path: nami_lightning.datamodules.OpenMoji, init_args: {languages: [en, de], limit: 80, size: 32}}"
    ),
    "data.init_args.preparation": "{resolutions: [32], heldout_percent: 10, format: png}",
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.strategy": "auto",
    "trainer.val_check_interval": 4,
    "trainer.callbacks": (
        "[{class_path: nami_lightning.callbacks.RunCheckpoint, init_args: {every_n_steps: 20, keep: 3}}]"
    ),
}


@pytest.fixture(scope="module")
def arguments(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The packaged recipe with tiny sizes, on the converted record."""
    folder = tmp_path_factory.mktemp("finetune")
    convert(write_release(folder / "weights", encoders=True), folder / "nami-t2i")
    places = {
        "output_dir": folder / "runs",
        "data.init_args.folder": data_root,
        "model.pretrained": folder / "nami-t2i",
    }
    keys = SETTINGS | places
    return ["nami_2b_finetune", *(part for key, value in keys.items() for part in (f"--{key}", str(value)))]


def folder_of(arguments: list[str]) -> Path:
    """Return the folder that the fixture works in."""
    return Path(arguments[arguments.index("--model.pretrained") + 1]).parent


def validation_losses(folder: Path) -> list[float]:
    """Return the finest stage's validation loss at each validation."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars("val/loss_stage3")]


def test_it_learns_and_resumes_to_the_bit_and_is_exported(arguments: list[str]) -> None:
    said = run([*arguments, "--name", "whole"])
    runs = folder_of(arguments) / "runs"
    assert "Fitted" not in said
    assert "were trained with" not in said  # the recipe has the release's conventions
    losses = validation_losses(runs / "whole")
    assert losses[-1] < 0.95 * losses[0], losses

    shutil.copytree(runs / "whole", runs / "halves")
    for step in (40, 60):
        (runs / "halves" / "checkpoints" / f"step={step:07d}.ckpt").unlink()
    assert "step 20" in run([*arguments, "--name", "halves"])
    whole, halves = (Run(runs / name).checkpoint() for name in ("whole", "halves"))
    assert whole.name == halves.name == "step=0000060.ckpt"
    assert not same_numbers(numbers(whole), numbers(halves))

    exported = folder_of(arguments) / "exported"
    assert main(["export", str(runs / "whole"), "--output", str(exported)]) == 0
    pipeline, before = (NamiPipeline.from_pretrained(folder) for folder in (exported, exported.with_name("nami-t2i")))
    assert pipeline.text_settings == before.text_settings.__class__(**vars(before.text_settings) | {"max_length": 24})
    assert dict(pipeline.bridge.config)["time"] == "remaining"
    pipeline.set_progress_bar_config(disable=True)
    before.set_progress_bar_config(disable=True)
    assert not torch.allclose(generate(pipeline), generate(before))
