"""How many graphs compiled blocks need, counted by a backend that compiles nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nami_lightning import NamiTransformer2DModel
from nami_lightning.training.ema import SwapWeights
from nami_lightning.training.strategies import parallelize

ASPECTS = [(8, 8), (8, 10), (8, 12), (8, 14), (10, 14)]
"""Heights and widths of the coarsest stage's latents, of different numbers of tokens."""


class Graphs:
    """Counts what torch hands its backend to compile, and runs it as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    counter, compile_module = Graphs(), nn.Module.compile

    def counted(module: nn.Module, *args: Any, **settings: Any) -> None:
        compile_module(module, *args, **settings, backend=counter)

    monkeypatch.setattr(nn.Module, "compile", counted)
    torch._dynamo.reset()
    torch.compiler.set_stance("default")  # whatever a test before left
    with torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True):  # torch's own, and put back afterwards
        yield counter
    torch._dynamo.reset()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make() -> NamiTransformer2DModel:
    """NAMI-0.6B's blocks, small."""
    torch.manual_seed(0)
    return NamiTransformer2DModel(
        in_channels=4,
        patch_size=2,
        num_layers=[4, 0, 0],
        num_single_layers=[1, 4, 3],
        num_attention_heads=2,
        attention_head_dim=16,
        axes_dims_rope=[4, 6, 6],
        joint_attention_dim=8,
        pooled_projection_dim=8,
    )


def run(network: nn.Module, stage: int, aspect: tuple[int, int]) -> Tensor:
    height, width = (side << stage for side in aspect)
    inputs = torch.randn(2, 4, height, width), torch.randn(2, 8, 8), torch.randn(2, 8), torch.rand(2)
    output: Tensor = network(*inputs, stage)
    return output


def test_one_graph_a_kind_of_block_and_shape(graphs: Graphs) -> None:
    model = make()
    parallelize(model, None, compile=True)
    for _ in range(2):
        for stage in range(3):
            for aspect in ASPECTS:
                run(model, stage, aspect).square().mean().backward()
        assert graphs.count == 2 * 3 * len(ASPECTS)
    assert max(torch._dynamo.utils.counters["frames"].values()) == graphs.count  # none fell back


def test_ddp_does_not_cut_blocks_into_more_graphs(graphs: Graphs, alone: None) -> None:
    model = make()
    parallelize(model, None, compile=True)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=1)
    wrapped.bucket_bytes_cap, wrapped.bucket_bytes_cap_default = 20_000, False  # a third of a block
    for stage in range(3):
        run(wrapped, stage, ASPECTS[0]).square().mean().backward()
    assert graphs.count == 2 * 3


def test_drawing_and_validation_compile_nothing(graphs: Graphs) -> None:
    model = make()
    parallelize(model, None, compile=True)
    with torch.no_grad(), SwapWeights(model, None):
        expected = run(model, 2, ASPECTS[0])
    assert graphs.count == 0
    assert expected.isfinite().all()
    run(model, 2, ASPECTS[0])
    assert graphs.count == 2
