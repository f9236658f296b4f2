"""The plan of a recipe: its sums, what makes it fit, devices, frozen models, and shards on fake ranks."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.throughput import _CUDA_FLOPS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from nami_lightning.cli.main import main, make_parser
from nami_lightning.cli.plan import count_devices, read_setup
from nami_lightning.models.autoencoder import AutoencoderConfig
from nami_lightning.models.text_encoder import TextEncoderConfig
from nami_lightning.planning.encoder_memory import autoencoder, text_encoders
from nami_lightning.planning.flops import DEVICES, Device, find_device, matmul_dtype, transformer_flops
from nami_lightning.planning.inputs import Setup
from nami_lightning.planning.plan import USABLE_MEMORY, make_plan
from nami_lightning.planning.report import TrainingImages, samples_by_resolution
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.curriculum import Curriculum, Phase
from nami_lightning.training.strategies import FSDP2Strategy, parallelize

pytest_plugins = "helpers.tiny_models"

TINY = Path(__file__).parents[1] / "tiny.yaml"
SIDES = (8, 16, 32)


def setup_of(recipe: str | Path, *arguments: str) -> Setup:
    """The setup that ``lightning plan RECIPE ARGUMENTS`` plans."""
    options, overrides = make_parser().parse_known_args(["plan", str(recipe), *arguments])
    parsed = Recipe(options.recipe, overrides)
    return read_setup(parsed.config.name, parsed.parser.instantiate(parsed.config), options)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], str]:
    """Adds a device of so many bytes to the table; its name."""

    def add(size: float) -> str:
        monkeypatch.setitem(DEVICES, "toy", Device(size / 2**30, 1.0, 0.5, 0.25, ("toy",)))
        return "toy"

    return add


def test_parameters_are_the_modules() -> None:
    plan = make_plan(setup_of(TINY))
    module = Recipe(TINY).make_model()
    module.configure_model()
    network = module.transformer
    assert plan.parameters == sum(p.numel() for p in network.parameters())
    assert plan.shared_parameters + sum(stage.parameters for stage in plan.stages) == plan.parameters
    for stage in range(3):
        network.zero_grad()
        network(
            torch.randn(1, 3, SIDES[stage], SIDES[stage]),
            torch.randn(1, 8, 384),
            torch.randn(1, 384),
            torch.rand(1),
            stage,
        ).sum().backward()
        touched = sum(p.numel() for p in network.parameters() if p.grad is not None)
        # The text's way out of a last double block leads nowhere, so at stage 1 it has no gradient.
        block: Any = network.transformer_blocks[0]
        dead = block.ff_context, block.attn.to_add_out
        touched += sum(p.numel() for part in dead for p in part.parameters()) if stage == 0 else 0
        assert plan.stages[stage].parameters_used == touched


def test_memory_time_and_hours_follow_from_the_settings(toy: Callable[[float], str]) -> None:
    alone = make_plan(setup_of(TINY, "--device", toy(1e9), "--utilization", "0.5"))
    memory, size = alone.memory, 4 * alone.parameters
    assert (memory.weights, memory.gradients, memory.ema) == (size, size, size)
    assert memory.optimizer == 2 * size
    assert memory.communication == 0
    assert memory.activations == max(stage.saved for stage in alone.stages)
    for phase in alone.phases:
        flops = sum(n * stage.flops.model for n, stage in zip(phase.samples, alone.stages, strict=True))
        assert phase.seconds_per_step == pytest.approx(flops / (0.25e12 * 0.5))
        assert phase.gpu_hours == pytest.approx(phase.seconds_per_step * phase.steps / 3600)
    several = make_plan(setup_of(TINY, "--device", "toy", "--utilization", "0.5", "--devices", "2"))
    assert several.memory.communication == size
    assert several.gpu_hours == pytest.approx(alone.gpu_hours)
    sgd = setup_of(TINY, "--model.optimizer", "torch.optim.SGD", "--trainer.callbacks", "[]")
    assert make_plan(sgd).memory.optimizer == make_plan(sgd).memory.ema == 0


def test_of_a_lora_the_adapter_alone_has_gradients() -> None:
    lora = make_plan(
        setup_of(TINY, "--model.pretrained", "nami", "--model.lora", "{rank: 3, target_modules: [attn.to_q]}")
    )
    trained = 4 * 3 * 3 * (32 + 32)  # in each of three blocks 32 wide: two matrices of rank 3, in float32
    memory = lora.memory
    assert (memory.gradients, memory.ema, memory.optimizer) == (trained, trained, 2 * trained)
    assert memory.weights == 4 * lora.parameters + trained
    assert lora.parameters == make_plan(setup_of(TINY)).parameters


def test_samples_and_epochs_by_bucket() -> None:
    plan = make_plan(setup_of(TINY))
    drawn = samples_by_resolution(plan, TrainingImages("test", {8: 100, 16: 100, 32: 200}))
    totals = [2 * (20 * 4 + 20 * 2), 2 * (20 * 2 + 20 * 4 + 20 * 2), 2 * (20 + 20 + 20 * 4)]
    assert drawn[8] == [totals[0] / 4, 0, 0]
    assert drawn[16] == [totals[0] / 4, pytest.approx(totals[1] / 3), 0]
    assert drawn[32] == [totals[0] / 2, pytest.approx(totals[1] * 2 / 3), totals[2]]


def test_flux_base_is_its_own_recipes_network_and_samples() -> None:
    beside = setup_of("nami_2b", "--devices", "64").flux_base()
    itself = setup_of("flux_base_2b", "--devices", "64")
    assert beside.resolutions == itself.resolutions
    assert beside.image_tokens(0) == itself.image_tokens(0)
    assert [phase.ratio[0] * beside.curriculum.unit for phase in beside.curriculum.phases[:1]] == [
        phase.ratio[0] * itself.curriculum.unit for phase in itself.curriculum.phases[:1]
    ]
    assert beside.curriculum.total_steps == itself.curriculum.total_steps
    sizes = [sum(p.numel() for p in one.network.model.parameters()) for one in (beside, itself)]
    assert sizes == [2_117_643_840, 2_117_643_840]  # the released network's


BIGGER = ["--curriculum.unit", "4"]
SPARING = ["--model.activation_checkpointing", "1", "--data.init_args.max_micro_batch", "[1, 1, 1]"]


@pytest.mark.parametrize(
    ("given", "change", "key"),
    [
        ([], ["--model.activation_checkpointing", "1"], "--model.activation_checkpointing"),
        (["--model.activation_checkpointing", "1"], SPARING, "--data.init_args.max_micro_batch"),
        (SPARING, [*SPARING, "--trainer.strategy", "fsdp2"], "--trainer.strategy"),
        ([*SPARING, "--trainer.strategy", "fsdp2"], [*SPARING, "--trainer.strategy", "fsdp2"], "--devices"),
    ],
)
def test_what_does_not_fit_is_told_how_to_fit(
    toy: Callable[[float], str], capsys: pytest.CaptureFixture[str], given: list[str], change: list[str], key: str
) -> None:
    """A device between what a recipe takes as it is, and with the change that must be found."""

    def planned(*more: str) -> dict[str, Any]:
        assert main(["plan", str(TINY), "--devices", "2", "--device", "toy", "--json", *BIGGER, *given, *more]) == 0
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    devices = "4" if key == "--devices" else "2"
    before, after = (
        make_plan(setup_of(TINY, "--devices", n, *BIGGER, *settings)).memory.total
        for n, settings in (("2", given), (devices, change))
    )
    toy((before + after) / 2 / USABLE_MEMORY)
    answer = planned()
    assert not answer["fits"]
    assert answer["memory"]["total"] == before
    settings = answer["remedy"]["settings"]
    assert settings[0] == key
    again = planned(*settings)
    assert again["fits"]
    assert again["memory"]["total"] == answer["remedy"]["memory"]["total"]


def test_what_can_not_fit_is_said(toy: Callable[[float], str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(TINY), "--device", toy(1000)]) == 0
    text = capsys.readouterr().out
    assert "It does not fit" in text
    assert "No change of checkpointing" in text


def test_the_table_says_what_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(TINY), "--devices", "2", "--utilization", "0.3", "--images", "1000"]) == 0
    text = capsys.readouterr().out
    for part in ("at 30% of 19.5 TFLOP/s", "FLUX-base", "It fits", "Images: --images", "GPU-hours", "Not counted"):
        assert part in text
    assert main(["plan", str(TINY), "--devices", "5"]) == 2
    assert "can't be split evenly over 5" in capsys.readouterr().err
    assert main(["plan", str(TINY), "--device", "abacus"]) == 2
    assert "--device must be one of a100-40gb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "0"], "0 is not a whole number of at least 1"),
        (["--devices", "-8"], "-8 is not a whole number of at least 1"),
        (["--images", "0"], "0 is not a whole number of at least 1"),
        (["--trainer.devices", "0"], "trainer.devices and trainer.num_nodes must be at least 1; got 0 and 1"),
        (["--trainer.num_nodes", "0"], "must be at least 1; got 1 and 0"),
    ],
)
def test_numbers_below_one_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main(["plan", str(TINY), *arguments])
    except SystemExit as error:  # of argparse
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_devices_are_counted_as_lightning_counts_them() -> None:
    counts = {"2": 2, "[0, 1, 2]": 3, "0,1,": 2, "auto": 8, "-1": 8}
    for text, count in counts.items():
        trainer = Recipe(TINY, ["--trainer.devices", text]).config.trainer
        assert count_devices(trainer) == count, text


# --- devices and frozen models ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("called", "device", "lightnings"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100", "h100 sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie", "h100 pcie"),
    ],
)
def test_devices_are_known_by_cudas_name_and_have_lightnings_rates(called: str, device: str, lightnings: str) -> None:
    found = find_device(called)
    assert found is DEVICES[device]
    rates = _CUDA_FLOPS[lightnings]
    ours = [found.peak_flops(dtype) for dtype in ("bfloat16", "tfloat32", "float32")]
    assert ours == pytest.approx([rates[torch.bfloat16], rates["tfloat32"], rates[torch.float32]])
    assert find_device("NVIDIA Abacus") is None


def test_the_number_type_is_what_the_settings_compute_in() -> None:
    assert matmul_dtype("bf16-mixed") == "bfloat16"
    assert matmul_dtype("32-true", "bfloat16") == "bfloat16"
    assert matmul_dtype(None) == "float32"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert matmul_dtype("32-true") == "tfloat32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_frozen_models_are_known_by_their_configurations(t5: Any, clip: Any, vae: Any, tmp_path: Path) -> None:
    for name, part in (("t5", t5[0]), ("clip", clip[0]), ("vae", vae)):
        part.config.save_pretrained(tmp_path / name) if name != "vae" else vae.save_config(tmp_path / name)
    texts = TextEncoderConfig(str(tmp_path / "t5"), str(tmp_path / "clip"), max_length=16, dtype="bfloat16")
    encoders = text_encoders(texts, 2)
    for found, (model, _) in zip(encoders, (t5, clip), strict=True):
        assert found.memory == 2 * sum(p.numel() for p in model.parameters())
        tokens = torch.ones(1, 16, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens, torch.ones_like(tokens))
        assert found.flops == (pytest.approx(counter.get_total_flops(), rel=0.01),) * 2
    assert text_encoders(replace(texts, cache=True), 1)[0].flops == (0,)

    settings = AutoencoderConfig(str(tmp_path / "vae"), factor=2)
    (found,) = autoencoder(settings, [[16], [32, 16]], [4, 2])
    assert found.memory == 4 * sum(p.numel() for p in vae.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(torch.randn(1, 3, 16, 16))
    assert found.flops[0] == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert found.flops[1] > 4.9 * found.flops[0]
    assert found.peak > 2 * 8 * 32 * 32 * 4  # two images of eight channels, in and out of a layer

    absent = text_encoders(TextEncoderConfig("nobody/nothing"), 1)[0]
    assert (absent.memory, absent.flops) == (None, (0,))


# --- the 2B recipe on eight ranks ------------------------------------------------------------------


@pytest.fixture
def eight_ranks() -> Iterator[FSDP2Strategy]:
    """FSDP2 on the first of eight ranks whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    strategy = FSDP2Strategy()
    strategy._device_mesh = init_device_mesh("cpu", (1, 8), mesh_dim_names=("replicate", "shard"))
    yield strategy
    dist.destroy_process_group()


