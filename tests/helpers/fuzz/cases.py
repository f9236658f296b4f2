"""Runs one case of a surface, and tells a right result, a clear error and a fault apart."""

import contextlib
import io
import linecache
import random
import shutil
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

from helpers.in_this_process import InThisProcess
from nami_lightning.errors import PROJECT_FOLDERS, explain, is_user_error

SECONDS = 30
"""Longest time of a case; then it hangs."""

LONGEST_MESSAGE = 4000
MEMORY_DISK = Path("/dev/shm")


class Fault(AssertionError):
    """An error for a case in which the program did what it must not."""


class Refused(Exception):
    """An error for a case that the program answered with a clear message by itself."""


class Hang(BaseException):
    """An error for a case that takes too long."""


@dataclass(frozen=True)
class Surface:
    """A kind of input.

    Attributes:
        name: for people.
        case: makes an input in an empty folder and gives it to the program; raises what the program raises, or
            :class:`Fault`.
        share: cases of ten thousand.
    """

    name: str
    case: Callable[[random.Random, Path], None]
    share: int


@dataclass
class Counts:
    """What came of a surface's cases.

    Attributes:
        right: cases with a right result.
        refused: cases that ended in a clear error.
        faults: for each kind of fault, the seeds that show it.
        seconds: of all cases.
        slowest: seconds of the longest case.
        messages: the kinds of errors, for people to look at.
    """

    right: int = 0
    refused: int = 0
    faults: dict[str, list[int]] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: float = 0.0
    messages: Counter[str] = field(default_factory=Counter)


def require(condition: object, problem: str) -> None:
    """Raise a :class:`Fault` unless a condition holds."""
    if not condition:
        raise Fault(problem)


@contextlib.contextmanager
def nothing_left_at(*paths: Path) -> Iterator[None]:
    """Require that after an error nothing stands under the final names."""
    try:
        yield
    except Exception as error:
        for path in paths:
            if path.exists():
                raise Fault(f"after an error {path.name} is there") from error
        raise


def run_surface(surface: Surface, seeds: range) -> Counts:
    """Run a surface's cases, each from its seed alone."""
    counts = Counts()
    for seed in seeds:
        begin = perf_counter()
        kind, text = run_case(surface, seed)
        counts.seconds += perf_counter() - begin
        counts.slowest = max(counts.slowest, perf_counter() - begin)
        if kind == "fault":
            counts.faults.setdefault(text, []).append(seed)
        else:
            counts.right += kind == "right"
            counts.refused += kind == "refused"
            counts.messages[text] += kind == "refused"
    return counts


def run_case(surface: Surface, seed: int) -> tuple[str, str]:
    """Run one case; return ``right``, ``refused`` or ``fault``, and the error's text or where the fault is."""
    base = MEMORY_DISK if MEMORY_DISK.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="nami_fuzz_", dir=base))
    before = signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.chdir(folder), quiet():
            surface.case(random.Random(f"{surface.name} {seed}"), folder)
        return "right", ""
    except Hang:
        return "fault", f"hangs for more than {SECONDS} s"
    except Fault as fault:
        return "fault", f"{fault}"
    except Refused as error:
        return "refused", str(error)
    except Exception as error:
        return _judge(error, folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "fault", f"{type(error).__name__}, which ends the program without a message"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Print nothing."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _hang(*_: Any) -> None:
    raise Hang


def _judge(error: Exception, folder: Path) -> tuple[str, str]:
    """Tell whether an error is one clear message."""
    text = explain(error).replace(str(folder), "FOLDER")
    where = f"{type(error).__name__} at {_place(error)}: {text[:200]}"
    if not is_user_error(error):
        return "fault", where
    if not text.strip() or "Traceback" in text or len(text) > LONGEST_MESSAGE:
        return "fault", f"a message that is empty, too long or a traceback: {where}"
    if not _is_meant(error):
        return "fault", f"a message of a library's: {where}"
    return "refused", where


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame for frame in frames if any(home in Path(frame.filename).resolve().parents for home in PROJECT_FOLDERS)
    ]
    last = (ours or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def _is_meant(error: BaseException) -> bool:
    """Tell whether one of the program's own lines raised an error; the system's errors about files count too."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not any(home in Path(last.filename).resolve().parents for home in PROJECT_FOLDERS):
        return True  # is_user_error knows it: the system's, Lightning's or the parser's
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    return line.startswith("raise") or isinstance(error, OSError)


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """Let preparations and checks work in this process."""
    rooms = "nami_lightning.datamodules"
    with (
        patch(f"{rooms}.preparation.prepare_parts.ProcessPoolExecutor", InThisProcess),
        patch(f"{rooms}.storage.verify.ProcessPoolExecutor", InThisProcess),
    ):
        yield
