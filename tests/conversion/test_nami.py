"""A NAMI that gets a finer stage, or whose one stage is split; and a training that starts from a converted model."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.processes import run
from helpers.tiny_models import TextModel, make_pipeline
from torch import Tensor

from nami_lightning.cli.main import main
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.pretrained import load_pretrained
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.runs.load import load_module
from nami_lightning.runs.run_dir import Run

pytest_plugins = "helpers.tiny_models"


def inputs(side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, text states, pooled states, and times of two samples."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, side, side, generator=generator)
    text, pooled = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 12, generator=generator)
    return latents, text, pooled, torch.tensor([0.9, 0.25])


def convert(source: Path | str, output: Path, *options: str) -> NamiPipeline:
    """Convert as a user does, and load the result."""
    assert main(["convert", str(source), "--output", str(output), *options]) == 0
    return NamiPipeline.from_pretrained(output)


@pytest.fixture
def saved(t5: TextModel, clip: TextModel, vae: AutoencoderKL, tmp_path: Path) -> Path:
    """A saved pipeline of two stages, of 16 px."""
    make_pipeline(t5, clip, vae=vae).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# --- a finer stage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("added", [(), ("--num_layers", "1", "--num_single_layers", "2")])
@torch.no_grad()
def test_a_new_stage_starts_as_a_copy_of_the_finest(saved: Path, added: tuple[str, ...], tmp_path: Path) -> None:
    before = NamiPipeline.from_pretrained(saved)
    after = convert(saved, tmp_path / "finer", "--add_stage", "32", *added)
    network = after.transformer
    assert network.num_stages == 3
    assert [network.config.num_layers[-1], network.config.num_single_layers[-1]] == ([1, 2] if added else [0, 0])
    for stage in range(2):
        expected = before.transformer(*inputs(8), stage=stage)
        torch.testing.assert_close(network(*inputs(8), stage=stage), expected, rtol=0, atol=1e-6)
    before.transformer.register_to_config(rope_unit_stage=0)  # the finest grid, half as far apart
    expected = before.transformer(*inputs(16), stage=1)
    torch.testing.assert_close(network(*inputs(16), stage=2), expected, rtol=0, atol=1e-6)


def test_its_window_is_half_of_the_finest_ones(saved: Path, tmp_path: Path) -> None:
    before = NamiPipeline.from_pretrained(saved).bridge
    after = convert(saved, tmp_path / "finer", "--add_stage", "32")
    assert [window.start for window in after.bridge.windows] == pytest.approx([1, 0.5, 0.25])
    assert torch.equal(after.bridge.maps[0].weight, before.maps[0].weight)
    assert after.config.resolution == 32
    with pytest.raises(ValueError, match="never fitted"):
        after("a red cat")
    third = convert(saved, tmp_path / "third", "--add_stage", "32", "--window_ratio", "0.2").bridge
    assert [window.start for window in third.windows] == pytest.approx([1, 0.5, 0.1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--add_stage", "48"], "the finest stage has 16 px, so that the next one has 32"),
        (["--add_stage", "32", "--window_ratio", "1.5"], "takes a part of the finest one's window, whose ratio is 1"),
        (["--add_stage", "32", "--window_ratios", "1", "1"], "--window_ratios is to split one stage"),
        (["--add_stage", "32", "--num_layers", "1", "1"], "--num_layers is one number with --add_stage"),
        (["--add_stage", "32", "--step", "3"], "--step is for a run"),
        ([], "is a pipeline of NAMI already: give --add_stage"),
        (["--num_layers", "1", "0"], "it has 2 stages already"),
    ],
)
def test_what_does_not_fit_is_refused(
    saved: Path, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(saved), "--output", str(tmp_path / "out"), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


# --- one stage split over several ----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_blocks_of_one_stage_are_split_over_several(
    t5: TextModel, clip: TextModel, vae: AutoencoderKL, tmp_path: Path
) -> None:
    one = make_pipeline(t5, clip, stages=1, vae=vae)
    one.save_pretrained(tmp_path / "one")
    split = ("--num_layers", "1", "0", "--num_single_layers", "0", "1", "--window_ratios", "2", "1")
    two = convert(tmp_path / "one", tmp_path / "two", *split)
    assert [window.start for window in two.bridge.windows] == pytest.approx([1, 1 / 3])
    expected = one.transformer(*inputs(8), stage=0)
    torch.testing.assert_close(two.transformer(*inputs(8), stage=1), expected, rtol=0, atol=1e-6)


# --- a training that starts from it --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_module: list[str]) -> Run:
    """A short training of the tiny recipe's first two stages."""
    two_stages = {
        "name": "two_stages",
        "resolutions": "[16,32]",
        "model.transformer.init_args.num_layers": "[1,0]",
        "model.transformer.init_args.num_single_layers": "[0,1]",
        "model.bridge.init_args.window_ratios": "[1,1]",
        "curriculum.phases": "[{steps: 10, ratio: [2,1], learning_rate: 0.002}]",
        "data.init_args.max_micro_batch": "[4,4]",
        "trainer.val_check_interval": "10",
    }
    run([*tiny_module, *(part for key, value in two_stages.items() for part in (f"--{key}", value))])
    return Run(Path(tiny_module[2]) / "two_stages")