@pytest.mark.parametrize("recipe", ["nami_2b", str(TINY)])
def test_a_ranks_shard_is_the_plans_weights(eight_ranks: FSDP2Strategy, recipe: str) -> None:
    setup = setup_of(recipe, "--devices", "8", "--trainer.strategy", "fsdp2", "--curriculum.unit", "8")
    with torch.device("meta"):
        model = setup.network.make()
    parallelize(model, eight_ranks, setup.activation_checkpointing)
    shards = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
    assert len(shards) == len(list(model.parameters()))
    local = sum(shard.numel() * shard.element_size() for shard in shards)
    plan = make_plan(setup)
    assert plan.memory.weights == pytest.approx(local, rel=1e-3)
    assert plan.memory.weights < 4 * plan.parameters / 7


@pytest.mark.parametrize("views", [False, True])
def test_ddp_of_one_process_has_buckets_too(tmp_path: Path, views: bool) -> None:
    named = "lightning.pytorch.strategies.DDPStrategy"
    as_views = f"{{class_path: {named}, init_args: {{gradient_as_bucket_view: true}}}}"
    setup = setup_of(TINY, "--devices", "1", "--trainer.strategy", as_views if views else "ddp")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    wrapped = DistributedDataParallel(setup.network.make(), gradient_as_bucket_view=views, find_unused_parameters=True)
    in_buckets = sum(map(int, wrapped._get_ddp_logging_data()["bucket_sizes"].split(",")))
    beside: list[int] = []
    for last in (False, True):  # a step of two micro-batches, then one of a single one
        wrapped.require_backward_grad_sync = last
        wrapped(torch.randn(1, 3, 8, 8), torch.randn(1, 8, 384), torch.randn(1, 384), torch.rand(1), 0).sum().backward()
        storages = {p.grad.untyped_storage() for p in wrapped.parameters() if p.grad is not None}
        beside.append(len(storages))
    dist.destroy_process_group()
    assert beside[0] > 20  # each gradient is a tensor of its own
    assert (beside[1] < 5) == views
    assert make_plan(setup).memory.communication == in_buckets
    phase = Phase(1, [1, 0, 0], 1e-3)
    single = replace(setup, curriculum=Curriculum([phase], 1), max_micro_batch=(1, 1, 1))
    assert make_plan(single).memory.communication == (0 if views else in_buckets)
    assert make_plan(setup_of(TINY, "--devices", "1", "--trainer.strategy", "auto")).memory.communication == 0


