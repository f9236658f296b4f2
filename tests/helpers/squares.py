"""A source for tests: plain coloured rectangles whose colour says which they are."""

import io
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from nami_lightning.datamodules.sources.base import Skipped, Source, SourceSample

SIZES = [(40, 40), (64, 40), (40, 64), (20, 20), (33, 60)]


class Squares(Source):
    """``count`` rectangles of five shapes, in parts of ten.

    Args:
        count: how many.
        sizes: of the images, one after the other.
        pause: seconds that each takes.
        fails_at: a number at which reading raises.
    """

    def __init__(
        self, count: int = 60, sizes: list[tuple[int, int]] = SIZES, pause: float = 0.0, fails_at: int = -1
    ) -> None:
        self.count, self.sizes, self.pause, self.fails_at = count, sizes, pause, fails_at

    def settings(self) -> dict[str, Any]:
        return {"name": "squares", "count": self.count}

    def parts(self) -> list[str]:
        return [str(first) for first in range(0, self.count, 10)]

    def read(self, part: str) -> Iterator[SourceSample | Skipped]:
        for number in range(int(part), min(int(part) + 10, self.count)):
            if number == self.fails_at:
                raise RuntimeError("no such square")
            time.sleep(self.pause)
            yield self.sample(number)

    def sample(self, number: int) -> SourceSample:
        file = io.BytesIO()
        Image.new("RGB", self.sizes[number % len(self.sizes)], colour(number)).save(file, "PNG")
        return SourceSample(str(number), file.getvalue(), [f"square {number}"])


def colour(number: int) -> tuple[int, int, int]:
    """Of square ``number``."""
    return (number % 256, number // 256, 99)


def contents(folder: Path) -> bytes:
    """All files below a folder, with their names; for comparing whole trees."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return b"".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in files)


def kill(pid: int) -> None:
    """kill -9 of a process and its children, which are in its own session."""
    os.killpg(os.getpgid(pid), signal.SIGKILL)
