"""The authors' release, against a recorded run of the code that they published."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_release import RECORD, SINGLE_LAYERS, convert, generate, part_of, write_release
from torch import Tensor

from nami_lightning.cli.main import main
from nami_lightning.models.transformer import patchify
from nami_lightning.pipelines.nami_pipeline import NamiPipeline

pytest_plugins = "helpers.tiny_models"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record's release, with text encoders."""
    return write_release(tmp_path_factory.mktemp("released") / "weights", encoders=True)


@pytest.fixture(scope="module")
def released(release: Path, tmp_path_factory: pytest.TempPathFactory) -> NamiPipeline:
    """The release as a pipeline, with its own jump."""
    return convert(release, tmp_path_factory.mktemp("converted") / "out", "--jump", "released")


# --- the record ----------------------------------------------------------------------------------------


def test_every_call_of_the_network_and_the_latents_are_the_recorded_ones(released: NamiPipeline) -> None:
    calls: list[tuple[Tensor, Tensor, int, Tensor]] = []
    hook = released.transformer.register_forward_hook(
        lambda _, inputs, output: calls.append((inputs[0], inputs[3], inputs[4], output))
    )
    latents = generate(released)
    hook.remove()
    assert len(calls) == 7
    for i, (hidden_states, timestep, stage, output) in enumerate(calls):
        assert stage == RECORD[f"call.{i}.stage"]
        for value, name in ((patchify(hidden_states, 2), "tokens"), (timestep, "timestep")):
            torch.testing.assert_close(value, RECORD[f"call.{i}.{name}"], rtol=0, atol=1e-5)
        torch.testing.assert_close(patchify(output, 2), RECORD[f"call.{i}.output"], rtol=0, atol=1e-5)
    torch.testing.assert_close(latents, RECORD["latents"], rtol=0, atol=1e-5)


def test_without_guidance_only_the_prompts_run(released: NamiPipeline) -> None:
    """The first call's velocity of the prompts is the recorded one's second half."""
    calls: list[Tensor] = []
    hook = released.transformer.register_forward_hook(lambda _, inputs, output: calls.append(output))
    generate(released, guidance_scale=1.0)
    hook.remove()
    torch.testing.assert_close(patchify(calls[0], 2), RECORD["call.0.output"][2:], rtol=0, atol=1e-5)


def test_other_steps_follow_the_released_scheduler(released: NamiPipeline) -> None:
    """Times told: linspace over the stage's timesteps 1000 ... 745, 744 ... 387, 386 ... 2, as NumPy spreads them."""
    told: list[float] = []
    hook = released.transformer.register_forward_hook(lambda _, inputs, output: told.append(inputs[3][0].item()))
    generate(released, num_inference_steps=[1, 4, 5])
    hook.remove()
    expected = [1000, 744, 625, 506, 387, 386, 290, 194, 98, 2]
    assert [1000 * time for time in told] == pytest.approx(expected, abs=1e-3)


def test_the_conventions_are_stated_in_the_configs(released: NamiPipeline) -> None:
    config = released.bridge.config
    assert [config[key] for key in ("windows", "time", "velocity_time", "timestep_spacing")] == [
        *("matched", "remaining", "local", "linspace")
    ]
    assert [window.start for window in released.bridge.windows] == pytest.approx([1, 0.8002, 0.5007], abs=1e-4)
    assert [window.end for window in released.bridge.windows] == pytest.approx([0.667, 0.334, 0])
    assert (released.transformer.config.output_head, released.transformer.config.rope_positions) == ("shared", "grid")
    assert released.config.resolution == 32


# --- text states -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_text_states_are_those_of_the_released_code(release: Path, released: NamiPipeline) -> None:
    """MT5's last states over 256 tokens without a mask; the first token's state of the BERT, 77 tokens, masked."""
    from transformers import AutoTokenizer, BertModel, MT5EncoderModel

    prompts = ["a red cat", "the house on a big tree"]
    mt5 = MT5EncoderModel.from_pretrained(release / "mt5")
    tokens = AutoTokenizer.from_pretrained(release / "mt5")(
        prompts, max_length=256, padding="max_length", truncation=True, return_tensors="pt"
    )
    sequence = mt5(tokens.input_ids, output_hidden_states=True).hidden_states[-1]
    bert = BertModel.from_pretrained(release / "mclip" / "clip_text_encoder", add_pooling_layer=False)
    tokens = AutoTokenizer.from_pretrained(release / "mclip" / "tokenizer")(
        prompts, max_length=77, padding="max_length", truncation=True, return_tensors="pt"
    )
    pooled = bert(tokens.input_ids, attention_mask=tokens.attention_mask.bool())[0][:, 0]
    states = released.encode_prompt(prompts)
    torch.testing.assert_close(states.sequence, sequence, rtol=0, atol=1e-6)
    torch.testing.assert_close(states.pooled, pooled, rtol=0, atol=1e-6)
    assert states.sequence.shape == (2, 256, 16)
    assert states.sequence[:, -1].any()


