"""The numbers in checkpoints, for comparing two of them."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def numbers(checkpoint: Path) -> dict[str, Any]:
    """All of a checkpoint, file or shards, by name: weights and the optimizer's state."""
    if not checkpoint.is_dir():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        return flatten_state_dict({key: saved[key] for key in ("state_dict", "optimizer_states")})[0]
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(checkpoint, f"{folder}/whole.pt")
        return flatten_state_dict(torch.load(f"{folder}/whole.pt", weights_only=False))[0]


def same_numbers(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what differs between two checkpoints' numbers."""
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())
    return [
        name
        for name, value in one.items()
        if torch.is_tensor(value) and not torch.equal(value.nan_to_num(), other[name].nan_to_num())
    ]
