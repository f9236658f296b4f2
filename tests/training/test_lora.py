"""Training adapters: what changes and what stays, resuming, shards, the EMA's, and what a fresh process loads."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_contents import numbers, same_numbers
from helpers.processes import end, lightning, run, start
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nami_lightning import MuonAdamW, NamiTransformer2DModel
from nami_lightning.models.lora import LoraSettings, add_adapter, trained_parameters
from nami_lightning.pipelines.nami_pipeline import NamiPipeline
from nami_lightning.runs.export import find_start
from nami_lightning.runs.load import load_module, load_pipeline
from nami_lightning.runs.recipe import Recipe
from nami_lightning.runs.run_dir import Run
from nami_lightning.training.strategies import to_float8

TINY = Path(__file__).parents[1] / "tiny.yaml"
PHASES = (
    "{steps: 3, ratio: [2, 4, 0], learning_rate: 0.03, warmup_steps: 0}",  # stage 3 is not touched yet
    "{steps: 3, ratio: [2, 2, 4], learning_rate: 0.03, warmup_steps: 0}",
)
LORA = ["--model.lora.rank", "8", "--model.lora.alpha", "4", "--trainer.val_check_interval", "3"]
FILE = "pytorch_lora_weights.safetensors"


def phases(*steps: str) -> list[str]:
    return ["--curriculum.phases", f"[{', '.join(steps)}]"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the tiny recipe's network with random weights."""
    module = Recipe(TINY).make_model()
    module.configure_model()
    with torch.no_grad():
        for parameter in module.transformer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    module.bridge.fitted.fill_(True)
    folder = tmp_path_factory.mktemp("base")
    module.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(tiny_module: list[str], base: Path) -> list[str]:
    return [*tiny_module, "--model.pretrained", str(base), *LORA]


@pytest.fixture(scope="module")
def whole(arguments: list[str]) -> Path:
    """A run that was never interrupted."""
    run([*arguments, *phases(*PHASES), "--name", "whole"])
    return Path(arguments[2]) / "whole"


@pytest.fixture(scope="module")
def exported(whole: Path) -> Path:
    lightning(["export", str(whole)])
    return whole / "loras" / "step=0000006"


def draw(pipeline: Any) -> Tensor:
    images: Tensor = pipeline(
        ["red apple", "dog"],
        num_inference_steps=[2, 2, 2],
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        output_type="pt",
    ).images
    return images


def draw_with_diffusers(base: Path, lora: Path, output: Path) -> None:
    """Be a script that knows nothing of the run."""
    pipeline = NamiPipeline.from_pretrained(base)
    pipeline.load_lora_weights(lora)
    torch.save(draw(pipeline), output)


def test_the_adapter_is_trained_and_nothing_else(whole: Path, base: Path) -> None:
    trained, before = (
        load_module(Run(whole), ema=False).transformer,
        NamiTransformer2DModel.from_pretrained(base, subfolder="transformer"),
    )
    weights = {name.replace(".base_layer", ""): weight for name, weight in trained.state_dict().items()}
    assert all(torch.equal(weights.pop(name), weight) for name, weight in before.state_dict().items())
    assert all(".lora_" in name for name in weights)
    assert all(weight.abs().max() > 0 for name, weight in weights.items() if "single_transformer_blocks" in name)
    adapted = {name.partition(".lora_")[0].partition("blocks.")[2][2:] for name in weights}
    assert adapted == set(LoraSettings().targets)
    assert {weight.shape[0] for name, weight in weights.items() if "lora_A" in name} == {8}


def test_a_checkpoint_holds_the_adapter_and_its_optimizer(whole: Path) -> None:
    saved = torch.load(Run(whole).checkpoint(), weights_only=True)
    names = {name.partition(".")[0]: name for name in saved["state_dict"]}
    assert set(names) == {"transformer", "ema", "bridge", "running_losses"}
    networks = [name for name in saved["state_dict"] if name.startswith(("transformer.", "ema."))]
    assert all(".lora_" in name for name in networks)
    stepped = saved["optimizer_states"][0]["state"]
    assert 0 < len(stepped) <= len(networks) / 2


def test_without_its_adapter_it_draws_as_the_base_bit_for_bit(whole: Path, base: Path) -> None:
    pipeline = load_pipeline(str(whole))
    with_adapter = draw(pipeline)
    pipeline.disable_lora()
    expected = draw(NamiPipeline.from_pretrained(base))
    assert torch.equal(draw(pipeline), expected)
    assert (with_adapter - expected).abs().max() > 0.002


def test_a_fresh_process_draws_as_the_training_module(whole: Path, exported: Path, base: Path, tmp_path: Path) -> None:
    processes = start(draw_with_diffusers, (base, exported, tmp_path / "images.pt"), 1, tmp_path / "output")
    assert end(processes) == 0, (tmp_path / "output").read_text()
    expected = draw(load_module(Run(whole)).pipeline())
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), expected, rtol=0, atol=1e-5)


