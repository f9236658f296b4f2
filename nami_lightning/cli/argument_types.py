"""Numbers as the command line takes them."""

import argparse

FEWEST = 20
"""Resamples of a bootstrap."""


def positive(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def resamples(text: str) -> int:
    """0, or a number that a spread can be computed of.

    Raises:
        ArgumentTypeError: it is neither.
    """
    if text != "0" and (not text.isdecimal() or int(text) < FEWEST):
        raise argparse.ArgumentTypeError(
            f"{text} is neither 0 nor at least {FEWEST}: the spread of so few says nothing"
        )
    return int(text)
