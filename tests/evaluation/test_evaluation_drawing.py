"""Images of benchmarks: drawn by ours and by diffusers' pipelines, resumed, and the whole command on tiny models."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from helpers.tiny_judges import FILE, make_clip, make_detector, make_vilt
from helpers.tiny_models import MakeFlux, TextModel
from PIL import Image

from nami_lightning.cli.evaluate import model_names
from nami_lightning.cli.main import main
from nami_lightning.evaluation.generate import GeneratedImages, GenerationSettings, generate
from nami_lightning.evaluation.nami1k.prompts import read_prompts
from nami_lightning.evaluation.prompts import Item
from nami_lightning.evaluation.side_by_side import evenly_spaced, side_by_side
from nami_lightning.models.autoencoder import PixelCodec
from nami_lightning.models.bridge import BridgeFlow
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.pipelines.sampler_settings import SamplerSettings
from nami_lightning.utils.image_grid import save_image

pytest_plugins = "helpers.tiny_models"

ITEMS = [Item("one", "a red cat", "open", {"kind": "open"}), Item("two", "the big tree", "open", {"kind": "open"})]
SAMPLING = GenerationSettings(SamplerSettings(num_inference_steps=2, guidance_scale=2.0))


@pytest.fixture
def flux(tmp_path: Path, make_flux: MakeFlux, vae: AutoencoderKL, clip: TextModel, t5: TextModel) -> str:
    """A folder with diffusers' own FLUX pipeline, tiny."""
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, clip[0], clip[1], t5[0], t5[1], make_flux(1, 1, guidance_embeds=True)
    )
    pipeline.save_pretrained(tmp_path / "flux")
    return str(tmp_path / "flux")


@pytest.fixture
def nami(tmp_path: Path, clip: TextModel, t5: TextModel) -> str:
    """A folder with a tiny NAMI pipeline of 8 and 16 px."""
    transformer = NamiTransformer2DModel(
        in_channels=3,
        patch_size=4,
        num_layers=[1, 0],
        num_single_layers=[0, 1],
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=[4, 6, 6],
    )
    bridge = BridgeFlow([1.0, 1.0], 3)
    bridge.fitted.fill_(True)
    pipeline = NamiPipeline(transformer, bridge, PixelCodec(), *t5, *clip, resolution=16, max_sequence_length=8)
    pipeline.save_pretrained(tmp_path / "nami")
    return str(tmp_path / "nami")


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


def test_an_image_depends_on_its_prompt_and_seed_alone(nami: str, tmp_path: Path) -> None:
    folder = GeneratedImages(tmp_path / "images", "nami")
    generate(nami, folder, ITEMS, ITEMS, 2, SAMPLING)
    paths = [folder.path(item, i) for item in ITEMS for i in range(2)]
    assert [str(path.relative_to(tmp_path / "images")) for path in paths[:2]] == [
        "one/samples/00000.png",
        "one/samples/00001.png",
    ]
    assert json.loads((tmp_path / "images/one/metadata.jsonl").read_text()) == {"prompt": "a red cat", "kind": "open"}

    # Drawn alone by the pipeline itself.
    pipeline = NamiPipeline.from_pretrained(nami)
    for item in ITEMS:
        for i in range(2):
            alone = pipeline(
                item.prompt,
                num_inference_steps=2,
                guidance_scale=2.0,
                generator=torch.Generator().manual_seed(42 + i),
            ).images[0]
            assert np.abs(pixels(folder.path(item, i)) - np.array(alone).astype(int)).max() <= 1