# --- the jump ------------------------------------------------------------------------------------------------------


def test_the_released_jump_is_for_one_size(released: NamiPipeline) -> None:
    with pytest.raises(ValueError, match="a shift for each position of 8x8 latents, and can't make 8x12"):
        generate(released, height=32, width=48, latents=None)


def test_restored_noise_is_for_any_size(release: Path, tmp_path: Path) -> None:
    pipeline = convert(release, tmp_path / "out")  # --jump matched is the default
    assert (pipeline.bridge.kind, pipeline.bridge.residual_noise) == ("matched", True)
    latents = generate(pipeline, height=32, width=48, latents=None, generator=torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 16, 24)
    same = convert(release, tmp_path / "released", "--jump", "released").bridge
    assert pipeline.bridge.windows == same.windows


# --- what doesn't fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("proj_out.bias"), "proj_out.bias is missing"),
        (lambda w: w.pop("x_embedder.weight"), "x_embedder.weight is missing"),
        (lambda w: w.update({"extra.weight": torch.zeros(1)}), "extra.weight is none of this model's"),
        (lambda w: w.update({"proj_out.bias": torch.zeros(3)}), r"proj_out.bias has the shape \(3,\) and not \(16,\)"),
    ],
)
def test_a_key_that_does_not_fit_names_itself(
    change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = part_of("transformer.")
    change(weights)
    source = write_release(tmp_path / "weights", weights)
    assert main(["convert", str(source), "--output", str(tmp_path / "out"), *SINGLE_LAYERS]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.mkdir, (tmp_path / "harm",))  # type: ignore[return-value]

    source = write_release(tmp_path / "weights")
    torch.save({"scale": Harmful()}, source / "bridge_flow.bin")
    assert main(["convert", str(source), "--output", str(tmp_path / "out"), *SINGLE_LAYERS]) == 2
    assert "bridge_flow.bin can't be read as weights" in capsys.readouterr().err
    assert not (tmp_path / "harm").exists()


def test_the_split_of_another_depth_must_be_stated(release: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["convert", str(release), "--output", str(tmp_path / "out")]) == 2
    assert "4 single blocks, and --num_single_layers 1 7 6 add up to 14" in capsys.readouterr().err


def test_settings_beside_the_weights_are_read(tmp_path: Path) -> None:
    source = write_release(tmp_path / "weights")
    settings = {"stage_singleblock_index": [1, 2, 4], "axes_dims_rope": [4, 6, 6]}
    (source / "transformer" / "config.json").write_text(json.dumps(settings))
    assert main(["convert", str(source), "--output", str(tmp_path / "out")]) == 0
    transformer = NamiPipeline.from_pretrained(tmp_path / "out").transformer
    assert transformer.config.num_single_layers == [1, 1, 2]


def test_without_text_encoders_it_takes_encoded_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = convert(write_release(tmp_path / "weights"), tmp_path / "out", "--jump", "released")
    assert "mt5 is not there" in capsys.readouterr().out
    torch.testing.assert_close(generate(pipeline), RECORD["latents"], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="this pipeline has no text encoder: give prompt_embeds"):
        pipeline("a red cat")


def test_what_is_there_stays(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert main(["convert", str(release), "--output", str(tmp_path / "out"), *SINGLE_LAYERS]) == 2
    assert "exists: remove it, or give another --output" in capsys.readouterr().err
    shutil.copytree(release, tmp_path / "half")
    (tmp_path / "half" / "bridge_flow.bin").unlink()
    assert main(["convert", str(tmp_path / "half"), "--output", str(tmp_path / "new"), *SINGLE_LAYERS]) == 2
    assert "bridge_flow.bin is missing" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(["convert", str(release), "--output", str(tmp_path / "new"), "--add_stage", "64"]) == 2
    assert "--add_stage is for a pipeline of NAMI or a run" in capsys.readouterr().err
