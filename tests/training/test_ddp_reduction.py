"""DDP's gradients of several micro-batches, reduced in the last: the means over two ranks, of every parameter."""

import os
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from helpers.processes import end, start
from helpers.tiny_models import make_two_stages
from lightning.pytorch.overrides.distributed import prepare_for_backward
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nami_lightning.models.transformer import NamiTransformer2DModel
from nami_lightning.training.strategies import reduce_gradients

STAGES = (0, 1, 1)
"""Of the micro-batches of a step."""


def make_model() -> NamiTransformer2DModel:
    """Make a network whose first stage has a head that no other stage uses."""
    return make_two_stages(num_single_layers=[0, 1], output_head="per_stage")


def loss_of(model: NamiTransformer2DModel, rank: int, number: int) -> Tensor:
    """Return the loss of a rank's micro-batch."""
    generator = torch.Generator().manual_seed(10 * rank + number)
    inputs = [torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 3, 8), (2, 8), (2,))]
    output: Tensor = model(*inputs, STAGES[number])
    return output.square().mean()


def step_on_ranks(folder: Path) -> None:
    """Be one rank: make the backward passes of two steps as Lightning does, and write the second's gradients."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    model = make_model()
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    strategy = SimpleNamespace(model=wrapper)
    for _ in range(2):
        model.zero_grad()
        for number in range(len(STAGES)):
            reduce_gradients((model,), strategy, last=number == len(STAGES) - 1)
            loss = loss_of(model, rank, number)
            prepare_for_backward(wrapper, loss)
            loss.backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, folder / f"rank_{rank}.pt")


def test_what_only_the_first_micro_batch_used_is_reduced_too(tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert end(start(step_on_ranks, (tmp_path,), 2, output)) == 0, output.read_text()
    model = make_model()
    for rank in range(2):
        for number in range(len(STAGES)):
            (loss_of(model, rank, number) / 2).backward()
    found = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2)]
    assert any(name.startswith("heads.0") for name in found[0])
    for name, parameter in model.named_parameters():
        for gradients in found:
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
