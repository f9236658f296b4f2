"""Ends a run that hangs, with a message that says where."""

import faulthandler
import os
import sys
import threading
from time import monotonic, sleep

import lightning as L

from nami_lightning.training.module import NamiModule

HUNG = 1
"""Exit status: not the one that asks to be started again, since it may hang for ever."""


class Watchdog(L.Callback):
    """Ends the process when one activity lasts too long, as it does when another rank died or is stuck.

    An activity is a micro-batch of training or validation, an update, sampling, a checkpoint, or waiting for data.
    Every rank says what it did: its number, the step, the stage, and the line that each of its threads is in. On a GPU
    that is where the program waits; the device may be a few operations behind.

    Args:
        timeout_minutes: of one activity; below the strategy's own timeout of a collective (30 minutes), whose message
            names no step.

    Raises:
        ValueError: ``timeout_minutes`` is not above 0.
    """

    def __init__(self, timeout_minutes: float = 20) -> None:
        if timeout_minutes <= 0:
            raise ValueError(f"Watchdog needs timeout_minutes above 0; got {timeout_minutes}")
        self.seconds = 60 * timeout_minutes
        self.interval = min(self.seconds / 10, 10.0)
        self._over = threading.Event()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start watching."""
        assert isinstance(pl_module, NamiModule)
        self._over.clear()
        threading.Thread(target=self._watch, args=(trainer, pl_module), name="watchdog", daemon=True).start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop watching."""
        self._over.set()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say where an error came: a collective's own message, when another rank has gone, does not."""
        self._over.set()
        if isinstance(exception, Exception):
            print(f"Ended in {where(trainer, pl_module)}.", file=sys.stderr, flush=True)

    def _watch(self, trainer: L.Trainer, module: NamiModule) -> None:
        seen, since = module.heartbeat.count, monotonic()
        while not self._over.wait(self.interval):
            if module.heartbeat.count != seen:
                seen, since = module.heartbeat.count, monotonic()
            elif monotonic() - since > self.seconds:
                print(
                    f"Hung for more than {self.seconds:.0f} seconds in {where(trainer, module)}. Waiting ranks stand "
                    "in a collective, the one to blame elsewhere: see the run's logs/rank_N.log. This one's threads:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sleep(2 * self.interval)  # for the other ranks to speak, before they notice that this one has gone
                os._exit(HUNG)


def where(trainer: L.Trainer, module: L.LightningModule) -> str:
    """Say where a rank is: ``step 7, stage 2, micro-batch 3 of 5 on rank 1``."""
    assert isinstance(module, NamiModule)
    return f"step {module.step}, {module.heartbeat.activity} on rank {trainer.global_rank}"
