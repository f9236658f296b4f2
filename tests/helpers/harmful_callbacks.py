"""Callbacks that break a run in a given step, or watch it, and how to add one to a recipe."""

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nami_lightning.training.strategies import local_shards


def with_callback(name: str, /, **settings: Any) -> list[str]:
    """Arguments that add a callback of this file to a recipe's."""
    keys = [f"--trainer.callbacks.{key}={value}" for key, value in settings.items()]
    return [f"--trainer.callbacks+={__name__}.{name}", *keys]


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


class Poison(L.Callback):
    """Makes the losses of one rank NaN in some steps, and checks that nothing moves in them."""

    def __init__(self, steps: list[int], rank: int = 0) -> None:
        self.steps, self.rank = steps, rank

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module: Any = pl_module
        sound = module.flow_loss

        def poisoned(encoders: Any, transformer: Any, micro: Any, seed_key: int | str, *rest: Any, **more: Any) -> Any:
            error = sound(encoders, transformer, micro, seed_key, *rest, **more)
            poison = seed_key in self.steps and trainer.global_rank == self.rank
            return error._replace(loss=error.loss * torch.nan) if poison else error

        module.flow_loss = Mock(wraps=sound, side_effect=poisoned, groups=sound.groups)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.before = digest(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        after = digest(trainer, pl_module)
        same = {name for name in after if after[name] == self.before[name]}
        expected = set(after) if pl_module.step - 1 in self.steps else set()
        if same != expected:
            raise RuntimeError(f"rank {trainer.global_rank}, step {pl_module.step - 1}: {same} did not change")


class CountReductions(L.Callback):
    """Writes the bytes that rank 0 gives to all-reduces, a line a step, to ``reduced.txt``; with the micro-batches."""

    class Mode(TorchDispatchMode):
        """Adds them up, on the thread that runs the backward pass too."""

        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.c10d.allreduce_.default:
                self.bytes += sum(tensor.nbytes for tensor in args[0])
            return func(*args, **(kwargs or {}))

    def on_train_batch_start(self, *_: Any) -> None:
        self.mode = self.Mode()
        self.mode.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, _: Any, batch: Any, *__: Any
    ) -> None:
        self.mode.__exit__(None, None, None)
        if trainer.is_global_zero:
            with (Path(trainer.default_root_dir) / "reduced.txt").open("a") as file:
                file.write(f"{len(batch)} {self.mode.bytes}\n")


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
