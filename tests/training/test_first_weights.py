"""Two ranks start from the weights of one process, to the last bit; what they start from is in memory once."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.processes import end, start
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from nami_lightning.callbacks.checkpoint import DirectCheckpointIO
from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.runs.recipe import Recipe
from nami_lightning.training.module import NamiModule
from nami_lightning.training.parallel.first_weights import make_with_first_weights
from nami_lightning.training.strategies import FSDP2Strategy, full_tensor

TINY = Path(__file__).parents[1] / "tiny.yaml"
STARTS = ("seed", "pretrained", "lora")
MEBIBYTE = 2**20


class OnHosts(FSDP2Strategy):
    """FSDP2 without Lightning's start of the ranks."""

    root_device = torch.device("cpu")


def start_ranks() -> OnHosts:
    """Let the ranks meet, and return a strategy over them."""
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    strategy = OnHosts()
    strategy._device_mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("replicate", "shard"))
    return strategy


def make_module(folder: Path, kind: str, strategy: Any = None) -> NamiModule:
    """Build the tiny recipe's module; with a strategy, on this rank of several."""
    settings = [] if kind == "seed" else ["--model.pretrained", str(folder / "source")]
    module = Recipe(TINY, settings + (["--model.lora.rank", "2"] if kind == "lora" else [])).make_model()
    if strategy is not None:
        module._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    module.use_ema = True
    module.configure_model()
    return module


def values(module: NamiModule) -> dict[str, Tensor]:
    """All weights of the network and of its average, whole."""
    assert module.ema is not None
    parts: dict[str, nn.Module] = {"network": module.transformer, "ema": module.ema}
    return {f"{part}.{n}": full_tensor(p.detach()) for part, of in parts.items() for n, p in of.named_parameters()}


def build_on_ranks(folder: Path) -> None:
    """Be one rank: build each start under both strategies, and write what this rank has."""
    strategy = start_ranks()
    found = {}
    for kind in STARTS:
        for name, one in (("fsdp2", strategy), ("ddp", SimpleNamespace(root_device=torch.device("cpu")))):
            module = make_module(folder, kind, one)
            found[kind, name] = values(module), module.pretrained_weights
    torch.save(found, folder / f"rank_{dist.get_rank()}.pt")


def test_two_ranks_start_from_the_weights_of_one(tmp_path: Path) -> None:
    torch.manual_seed(7)
    source = make_module(tmp_path, "seed").transformer
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter))
    source.save_pretrained(tmp_path / "source")
    output = tmp_path / "output"
    assert end(start(build_on_ranks, (tmp_path,), 2, output)) == 0, output.read_text()
    for rank in range(2):
        found = torch.load(tmp_path / f"rank_{rank}.pt")
        for (kind, name), (weights, pretrained) in found.items():
            alone = make_module(tmp_path, kind)
            expected = values(alone)
            assert pretrained == alone.pretrained_weights
            assert (pretrained is not None) == (kind == "lora")
            assert weights.keys() == expected.keys()
            for key, value in weights.items():
                assert torch.equal(value, expected[key]), (rank, kind, name, key)


def make_large(weights: bool) -> NamiTransformer2DModel:
    """A network of 200 MiB."""
    with torch.device("cpu" if weights else "meta"):
        network = NamiTransformer2DModel(
            in_channels=4,
            num_layers=[0],
            num_single_layers=[10],
            num_attention_heads=8,
            attention_head_dim=64,
            axes_dims_rope=[16, 24, 24],
            joint_attention_dim=64,
            pooled_projection_dim=64,
        )
    if weights:
        network.init_weights()
    return network


def memory(name: str) -> int:
    """Return a number of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure_on_ranks(folder: Path) -> None:
    """Be one rank: build a large network, and write how far its memory rose, and the size of the network."""
    strategy = start_ranks()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory("VmRSS")
    network = make_with_first_weights(make_large, strategy)
    size = sum(parameter.nbytes for parameter in network.parameters())
    (folder / f"rank_{dist.get_rank()}").write_text(f"{memory('VmHWM') - before} {size}")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux tells it")
def test_a_second_rank_never_holds_the_whole_network(tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert end(start(measure_on_ranks, (tmp_path,), 2, output)) == 0, output.read_text()
    (_, size), (second, _) = ([*map(int, (tmp_path / f"rank_{rank}").read_text().split())] for rank in range(2))
    assert size > 150 * MEBIBYTE
    assert size / 2 <= second < 0.75 * size  # its half, and a tensor at a time


def fail_on_rank_zero(folder: Path) -> None:
    """Be one rank, of which the first can't read its weights; write the error."""
    strategy = start_ranks()

    def make(weights: bool) -> NamiTransformer2DModel:
        if weights:
            raise ValueError("the file is damaged")
        return make_large(weights)

    try:
        make_with_first_weights(make, strategy)
    except Exception as error:
        (folder / f"rank_{dist.get_rank()}").write_text(f"{type(error).__name__}: {error}")


def test_what_stops_the_first_rank_stops_the_second(tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert end(start(fail_on_rank_zero, (tmp_path,), 2, output)) == 0, output.read_text()
    assert (tmp_path / "rank_0").read_text() == "ValueError: the file is damaged"
    assert (tmp_path / "rank_1").read_text() == "RuntimeError: another rank can't make the network: the file is damaged"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_a_checkpoint_stays_in_its_file(tmp_path: Path) -> None:
    """What is not in the file's own pages counts as anonymous memory, and each rank has its own."""
    path, weights = tmp_path / "step.ckpt", torch.arange(16 * MEBIBYTE, dtype=torch.float32)
    DirectCheckpointIO().save_checkpoint({"state_dict": {"weights": weights}}, path)
    before = memory("RssAnon")
    found = DirectCheckpointIO().load_checkpoint(path)["state_dict"]["weights"]
    assert torch.equal(found, weights)
    assert memory("RssAnon") - before < 0.1 * weights.nbytes
    found += 1
    assert torch.equal(torch.load(path)["state_dict"]["weights"], weights)
