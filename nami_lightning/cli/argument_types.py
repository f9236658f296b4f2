"""Types of command-line arguments, and the help that several commands share."""

import argparse

RUN_HELP = "a run: its folder, or its name below runs/"

MIN_RESAMPLES = 20
"""Smallest number of bootstrap resamples."""


def positive_int(text: str) -> int:
    """Return a whole number of at least 1.

    Raises:
        ArgumentTypeError: the text isn't one.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


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
