"""Types of command-line arguments, and the parser, options and help that several commands share."""

import argparse
import math
import re
from typing import Any

RUN_HELP = "a run: its folder, or its name below runs/"

SECONDS_TO_SAVE = 120
"""Seconds before its end at which a job on a cluster is asked to save a checkpoint."""

MIN_RESAMPLES = 20
"""Smallest number of bootstrap resamples."""

DTYPES = ("float32", "bfloat16", "float16")


class CommandParser(argparse.ArgumentParser):
    """A parser of a command that takes no abbreviations of options.

    ``--step`` would otherwise be taken for ``--steps`` by a command that has only the latter.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False} | settings)


def positive_int(text: str) -> int:
    """Return a whole number of at least 1.

    Raises:
        ArgumentTypeError: the text isn't one.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def positive_float(text: str) -> float:
    """Return a number above 0.

    Raises:
        ArgumentTypeError: the text isn't one.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def whole_number(text: str) -> int:
    """Return a whole number of at least 0.

    Raises:
        ArgumentTypeError: the text isn't one.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def utf8_text(value: str) -> str:
    """Return a text as it is.

    Raises:
        ArgumentTypeError: it has bytes that are not UTF-8.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{value!a} is not UTF-8") from error
    return value


def time_limit(text: str) -> str:
    """Return a time limit that sbatch takes, and that is long enough to save a checkpoint before it.

    Raises:
        ArgumentTypeError: sbatch would refuse it, or the job would be asked to stop as soon as it starts.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return text
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise argparse.ArgumentTypeError(
            f"{text} is no time that sbatch takes: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, "
            "DAYS-HOURS:MINUTES or DAYS-HOURS:MINUTES:SECONDS"
        )
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    seconds = 86400 * int(days or 0) + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    if 0 < seconds <= SECONDS_TO_SAVE:
        raise argparse.ArgumentTypeError(
            f"{text} is {seconds} seconds, but a job is asked to save its checkpoint {SECONDS_TO_SAVE} seconds before "
            "its end: give it more time"
        )
    return text


def resample_count(text: str) -> int:
    """Return 0, or a number of resamples that is large enough for an interval.

    Raises:
        ArgumentTypeError: the text is neither.
    """
    if text != "0" and (not text.isdecimal() or int(text) < MIN_RESAMPLES):
        raise argparse.ArgumentTypeError(
            f"{text} is neither 0 nor at least {MIN_RESAMPLES}: fewer resamples can't give an interval"
        )
    return int(text)


def add_checkpoint_options(parser: Any) -> None:
    """Add the options that choose the weights of a run: ``--step``, ``--ema`` and ``--no-ema``."""
    parser.add_argument("--step", type=int, metavar="N", help="step of the run's checkpoint (default: the newest)")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="use the EMA's weights, or the trained ones (default: the EMA's, if the checkpoint has them)",
    )


def add_device_options(parser: Any) -> None:
    """Add the options of how a model computes: ``--dtype`` and ``--device``."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the network's weights (default: bfloat16 on a GPU, as saved elsewhere; float32 for other "
        "pipelines)",
    )
    parser.add_argument("--device", metavar="NAME", help="device: cpu, cuda or cuda:1 (default: a GPU if there is one)")


def add_size_options(parser: Any) -> None:
    """Add the options of the images' size: ``--height`` and ``--width``."""
    parser.add_argument("--height", type=positive_int, metavar="PX", help="height of the images in px")
    parser.add_argument("--width", type=positive_int, metavar="PX", help="width of the images in px")


def parse_shard(text: str) -> tuple[int, int]:
    """Return I and N of ``I/N``.

    Raises:
        ValueError: the text has another form, or I is not one of 0..N-1.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"--shard must be I/N with I from 0 to N-1, 0/4 for example; got {text}")
    return int(match[1]), int(match[2])


def one_or_all(values: list[Any] | None) -> Any:
    """Return the value of an option that takes one number, or one a stage: the number, the list, or None."""
    return values[0] if values and len(values) == 1 else values
