"""Requests to stop: Ctrl-C, SIGTERM, or SIGUSR1 as SLURM sends it before the time is up.

The first signal makes the run end at the next step with a checkpoint and the status REQUEUE, or INTERRUPTED after
Ctrl-C; it may reach any of the ranks, which agree on it in the all-reduce of every step. The second ends the process at
once.
"""

import os
import signal
import threading
from time import monotonic
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import LightningEnvironment

REQUEUE = 75
"""Exit status of a run that saved itself and is to be started again: EX_TEMPFAIL of sysexits.h."""

INTERRUPTED = 130
"""Exit status of a run that somebody stopped by hand: the shell's for SIGINT."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
BURST = 1.0
"""Seconds within which signals are one: a launcher forwards what its whole process group got as well."""


class Preempted(SystemExit):
    """Ends a run that was asked to stop, after its checkpoint is whole."""


class StopRequest:
    """Listens for the signals in place of Lightning's own handlers.

    Those save from within the handler, and start collectives in it that other ranks don't take part in.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._speaks = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def status(self) -> int:
        """The exit status of the run."""
        return INTERRUPTED if self.signal == signal.SIGINT else REQUEUE

    def listen(self, trainer: L.Trainer) -> None:
        """Handle the signals from now on; Python allows it in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.signal, self._speaks = None, trainer.is_global_zero
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        # Lightning asks at each step's start whether rank 0 got a SIGTERM, and waits for the device to know.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def forget(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), monotonic()
            if number == signal.SIGINT and self._speaks:
                os.write(2, b"\nStopping after the running step; Ctrl-C again to end at once.\n")
        elif monotonic() - self._since > BURST:
            os._exit(128 + number)


def preempted(trainer: L.Trainer, status: int) -> Preempted:
    """Return the exception that ends this rank, so that the run ends with ``status``."""
    # Lightning's own launcher kills all processes when one that it started ends with another status than 0.
    environment = getattr(trainer.strategy, "cluster_environment", None)
    started_by_lightning = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
    return Preempted(0 if started_by_lightning else status)


def leave_to_parent(worker: int = 0) -> None:
    """Ignore signals in a worker process: when a whole process group is asked to stop, the parent still needs it.

    The first SIGTERM is let pass, since ``terminate()`` of a worker that hangs is one too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