def test_the_emas_adapter_is_exported(whole: Path, exported: Path, tmp_path: Path) -> None:
    lightning(["export", str(whole), "--no-ema", "--output", str(tmp_path / "trained")])
    saved = torch.load(Run(whole).checkpoint(), weights_only=True)["state_dict"]
    for folder, network in ((exported, "ema"), (tmp_path / "trained", "transformer")):
        weights = load_file(folder / FILE)
        expected = {name: tensor for name, tensor in saved.items() if name.startswith(f"{network}.")}
        names = {name.replace(f"{network}.", "transformer.", 1).replace(".default", ""): name for name in expected}
        assert names.keys() == weights.keys()
        assert all(torch.equal(weights[name], expected[there]) for name, there in names.items())
    with safe_open(exported / FILE, "pt") as file:
        assert '"transformer.lora_alpha": 4' in file.metadata()["lora_adapter_metadata"]


def test_merged_it_draws_the_same(whole: Path, tmp_path: Path) -> None:
    lightning(["export", str(whole), "--merge", "--output", str(tmp_path / "merged")])
    merged = NamiPipeline.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in merged.transformer.state_dict())
    torch.testing.assert_close(draw(merged), draw(load_pipeline(str(whole))), rtol=0, atol=1e-5)


def test_resumed_it_ends_with_the_same_bits(arguments: list[str], whole: Path) -> None:
    settings = [*arguments, "--name", "resumed"]
    run([*settings, *phases(PHASES[0].replace("steps: 3", "steps: 2"))])
    run([*settings, *phases(*PHASES)])
    ends = [numbers(Run(folder).checkpoint()) for folder in (whole, whole.parent / "resumed")]
    assert same_numbers(*ends) == []
    printed = run([*settings, *phases(*PHASES, PHASES[1]), "--model.lora.rank", "4"], status=2)
    assert "its lora.rank is 8, this recipe's 4" in printed


def test_two_processes_with_shards_train_as_one(arguments: list[str], whole: Path) -> None:
    run([*arguments, *phases(*PHASES), "--name", "shards", "--trainer.devices", "2", "--trainer.strategy", "fsdp2"])
    for ema in (False, True):
        one, two = (load_module(Run(folder), ema=ema).state_dict() for folder in (whole, whole.parent / "shards"))
        assert one.keys() == two.keys()
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, rtol=0, atol=2e-5, equal_nan=True, msg=name)


def test_a_run_is_a_start_by_its_export(whole: Path, arguments: list[str]) -> None:
    started = [*arguments, "--name", "started", "--model.pretrained", str(whole)]
    run([*started, *phases(PHASES[0])])
    pipeline = whole / "pipelines" / "step=0000006"
    assert f"pretrained: {pipeline}" in (whole.parent / "started" / "recipe.yaml").read_text()
    NamiTransformer2DModel.from_pretrained(pipeline, subfolder="transformer")
    newer = whole / "checkpoints" / "step=0000007.ckpt"
    shutil.copy(Run(whole).checkpoint(6), newer)
    recipe = Recipe(TINY, started[1:])
    assert [getattr(find_start(recipe, fresh), "step", None) for fresh in (False, True)] == [6, 7]
    newer.unlink()


@pytest.mark.parametrize(
    ("key", "value", "difference"),
    [
        ("rank", "4", "lora.rank is 8, this recipe's 4"),
        ("alpha", "8", "lora.alpha is 4, this recipe's 8"),
        ("target_modules", "[attn.to_q]", r"lora.target_modules is \[.*\], this recipe's \['attn.to_q'\]"),
    ],
)
def test_another_adapter_does_not_resume(
    whole: Path, arguments: list[str], key: str, value: str, difference: str
) -> None:
    module = Recipe(TINY, [*arguments[1:], *phases(*PHASES), f"--model.lora.{key}", value]).make_model()
    with pytest.raises(ValueError, match=difference):
        module.identity.check(torch.load(Run(whole).checkpoint(), weights_only=True))


def test_a_lora_needs_the_weights_that_it_was_trained_beside(whole: Path, base: Path) -> None:
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    weights = load_file(file)
    save_file(weights | {"x_embedder.bias": weights["x_embedder.bias"] + 0.01}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold the weights that this run was trained beside"):
        load_module(Run(whole))
    file.write_bytes(content)
    load_module(Run(whole))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.lora trains adapters beside trained weights: name their folder"):
        Recipe(TINY, LORA).make_model()
    with pytest.raises(ValueError, match="needs a rank of at least 1 and alpha above 0; got 0, None"):
        LoraSettings(rank=0)
    with pytest.raises(ValueError, match="target_modules is empty"):
        LoraSettings(target_modules=[])
    with pytest.raises(ValueError, match=r"names attn.to_x, which no block has: its linear layers are .*attn.to_q"):
        add_adapter(Recipe(TINY).make_model().make_transformer(), LoraSettings(target_modules=["attn.to_x"]))


def test_muon_and_float8_know_adapters() -> None:
    transformer = Recipe(TINY).make_model().make_transformer()
    add_adapter(transformer, LoraSettings(rank=16))
    optimizer = MuonAdamW(trained_parameters(transformer), lr=0.1)
    assert len(optimizer.param_groups) == 1
    assert sum(p.numel() for p in optimizer.param_groups[0]["params"]) == sum(
        p.numel() for p in transformer.parameters() if p.requires_grad
    )
    pytest.importorskip("torchao")
    to_float8(transformer)
    rounded = [name for name, layer in transformer.named_modules() if type(layer).__name__ == "Float8Linear"]
    assert "transformer_blocks.0.attn.to_q.base_layer" in rounded
    assert not any("lora" in name for name in rounded)
