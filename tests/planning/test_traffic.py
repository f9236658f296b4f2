"""The bytes that a plan says are sent, against those of real collectives on fake ranks; and what bounds a step."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from nami_lightning.cli.main import main, make_parser
from nami_lightning.cli.plan import read_setup
from nami_lightning.planning.flops import DEVICES, Device
from nami_lightning.planning.inputs import Setup, Sharding
from nami_lightning.planning.plan import USABLE_MEMORY, make_plan
from nami_lightning.planning.traffic import Traffic, step_traffic
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.strategies import FSDP2Strategy, parallelize

TINY = Path(__file__).parents[1] / "tiny.yaml"
RANKS, NODES = 8, 2
SIDES = (8, 16, 32)


@pytest.fixture
def ranks() -> Iterator[None]:
    """Eight ranks on two nodes, of which only this one is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def setup_of(recipe: str | Path, *arguments: str) -> Setup:
    """The setup that ``lightning plan RECIPE ARGUMENTS`` plans."""
    options, overrides = make_parser().parse_known_args(["plan", str(recipe), *arguments])
    parsed = Recipe(options.recipe, overrides)
    return read_setup(parsed.config.name, parsed.parser.instantiate(parsed.config), options)


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends: a ring's, by the size of each collective and of its group."""

    def __init__(self) -> None:
        super().__init__()
        self.sharding = self.replicas = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.sharding += args[0].nbytes - args[1].nbytes
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.sharding += args[1].nbytes - args[0].nbytes
        elif func is torch.ops.c10d.allreduce_.default:
            self.replicas += sum(tensor.nbytes for tensor in args[0]) * 2 * (NODES - 1) / NODES
        return func(*args, **(kwargs or {}))


def on_two_nodes(*arguments: str) -> Setup:
    settings = ["--devices", str(RANKS), "--devices_per_node", str(RANKS // NODES), "--curriculum.unit", "8"]
    return setup_of(TINY, *settings, "--trainer.strategy", "fsdp2", *arguments)


def test_a_step_sends_what_its_collectives_send(ranks: None) -> None:
    setup = on_two_nodes()
    assert (setup.nodes, setup.shards) == (NODES, RANKS // NODES)
    strategy = FSDP2Strategy(replicate=NODES)
    sizes = NODES, RANKS // NODES
    strategy._device_mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
    model = setup.network.make()
    parallelize(model, strategy)
    phase = setup.curriculum.phases[0]
    with Sent() as sent:
        for stage, side in enumerate(SIDES):
            for _ in range(setup.micro_batches(phase, stage)[0]):
                inputs = torch.randn(1, 3, side, side), torch.randn(1, 8, 384), torch.randn(1, 384), torch.rand(1)
                model(*inputs, stage).square().mean().backward()
    planned = step_traffic(setup, phase)
    # The text's way out of a last double block leads nowhere at stage 1: it has no gradient, and isn't reduced.
    assert sent.sharding == pytest.approx(planned.node, rel=0.06)
    assert sent.replicas == pytest.approx(planned.network, rel=0.12)


def test_shards_over_all_nodes_use_the_network_and_ddp_sends_all_gradients() -> None:
    setup = on_two_nodes()
    phase = setup.curriculum.phases[0]
    over_all = replace(setup, sharding=replace(setup.sharding, replicate=1))
    assert step_traffic(over_all, phase).node == 0
    assert step_traffic(over_all, phase).network > 2 * step_traffic(setup, phase).network
    parameters = sum(p.numel() for p in setup.network.model.parameters())
    once = 2 * 7 / 8 * 4 * parameters
    ddp = replace(setup, sharding=Sharding())
    assert step_traffic(ddp, phase) == Traffic(network=round(once))
    assert step_traffic(replace(ddp, devices_per_node=8), phase) == Traffic(node=round(once))
    assert step_traffic(replace(ddp, devices=1), phase) == Traffic()


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ([], "computing"),
        (["--node_bandwidth", "1e-6"], "links in a node"),
        (["--network_bandwidth", "1e-6"], "network"),
    ],
)
def test_a_plan_says_what_takes_longest(settings: list[str], bound: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--devices", "8", "--devices_per_node", "4", "--curriculum.unit", "8", "--trainer.strategy", "fsdp2"]
    slow = ["--utilization", "1e-3"] if not settings else []
    assert main(["plan", str(TINY), *arguments, "--json", *settings, *slow]) == 0
    for phase in json.loads(capsys.readouterr().out)["phases"]:
        parts = [phase[name] for name in ("compute_seconds", "node_seconds", "network_seconds")]
        assert phase["bound"] == bound
        assert phase["seconds_per_step"] == max(parts)
    assert main(["plan", str(TINY), *arguments, *settings, *slow]) == 0
    assert capsys.readouterr().out.count(f"  {bound}\n") == 3


def test_bandwidths_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "-3", "fast", "inf", "nan"):
        with pytest.raises(SystemExit):
            main(["plan", str(TINY), "--network_bandwidth", text])
        assert f"{text} is not a number above 0" in capsys.readouterr().err


def test_one_copy_of_the_weights_a_node_unless_told_otherwise(ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", lambda _: None)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    for given, expected in ((None, (2, 4)), (1, (1, 8)), (4, (4, 2))):
        strategy = FSDP2Strategy(replicate=given)
        strategy.num_nodes, strategy.parallel_devices = NODES, [torch.device("cpu")] * (RANKS // NODES)
        strategy._lightning_module = SimpleNamespace()  # type: ignore[assignment]
        environment: Any = SimpleNamespace(world_size=lambda: RANKS, local_rank=lambda: 0, global_rank=lambda: 0)
        strategy.cluster_environment = environment
        strategy.setup_environment()
        assert tuple(strategy.device_mesh.mesh.shape) == expected
        assert strategy.weights_mesh.ndim == (1 if expected[0] == 1 else 2)


def test_nami_2b_on_64_gpus_computes_longer_than_it_sends() -> None:
    """38 GB a rank and step over the network would take longer than a step computes."""
    planned = make_plan(setup_of("nami_2b", "--devices", "64", "--stored_encodings"))
    first = planned.phases[0]
    assert first.bound == "computing"
    assert first.traffic.node == pytest.approx(36.1e9, rel=0.01)
    assert first.traffic.network == pytest.approx(4.5e9, rel=0.01)
    over_all = replace(planned.setup, sharding=replace(planned.setup.sharding, replicate=1))
    assert step_traffic(over_all, over_all.curriculum.phases[0]).network == pytest.approx(40.6e9, rel=0.01)


def test_what_fits_only_on_shards_over_all_nodes_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--devices", "4", "--devices_per_node", "1", "--curriculum.unit", "4", "--trainer.strategy", "fsdp2"]
    sparing = ["--model.activation_checkpointing", "1", "--data.init_args.max_micro_batch", "[1, 1, 1]"]
    setup = setup_of(TINY, *given, *sparing)
    over_all = replace(setup, sharding=replace(setup.sharding, replicate=1))
    middle = sum(make_plan(one).memory.total for one in (setup, over_all)) / 2
    monkeypatch.setitem(DEVICES, "toy", Device(middle / USABLE_MEMORY / 2**30, 1.0, 0.5, 0.25, ("toy",)))
    command = ["plan", str(TINY), "--device", "toy", "--json", *given, *sparing]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert not answer["fits"]
    settings = answer["remedy"]["settings"]
    assert "--trainer.strategy.replicate" in settings
    assert main([*command, *settings]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["fits"]
    assert again["memory"]["total"] == answer["remedy"]["memory"]["total"]
