"""Callbacks that do harm to a run, and how tests start runs that end badly."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from nami_lightning.cli.main import main
from nami_lightning.training.strategies import local_shards

HERE = Path(__file__).parent
SETTINGS = ["--data.init_args.num_workers", "0", "--trainer.log_every_n_steps", "1"]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
}


# A server process that has imported everything, so that a run of one process starts at once.
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["nami_lightning.commands", "nami_lightning.callbacks", "nami_lightning.datamodules"])


def run(arguments: list[str], status: int | None = 0) -> str:
    """``lightning run`` to its end; what it said.

    Args:
        arguments: of the command; several ranks are started by it.
        status: the exit status that it must have; None for any but 0.
    """
    arguments = [arguments[0], *SETTINGS, *arguments[1:]]
    found: int | None
    with tempfile.NamedTemporaryFile("r") as output:
        if "--trainer.devices" in arguments:
            command = [sys.executable, "-m", "nami_lightning.cli", "run", *arguments]
            with open(output.name, "w") as file:
                found = subprocess.run(command, env=ENVIRONMENT, stdout=file, stderr=file, check=False).returncode
        else:
            process = SPAWN.Process(target=in_child, args=(output.name, arguments))
            process.start()
            process.join()
            found = process.exitcode
        said = output.read()
    assert found if status is None else found == status, said
    return said


def in_child(output: str, arguments: list[str]) -> None:
    """In a process group of its own, with one thread, so that sums are done in one order."""
    os.setsid()
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    raise SystemExit(main(["run", *arguments]))


def with_callback(name: str, /, **settings: Any) -> list[str]:
    """Arguments that add a callback of this file to a recipe's."""
    keys = [f"--trainer.callbacks.{key}={value}" for key, value in settings.items()]
    return [f"--trainer.callbacks+={Path(__file__).stem}.{name}", *keys]


def digest(trainer: L.Trainer, module: Any) -> dict[str, str]:
    """A hash of this rank's weights, EMA and optimizer state."""
    state = [value for _, values in sorted(optimizer_state(trainer).items()) for value in values]
    parts = {
        "weights": local_shards(module.transformer),
        "ema": [] if module.ema is None else local_shards(module.ema),
        "optimizer": state,
        "running_losses": [module.running_losses],
    }
    return {name: fingerprint(tensors) for name, tensors in parts.items()}


def optimizer_state(trainer: L.Trainer) -> dict[int, list[torch.Tensor]]:
    optimizer = trainer.optimizers[0]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        index: [getattr(value, "_local_tensor", value) for _, value in sorted(optimizer.state[parameter].items())]
        for index, parameter in enumerate(parameters)
        if parameter in optimizer.state
    }


def fingerprint(tensors: list[torch.Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


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


class Poison(L.Callback):
    """Makes the losses of one rank NaN in some steps, and checks that nothing moves in them."""

    def __init__(self, steps: list[int], rank: int = 0) -> None:
        self.steps, self.rank = steps, rank

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module: Any = pl_module
        sound = module.flow_loss

        def poisoned(encoders: Any, transformer: Any, micro: Any, seed_key: int | str, *rest: Any, **more: Any) -> Any:
            loss, tau = sound(encoders, transformer, micro, seed_key, *rest, **more)
            poison = seed_key in self.steps and trainer.global_rank == self.rank
            return loss * torch.nan if poison else loss, tau

        module.flow_loss = poisoned

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.before = digest(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        after = digest(trainer, pl_module)
        same = {name for name in after if after[name] == self.before[name]}
        expected = set(after) if pl_module.step - 1 in self.steps else set()
        if same != expected:
            raise RuntimeError(f"rank {trainer.global_rank}, step {pl_module.step - 1}: {same} did not change")


class Signal(L.Callback):
    """Sends a signal to one rank in a step, or to its process group, and again after so many seconds if that is set."""

    def __init__(
        self, step: int, rank: int = 0, name: str = "SIGTERM", group: bool = False, again_after: float | None = None
    ) -> None:
        self.step, self.rank, self.again_after = step, rank, again_after
        self.signal, self.target = signal.Signals[name], 0 if group else None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.step == self.step and trainer.global_rank == self.rank:
            target = os.getpid() if self.target is None else self.target
            os.kill(target, self.signal)
            if self.again_after is not None:
                time.sleep(self.again_after)
                os.kill(target, self.signal)


class Sleep(L.Callback):
    """Puts one rank to sleep in a step."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.step == self.step and trainer.global_rank == self.rank:
            time.sleep(3600)


class TellProcess(L.Callback):
    """Writes each rank's process id to ``rank_N.pid``, and waits before the last step while there is ``hold``."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        folder = Path(trainer.default_root_dir)
        written = folder / f"rank_{trainer.global_rank}.new"
        written.write_text(str(os.getpid()))
        written.replace(written.with_suffix(".pid"))
        while pl_module.step == pl_module.curriculum.total_steps - 1 and (folder / "hold").exists():
            time.sleep(0.05)
