"""Rank 0 decides what all ranks start from; ranks that start from different things are refused by name."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from helpers.processes import end, start
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from nami_lightning.runs import rank_start
from nami_lightning.runs.rank_start import DECISION, check_meeting_place, decided_by_rank_zero
from nami_lightning.training import step_sync


def decide_on_rank(folder: Path, what: str) -> None:
    """Be one rank; write what was decided, or the error, to ``rank_N.json``.

    The ranks are those that torchrun starts, or, if ``what`` is ``machines``, two machines' by hand with one rank each.
    """
    rank = os.environ["LOCAL_RANK"]
    if what == "machines":
        del os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]
        os.environ["NODE_RANK"] = rank
    else:
        os.environ.update(RANK=rank, GROUP_RANK="0", LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="test")
    sizes: dict[str, Any] = {"num_nodes": 2, "devices": 1} if what == "machines" else {"devices": 2}
    trainer = L.Trainer(accelerator="cpu", strategy="ddp", logger=False, enable_progress_bar=False, **sizes)
    newest = {"0": "step=0000008.ckpt", "1": "step=0000004.ckpt"}[rank]

    def decide() -> dict[str, Any]:
        if what == "fail":
            raise ValueError("the run's folder is held by another process")
        return {"checkpoint": newest}

    decided: Any
    try:
        decided = decided_by_rank_zero(trainer, decide)
    except Exception as error:
        decided = f"{type(error).__name__}: {error}"
    (folder / f"rank_{rank}.json").write_text(json.dumps(decided))


def two_ranks(folder: Path, what: str) -> list[Any]:
    """Run two processes as torchrun starts them; return what each wrote."""
    output = folder / "output"
    assert end(start(decide_on_rank, (folder, what), 2, output)) == 0, output.read_text()
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("what", ["decide", "machines"])
def test_with_a_checkpoint_published_in_between_both_ranks_start_from_rank_zeros(tmp_path: Path, what: str) -> None:
    assert two_ranks(tmp_path, what) == [{"checkpoint": "step=0000008.ckpt"}] * 2


def test_what_stops_rank_zero_stops_the_others_with_its_message(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path, "fail")
    assert first == "ValueError: the run's folder is held by another process"
    assert second == "RuntimeError: rank 0 can't start: the run's folder is held by another process"


def fail(trainer: L.Trainer) -> None:
    raise TimeoutError("no rank 0 to meet")


def test_processes_that_lightning_starts_read_the_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DECISION, "{}")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    strategy = DDPStrategy(cluster_environment=LightningEnvironment())
    common = {"strategy": strategy, "world_size": 2, "num_nodes": 1}
    ranks: list[Any] = [SimpleNamespace(**common, global_rank=rank) for rank in range(2)]
    assert decided_by_rank_zero(ranks[0], lambda: {"checkpoint": None}) == {"checkpoint": None}
    monkeypatch.setattr(os, "getppid", os.getpid)  # rank 1 is a child of rank 0
    assert decided_by_rank_zero(ranks[1], lambda: {"checkpoint": "its own"}) == {"checkpoint": None}
    monkeypatch.setenv(DECISION, os.environ.pop(DECISION).replace(str(os.getpid()), "1"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(DDPStrategy, "launcher", None, raising=False)
    monkeypatch.setattr(rank_start, "start_process_group", fail)
    with pytest.raises(TimeoutError, match="no rank 0"):
        decided_by_rank_zero(ranks[1], dict)


def test_machines_that_can_not_meet_are_refused_by_the_missing_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("NODE_RANK", raising=False)
    check_meeting_place(1)
    with pytest.raises(ValueError, match="num_nodes is 2, but the environment lacks NODE_RANK:"):
        check_meeting_place(2)
    monkeypatch.setenv("NODE_RANK", "1")
    check_meeting_place(2)


def test_ranks_that_differ_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_sync, "gather_objects", lambda mine: [mine, mine | {"step": 4}])
    with pytest.raises(RuntimeError, match=r"same step: rank 0 has 8, rank 1 has 4\. Start all ranks again"):
        step_sync.require_same_start({"data set": "abc", "step": 8})
    monkeypatch.setattr(step_sync, "gather_objects", lambda mine: [mine, mine])
    step_sync.require_same_start({"data set": "abc", "step": 8})
