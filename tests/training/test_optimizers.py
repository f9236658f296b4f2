"""MuonAdamW: against torch's own Muon and AdamW, each stepped alone."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.processes import end, start
from helpers.tiny_models import make_two_stages
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from nami_lightning import MuonAdamW, NamiTransformer2DModel
from nami_lightning.training.optimizers import is_hidden_matrix, orthogonalize
from nami_lightning.training.strategies import full_tensor


def tiny_transformer() -> NamiTransformer2DModel:
    return make_two_stages(in_channels=3, patch_size=4, num_single_layers=[0, 1])


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_steps_as_torchs_muon_and_adamw_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's Muon in float32, as ours on a CPU
    ours = tiny_transformer()
    theirs = copy.deepcopy(ours)
    one = MuonAdamW(ours.named_parameters(), lr=0.01, weight_decay=0.1)
    named = list(theirs.named_parameters())
    pair = [
        torch.optim.Muon(
            [p for n, p in named if is_hidden_matrix(n, p)], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [p for n, p in named if not is_hidden_matrix(n, p)], lr=0.01, weight_decay=0.1, betas=(0.9, 0.999)
        ),
    ]
    for step in range(3):
        for model, optimizers in ((ours, [one]), (theirs, pair)):
            fill_gradients(model, step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:  # as the curriculum does
                    group["lr"] = 0.01 / (step + 1)
                optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_orthogonalizes_as_a_singular_value_decomposition() -> None:
    matrix = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    for given, exact in ((matrix, u @ vh), (matrix.T, (u @ vh).T)):
        found = orthogonalize(given, (1.5, -0.5, 0.0), steps=20)  # Newton and Schulz's own, which converges
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
    assert orthogonalize(matrix.to("meta"), (1.5, -0.5, 0.0), steps=1).dtype == torch.bfloat16


def step_on_ranks(folder: Path) -> None:
    """Be one rank: step Muon on shards, and write the collectives that it took and the matrices."""
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = tiny_transformer()
    named = [(name, parameter) for name, parameter in model.named_parameters() if is_hidden_matrix(name, parameter)]
    shards = [(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))) for name, p in named]
    fill_gradients(model, 0)
    for (_, shard), (_, parameter) in zip(shards, named, strict=True):
        assert parameter.grad is not None
        shard.grad = distribute_tensor(parameter.grad, mesh, [Shard(0)])
    optimizer = MuonAdamW(shards)
    with CommDebugMode() as collectives:
        optimizer.step()
    whole = {name: full_tensor(shard.detach()) for name, shard in shards}
    torch.save({"collectives": collectives.get_total_counts(), "weights": whole}, folder / f"rank_{dist.get_rank()}.pt")


def test_muon_gathers_a_sharded_matrix_once(tmp_path: Path) -> None:
    model = tiny_transformer()
    fill_gradients(model, 0)
    MuonAdamW(model.named_parameters()).step()
    expected = {name: p.detach() for name, p in model.named_parameters() if is_hidden_matrix(name, p)}
    output = tmp_path / "output"
    assert end(start(step_on_ranks, (tmp_path,), 2, output)) == 0, output.read_text()
    for rank in range(2):
        found = torch.load(tmp_path / f"rank_{rank}.pt")
        assert found["collectives"] == len(expected) > 10
        for name, weight in found["weights"].items():
            assert torch.equal(weight, expected[name]), name


def test_goes_on_from_its_state_dict() -> None:
    whole = tiny_transformer()
    one = MuonAdamW(whole.named_parameters())
    fill_gradients(whole, 0)
    one.step()
    resumed = copy.deepcopy(whole)
    other = MuonAdamW(resumed.named_parameters())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for model, optimizer in ((whole, one), (resumed, other)):
        fill_gradients(model, 1)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.5
        optimizer.step()
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_takes_the_blocks_matrices_alone() -> None:
    model = tiny_transformer()
    taken = {name for name, parameter in model.named_parameters() if is_hidden_matrix(name, parameter)}
    assert "transformer_blocks.0.attn.to_q.weight" in taken
    assert all(parameter.ndim == 2 for name, parameter in model.named_parameters() if name in taken)
    assert not any(word in name for name in taken for word in ("norm", "head", "embed"))


def test_refuses_parameters_without_names_or_blocks() -> None:
    with pytest.raises(ValueError, match="named_parameters"):
        MuonAdamW(tiny_transformer().parameters())
    with pytest.raises(ValueError, match="use AdamW"):
        MuonAdamW(nn.Linear(2, 2).named_parameters())
