"""Stands for a pool of processes, where a test wants to see or to count what they do."""

from concurrent.futures import Future
from typing import Any


class InThisProcess:
    """Does the work at once, in this process."""

    def __init__(self, *_: Any, initializer: Any = None, initargs: Any = (), **__: Any) -> None:
        if initializer is not None:
            initializer(*initargs)

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Any, *arguments: Any) -> "Future[Any]":
        """Do the work."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: Any) -> None:
        """Do nothing."""