def test_only_what_is_missing_is_drawn_again_and_the_same(nami: str, tmp_path: Path) -> None:
    folder = GeneratedImages(tmp_path / "images", "nami")
    generate(nami, folder, ITEMS, ITEMS, 2, SAMPLING)
    paths = [folder.path(item, i) for item in ITEMS for i in range(2)]
    was = {path: (path.stat().st_mtime_ns, pixels(path)) for path in paths}
    paths[1].unlink()
    (paths[1].parent / ".00001.png.1.partial").write_bytes(b"cut short")
    generate(nami, folder, ITEMS, ITEMS, 2, GenerationSettings(batch_size=1))  # the settings are the folder's own
    assert np.abs(pixels(paths[1]) - was[paths[1]][1]).max() <= 1
    assert [path for path in paths if path.stat().st_mtime_ns != was[path][0]] == [paths[1]]
    generate(nami, folder, ITEMS, ITEMS, 3, SAMPLING)
    assert folder.missing(ITEMS, 3) == []


def test_images_of_two_kinds_never_mix(nami: str, tmp_path: Path) -> None:
    folder = GeneratedImages(tmp_path / "images", "nami")
    generate(nami, folder, ITEMS, ITEMS[:1], 1, SAMPLING)
    for sampling, message in (
        (GenerationSettings(SamplerSettings(num_inference_steps=3)), "generated with num_inference_steps 2, not 3"),
        (GenerationSettings(SamplerSettings(solver="heun")), "generated with solver left to the pipeline, not heun"),
        (GenerationSettings(seed=7), "generated with seed 42, not 7"),
        (GenerationSettings(dtype="bfloat16"), "generated with dtype None, not bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(nami, folder, ITEMS, ITEMS, 1, sampling)
    with pytest.raises(ValueError, match="generated with prompts"):
        generate(nami, folder, ITEMS[:1], ITEMS[:1], 1, SAMPLING)
    with pytest.raises(ValueError, match="generated with source"):
        generate(f"{nami}/", folder, ITEMS, ITEMS, 1, SAMPLING)


def test_any_pipeline_of_diffusers_draws(flux: str, tmp_path: Path) -> None:
    folder = GeneratedImages(tmp_path / "images", "flux")
    sampler = SamplerSettings(num_inference_steps=3, height=16, width=16, guidance_scale=1.0)
    sampling = GenerationSettings(sampler, batch_size=3)
    generate(flux, folder, ITEMS, ITEMS, 2, sampling)
    first, second = pixels(folder.path(ITEMS[0], 0)), pixels(folder.path(ITEMS[0], 1))
    assert first.shape == (16, 16, 3)
    assert (first != second).any(), "another seed is another image"
    other = GeneratedImages(tmp_path / "other", "flux")
    with pytest.raises(ValueError, match=r"FluxPipeline of .* does not take solver"):
        generate(flux, other, ITEMS, ITEMS, 2, GenerationSettings(SamplerSettings(solver="heun")))
    assert other.recorded_settings is None, "a refused setting leaves nothing behind"


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = GeneratedImages(tmp_path / "images", "model")
    with pytest.raises(FileNotFoundError, match="nowhere/nothing is neither a run"):
        generate("nowhere/nothing", folder, ITEMS, ITEMS, 1, SAMPLING)


def test_models_have_different_names() -> None:
    assert model_names(["runs/a", "black-forest-labs/FLUX.1-dev"], None) == ["a", "FLUX.1-dev"]
    assert model_names(["a/x", "b/x"], ["first", "second"]) == ["first", "second"]
    for runs, names, message in (
        (["a/x", "b/x"], None, "have the same name"),
        (["a"], ["b", "c"], "--names gives 2 names for 1"),
        (["a"], ["../b"], "can't be the name of a model's folder"),
        (["a"], ["ratings"], "can't be the name of a model's folder"),
    ):
        with pytest.raises(ValueError, match=message):
            model_names(runs, names)


def test_side_by_side_is_a_row_a_prompt_and_a_column_a_model(tmp_path: Path) -> None:
    items = evenly_spaced(read_prompts(), 3)
    assert [item.id for item in items] == ["open-001", "human-001", "long-001"]
    folders = [GeneratedImages(tmp_path / name, name) for name in ("a", "b")]
    for folder, color in zip(folders, ((255, 0, 0), (0, 0, 255)), strict=True):
        for item in items:
            save_image(Image.new("RGB", (200, 200), color), folder.path(item, 0))
    picture = np.array(side_by_side(folders, items, 128)).astype(int)
    red, blue = (np.abs(picture - color).sum(2) == 0 for color in ((255, 0, 0), (0, 0, 255)))
    assert red.sum() == blue.sum() == 3 * 128 * 128
    assert red.any(0).nonzero()[0].max() < blue.any(0).nonzero()[0].min()


# --- the command -------------------------------------------------------------------------------


def test_geneval_from_drawing_to_table(
    nami: str, flux: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "evaluation")
    common = ["--benchmark", "geneval", "--limit", "1", "--images", "1", "--output", out]
    small = ["--steps", "3", "--height", "16", "--width", "16", "--batch_size", "6"]
    assert main(["evaluate", nami, *common, *small, "--draw_only"]) == 0
    assert main(["evaluate", flux, *common, *small, "--draw_only"]) == 0
    assert not list(Path(out).rglob("results*.json"))
    models = ["--detector", str(make_detector(tmp_path / "detector")), "--clip", str(make_clip(tmp_path / "clip"))]
    assert main(["evaluate", nami, flux, *common, *models]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("Ovr", "nami", "flux", str(tmp_path / "detector"), "CPU cores", "6 prompts"))
    saved = json.loads((Path(out) / "geneval" / "nami" / "results-first-1.json").read_text())
    assert saved["scores"]["prompts"] == dict.fromkeys(saved["scores"]["tasks"], 1)
    assert saved["judge"]["detector"] == str(tmp_path / "detector")
    assert saved["drawing"]["settings"] == {"num_inference_steps": 3, "height": 16, "width": 16}
    assert len(saved["drawing"]["prompts"]) == 64


def test_dpg_from_questions_to_table(nami: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = tmp_path / "dpg.csv"
    questions.write_text(FILE)
    arguments = [
        "evaluate",
        nami,
        "--benchmark",
        "dpg",
        "--questions",
        str(questions),
        "--output",
        str(tmp_path / "out"),
    ]
    arguments += ["--images", "1", "--steps", "3"]
    assert main([*arguments]) == 2
    assert "the images are generated; to judge them, give --judge" in capsys.readouterr().err
    assert main([*arguments, "--judge", str(make_vilt(tmp_path / "vilt", 1))]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:7] == ["nami", *["100.0"] * 6]


def test_nami1k_from_drawing_to_pages_grid_and_description(
    nami: str, flux: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    common = ["--benchmark", "nami1k", "--output", str(out), "--limit", "1"]
    small = ["--steps", "3", "--height", "16", "--width", "16"]
    assert main(["evaluate", nami, flux, *common, *small, "--annotate", "--raters", "2"]) == 0
    assert sorted(path.name for path in out.rglob("*.html")) == ["rater-1-part-01.html", "rater-2-part-01.html"]
    assert main(["evaluate", nami, flux, *common, "--grid", "2"]) == 0
    assert Image.open(out / "nami1k" / "grid.png").width > 2 * 128
    assert main(["evaluate", "--benchmark", "nami1k", "--output", str(out), "--describe"]) == 0
    assert (out / "nami1k" / "prompts.svg").exists()
    assert main(["evaluate", "--benchmark", "nami1k", "--output", str(out), "--ratings", "nothing.json"]) == 2
    assert "nothing.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "geneval"], "no RUN is given"),
        (["a", "--benchmark", "geneval", "--describe"], "--describe and --ratings take no RUN"),
        (["a", "--benchmark", "geneval", "--annotate"], "--annotate belongs to --benchmark nami1k"),
        (["a", "--benchmark", "nami1k", "--judge", "b"], "--judge belongs to --benchmark dpg"),
        (["a", "--benchmark", "geneval", "--prompts", "b"], "GenEval's prompts are fixed"),
        (["a", "--benchmark", "nami1k", "--raters", "3"], "--raters needs --annotate"),
        (["a", "--benchmark", "nami1k", "--grid_side", "3"], "--grid_side needs --grid"),
        (["a", "--benchmark", "nami1k", "--topic_encoder", "b"], "--topic_encoder needs --describe"),
        (["a", "--benchmark", "nami1k", "--annotate", "--grid", "2"], "--annotate and --grid can't be combined"),
        (["a", "--benchmark", "dpg"], "needs --questions"),
        (["a", "--benchmark", "geneval", "--draw_only", "--clip", "b"], "--clip can't be used with --draw_only"),
        (["--benchmark", "nami1k", "--describe", "--seed", "0"], "--seed can't be used with --describe"),
        (["--benchmark", "nami1k", "--ratings", "a", "--prompts", "b"], "--prompts can't be used with --ratings"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--grid", "--batch_size", "--steps", "--height", "--page_side"])
def test_counts_are_at_least_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "a", "--benchmark", "nami1k", option, "0"])
    assert f"argument {option}: 0 is not a whole number of at least 1" in capsys.readouterr().err


def test_an_attempt_that_drew_nothing_binds_nothing(nami: str, tmp_path: Path, capsys: Any) -> None:
    arguments = [
        "evaluate",
        nami,
        "--benchmark",
        "nami1k",
        "--output",
        str(tmp_path / "out"),
        "--limit",
        "1",
        "--steps",
        "3",
    ]
    assert main([*arguments, "--width", "16", "--height", "17"]) == 2
    assert "must be multiples of" in capsys.readouterr().err
    assert main([*arguments, "--width", "16", "--height", "16"]) == 0


def test_another_model_in_the_same_folder_is_noticed(nami: str, tmp_path: Path, capsys: Any) -> None:
    model = tmp_path / "model"
    shutil.copytree(nami, model)
    small = ["--limit", "1", "--steps", "3", "--height", "16", "--width", "16"]
    arguments = ["evaluate", str(model), "--benchmark", "nami1k", "--output", str(tmp_path / "out"), *small]
    assert main(arguments) == 0
    os.utime(model / "model_index.json", (1, 1))
    assert main(arguments) == 2
    assert "has images that were generated with weights" in capsys.readouterr().err


def test_a_run_is_drawn_with_its_newest_checkpoint(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = "[{steps: 4, ratio: [1, 1, 1], learning_rate: 1.0e-3}]"
    assert main(["run", *tiny, "--curriculum.phases", phases]) == 0
    run = str(tmp_path / "runs" / "tiny")
    arguments: list[Any] = ["evaluate", run, "--benchmark", "nami1k", "--limit", "1", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--steps", "1", "2", "1", "--solver", "multistep"]) == 0
    folder = tmp_path / "out" / "nami1k" / "tiny"
    drawing = json.loads((folder / "drawing.json").read_text())
    assert drawing["weights"] == "step=0000004.ckpt"
    assert drawing["settings"] == {"num_inference_steps": [1, 2, 1], "solver": "multistep"}
    assert Image.open(folder / "human-001" / "samples" / "00000.png").size == (32, 32)
    (tmp_path / "runs" / "tiny" / "checkpoints" / "step=0000004.ckpt").rename(
        tmp_path / "runs" / "tiny" / "checkpoints" / "step=0000009.ckpt"
    )
    assert main(arguments) == 2
    assert "generated with weights step=0000004.ckpt, not step=0000009.ckpt" in capsys.readouterr().err


# --- images that are not finite --------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, pipeline_class: Any) -> None:
    """Let a transformer give NaN for the first image of every batch."""
    forward = pipeline_class.forward

    def spoilt(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        (output[0] if isinstance(output, tuple) else output)[0] = float("nan")
        return output

    monkeypatch.setattr(pipeline_class, "forward", spoilt)


def test_images_that_are_not_finite_are_named_and_not_written(
    nami: str, flux: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, NamiTransformer2DModel)
    poison(monkeypatch, FluxTransformer2DModel)
    sampler = SamplerSettings(num_inference_steps=3, height=16, width=16, guidance_scale=1.0)
    for name, source, origin in (("nami", nami, "since stage 1"), ("flux", flux, "in the result")):
        folder = GeneratedImages(tmp_path / "images" / name, name)
        generate(source, folder, ITEMS, ITEMS, 2, GenerationSettings(sampler, batch_size=2))
        assert folder.missing(ITEMS, 2) == [(ITEMS[0], 0), (ITEMS[1], 0)]
        assert folder.samples(ITEMS[0], 2) == [1]
        shown = capsys.readouterr().out
        assert f"{name}: 2 of 4 images have NaN or infinite values, and are not written" in shown
        assert f"one, image 0 (seed 42, prompt 'a red cat', {origin})" in shown
    folders = [GeneratedImages(tmp_path / "images" / name, name) for name in ("nami", "flux")]
    assert side_by_side(folders, ITEMS, 64).height > 2 * 64


def test_judges_leave_out_what_is_not_finite(
    nami: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, NamiTransformer2DModel)
    questions = tmp_path / "dpg.csv"
    questions.write_text(FILE)
    arguments = ["evaluate", nami, "--benchmark", "dpg", "--questions", str(questions), "--guidance_scale", "1"]
    arguments += ["--steps", "3", "--judge", str(make_vilt(tmp_path / "vilt", 1)), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--images", "2"]) == 0
    shown = capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "dpg" / "nami" / "results.json").read_text())
    assert saved["not_finite"]
    assert not any(Path(one["image"]).exists() for one in saved["not_finite"])
    assert {one["seed"] for one in saved["not_finite"]} <= {42, 43}
    assert f"nami: {len(saved['not_finite'])} image(s) with NaN or infinite values don't count" in shown
    assert main([*arguments, "--images", "1", "--batch_size", "1", "--names", "other"]) == 2
    assert "no model has an image to judge" in capsys.readouterr().err


def test_raters_see_no_image_that_is_not_finite(
    nami: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, NamiTransformer2DModel)
    arguments = ["evaluate", nami, "--benchmark", "nami1k", "--limit", "1", "--steps", "3", "--guidance_scale", "1"]
    assert main([*arguments, "--annotate", "--raters", "1", "--output", str(tmp_path)]) == 0
    key = json.loads((tmp_path / "nami1k" / "ratings" / "key.json").read_text())
    assert len(key["images"]) == 2, "three prompts in one batch, of which the first failed"
    assert "1 of 3 images have NaN" in capsys.readouterr().out


# --- names and options -------------------------------------------------------------------------------


def test_an_export_in_its_runs_folder_has_a_name(tmp_path: Path) -> None:
    assert model_names(["runs/openmoji/pipelines/step=0001050"], None) == ["openmoji-step=0001050"]
    both = model_names(["runs/a/pipelines/step=0001050", "runs/b/pipelines/step=0001050/"], None)
    assert both == ["a-step=0001050", "b-step=0001050"]
    for name in ("step=0001050", "my model (2)", "модель", "a@b"):
        assert model_names(["x"], [name]) == [name]
    for name in ("a/b", ".hidden", "a\nb", ""):
        with pytest.raises(ValueError, match="can't be the name"):
            model_names(["x"], [name])


def test_a_step_and_the_trained_weights_belong_to_a_run(nami: str, tmp_path: Path, capsys: Any) -> None:
    arguments = ["evaluate", nami, "--benchmark", "nami1k", "--limit", "1", "--output", str(tmp_path)]
    for option in (["--step", "4"], ["--no-ema"]):
        assert main([*arguments, *option]) == 2
        assert "is not a run: --step and --no-ema choose among" in capsys.readouterr().err
    assert main([*arguments, "--device", "cuda:77"]) == 2
    assert "--device cuda:77 can't be used on this machine" in capsys.readouterr().err
    assert main(["evaluate", "--benchmark", "nami1k", "--describe", "--no-ema"]) == 2
    assert "--ema can't be used with --describe" in capsys.readouterr().err
