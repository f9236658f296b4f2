"""Rank 0 decides what all ranks start from; ranks that start from different things are refused by name."""

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from nami_lightning.runs.rank_start import DECISION, decided_by_rank_zero
from nami_lightning.training import step_sync

RANK = """
import json, os, sys
import lightning as L
from nami_lightning.runs.rank_start import decided_by_rank_zero

trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False)
newest = {"0": "step=0000008.ckpt", "1": "step=0000004.ckpt"}[os.environ["RANK"]]

def decide():
    if sys.argv[1] == "fail":
        raise ValueError("the run's folder is held by another process")
    return {"checkpoint": newest}

try:
    print(json.dumps(decided_by_rank_zero(trainer, decide)))
except Exception as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def two_ranks(what: str) -> list[Any]:
    """Run two processes as torchrun starts them; return what each printed last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, what],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]


def test_with_a_checkpoint_published_in_between_both_ranks_start_from_rank_zeros() -> None:
    assert two_ranks("decide") == [{"checkpoint": "step=0000008.ckpt"}] * 2


def test_what_stops_rank_zero_stops_the_others_with_its_message() -> None:
    first, second = two_ranks("fail")
    assert first == "ValueError: the run's folder is held by another process"
    assert second == "RuntimeError: rank 0 can't start: the run's folder is held by another process"


def test_processes_that_lightning_starts_read_the_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DECISION, raising=False)
    strategy = DDPStrategy(cluster_environment=LightningEnvironment())
    ranks: list[Any] = [SimpleNamespace(strategy=strategy, world_size=2, global_rank=rank) for rank in range(2)]
    assert decided_by_rank_zero(ranks[1], dict) is None
    assert decided_by_rank_zero(ranks[0], lambda: {"checkpoint": None}) == {"checkpoint": None}
    assert decided_by_rank_zero(ranks[1], dict) == {"checkpoint": None}
    monkeypatch.delenv(DECISION)


def test_ranks_that_differ_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_sync, "gather_objects", lambda mine: [mine, mine | {"step": 4}])
    with pytest.raises(RuntimeError, match=r"same step: rank 0 has 8, rank 1 has 4\. Start all ranks again"):
        step_sync.require_same_start({"data set": "abc", "step": 8})
    monkeypatch.setattr(step_sync, "gather_objects", lambda mine: [mine, mine])
    step_sync.require_same_start({"data set": "abc", "step": 8})
