"""Numbers about one image that need no network: its size, its entropy, and what near-duplicates share."""

from functools import cache

import numpy as np
from PIL import Image

HASH_SIDE = 32
"""The side in px of the small grey image that is hashed."""

FREQUENCIES = 8
"""The hash is made of this number of frequencies along each side."""

COLOUR_SIDE = 4
"""The colours of an image are stored as a grid of this many by this many cells."""

ZERO = 0.01
"""A frequency below this share of the strongest one counts as zero: in a symmetric image, half of them are noise."""


def resolution(image: Image.Image) -> int:
    """Return the shorter side of an image in px."""
    return min(image.size)


def entropy(image: Image.Image) -> float:
    """Return the entropy of an image's brightness in bits, from 0 (one flat colour) to 8."""
    return float(image.convert("L").entropy())


def perceptual_hash(image: Image.Image) -> int:
    """Return 63 bits that scaling, compression and slight changes of brightness hardly change.

    They are the signs of the lowest frequencies (DCT) of the grey image, without the mean. The bits in which two hashes
    differ are their distance.
    """
    small = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    cosines = _cosines()
    frequencies = (cosines @ np.asarray(small, dtype=np.float64) @ cosines.T).ravel()[1:]
    bits = frequencies > ZERO * np.abs(frequencies).max()
    return int(np.packbits(np.concatenate([[False], bits])).view(">u8")[0])


@cache
def _cosines() -> np.ndarray:
    """Return the lowest rows ``(8, 32)`` of the discrete cosine transform."""
    positions = (np.arange(HASH_SIDE) + 0.5) * np.pi / HASH_SIDE
    return np.cos(np.arange(FREQUENCIES)[:, None] * positions)


def colours(image: Image.Image) -> np.ndarray:
    """Return the mean colours of a grid of 4 by 4 cells, uint8 ``(48,)``; the hash knows no colour."""
    small = image.convert("RGB").resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.uint8).ravel()