# --- encoders that packaged recipes name -------------------------------------------------------------


PARAMETERS = {
    "google/mt5-large": 564e6,
    "google/mt5-xxl": 5.66e9,
    "BAAI/AltCLIP-m9": 560e6,
    "Tencent-Hunyuan/HunyuanDiT-Diffusers": 352e6,
    "black-forest-labs/FLUX.1-schnell": 83_819_683,
}
"""As published."""


@pytest.mark.parametrize(("recipe", "trained", "encoded"), [("nami_0.6b", 0.466, 0.599), ("nami_2b", 1.47, 2.72)])
def test_encoding_is_counted_without_a_network(recipe: str, trained: float, encoded: float) -> None:
    setup = setup_of(recipe, "--devices", "64")
    numbers = {model.name: (model.memory or 0) / 2 for model in setup.frozen}
    assert numbers == {name: pytest.approx(PARAMETERS[name], rel=0.01) for name in numbers}
    flops = transformer_flops(setup.network.config, 0, setup.image_tokens(0), setup.text_tokens)
    assert flops.model / 1e12 == pytest.approx(trained, rel=0.01)
    assert sum(model.flops[0] for model in setup.frozen) / 1e12 == pytest.approx(encoded, rel=0.01)
    assert setup_of(recipe, "--devices", "64", "--stored_encodings").frozen == ()


def test_an_autoencoders_peak_is_that_without_autocast() -> None:
    """Under autocast, norms in float32 would take it from 10 to 14 GiB."""
    model = next(model for model in setup_of("nami_0.6b", "--devices", "8").frozen if not model.of_text)
    assert model.peak / 2**30 == pytest.approx(10.05, abs=0.02)