FINER = {
    "name": "finer",
    "resolutions": "[16,32,64]",
    "model.transformer.init_args.num_single_layers": "[0,1,1]",
    "model.transformer.init_args.rope_unit_stage": "1",
    "model.bridge.init_args.window_ratios": "[2,1,1]",
    "curriculum.phases": "[{steps: 12, ratio: [1,1,1], learning_rate: 0.001}]",
    "data.init_args.source.init_args.size": "64",
    "data.init_args.preparation.resolutions": "[64]",
    "trainer.val_check_interval": "12",
}


def test_a_run_goes_on_with_a_finer_stage(
    trained: Run, tiny_module: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's EMA starts a training of three stages; export writes what convert can read again."""
    convert(trained.folder, tmp_path / "finer", "--add_stage", "64", "--num_single_layers", "1")
    source = NamiPipeline.from_pretrained(tmp_path / "finer").transformer
    weights = source.state_dict()
    assert all(
        torch.equal(weights[name], value) for name, value in load_module(trained).transformer.state_dict().items()
    )
    keys = [part for key, value in FINER.items() for part in (f"--{key}", value)]
    data = ["--data.init_args.folder", str(tmp_path / "data")]
    said = run([*tiny_module, *keys, *data, "--model.pretrained", str(tmp_path / "finer")])
    assert "Fitted 2 bridge(s)" in said
    finer = Run(Path(tiny_module[2]) / "finer")
    assert main(["export", str(finer.folder), "--output", str(tmp_path / "exported")]) == 0
    exported = NamiPipeline.from_pretrained(tmp_path / "exported").transformer.state_dict()
    assert not torch.equal(exported["proj_out.weight"], weights["proj_out.weight"])
    again = convert(tmp_path / "exported", tmp_path / "finest", "--add_stage", "128").transformer.state_dict()
    assert all(torch.equal(again[name], value) for name, value in exported.items())


def test_a_start_that_does_not_fit_is_refused_by_name(trained: Run, tiny_module: list[str], tmp_path: Path) -> None:
    convert(trained.folder, tmp_path / "finer", "--add_stage", "64", "--num_single_layers", "2")
    said = run([*tiny_module, "--name", "other", "--model.pretrained", str(tmp_path / "finer")], status=2)
    assert "model.transformer.num_single_layers is [0, 1, 1] in the recipe, but [0, 1, 2] in model.pretrained" in said
    said = run([*tiny_module, "--name", "other", "--model.pretrained", str(tmp_path / "nothing")], status=2)
    assert "is neither a pipeline's folder nor a NamiTransformer2DModel's" in said


def test_bridges_of_the_same_windows_are_taken_over_and_others_are_said(saved: Path) -> None:
    pipeline = NamiPipeline.from_pretrained(saved)
    pipeline.bridge.maps[0].bias.fill_(0.5)
    pipeline.save_pretrained(saved)
    network = NamiTransformer2DModel.from_config(pipeline.transformer.config)
    same, other = BridgeFlow([3, 3], 4), BridgeFlow([2, 1], 4, time="remaining")
    assert load_pretrained(str(saved), network, same) == []
    assert same.fitted
    assert torch.equal(same.maps[0].bias, pipeline.bridge.maps[0].bias)
    notes = load_pretrained(str(saved), network, other)
    assert not other.fitted
    assert [note.split("with bridge ")[1] for note in notes] == [
        "window_ratios [1.0, 1.0]; the recipe has [2, 1].",
        "time noise_level; the recipe has remaining.",
    ]
