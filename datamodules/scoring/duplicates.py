"""Find images that are nearly the same: by their hashes and colours, or by the features of a network."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

COLOUR_DISTANCE = 0.15
"""Near-duplicates differ by less than this in their colours, in units of the contrast of each image."""

LEAST_CONTRAST = 8.0
"""The least contrast in steps of 255 that colours are divided by, so that flat images don't differ by noise."""

HASH_BITS = 63
BLOCK = 2048
"""The number of rows of features that are compared at once."""


def pairs_by_hash(hashes: np.ndarray, colours: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of images whose hashes differ in at most ``bits`` bits, and whose colours are nearly the same.

    Args:
        hashes: ``(N,)`` uint64, of :func:`~nami_lightning.datamodules.scoring.image_scores.perceptual_hash`.
        colours: ``(N, 48)`` uint8, of :func:`~nami_lightning.datamodules.scoring.image_scores.colours`.
        bits: the largest distance, 0 to 16.

    Returns:
        ``(P, 2)`` the numbers of the images of each pair, the lower one first; and ``(P,)`` their distances in bits.

    Raises:
        ValueError: ``bits`` is too large: nearly all images would be compared with all.
    """
    if not 0 <= bits <= 16:
        raise ValueError(f"near-duplicates may differ in 0 to 16 bits of their hashes; got {bits}")
    found = [candidates for band in _bands(bits) for candidates in _equal_bands(hashes, band, bits)]
    pairs = np.unique(np.concatenate([np.empty((0, 2), np.int64), *found]), axis=0)
    close = np.concatenate([np.empty(0, bool), *(_same_colours(colours, some) for some in _blocks(pairs))])
    pairs = pairs[close]
    return pairs, np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]).astype(np.float64)


def _bands(bits: int) -> list[np.uint64]:
    """Return masks that divide a hash into ``bits + 1`` bands: two hashes that close are equal in one of them."""
    edges = np.linspace(0, HASH_BITS, bits + 2).round().astype(int)
    return [np.uint64((1 << int(end)) - (1 << int(first))) for first, end in pairwise(edges)]


def _equal_bands(hashes: np.ndarray, band: np.uint64, bits: int) -> Iterator[np.ndarray]:
    """Yield the pairs whose hashes are equal in a band, and differ in at most ``bits`` bits in all."""
    order = np.argsort(hashes & band, kind="stable")
    ordered = hashes[order]
    keys = ordered & band
    for step in range(1, len(hashes)):
        equal = np.flatnonzero(keys[:-step] == keys[step:])
        if not len(equal):
            return
        near = equal[np.bitwise_count(ordered[equal] ^ ordered[equal + step]) <= bits]
        yield np.sort(np.stack([order[near], order[near + step]], 1), axis=1)


def _blocks(pairs: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(pairs), 2**16):
        yield pairs[first : first + 2**16]


def _same_colours(colours: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return which pairs have nearly the same colours, after each image's brightness and contrast are set to one."""
    first, second = (_normalized(colours[side]) for side in pairs.T)
    same: np.ndarray = np.sqrt(np.square(first - second).mean(1)) <= COLOUR_DISTANCE
    return same


def _normalized(colours: np.ndarray) -> np.ndarray:
    values = colours.astype(np.float32)
    values -= values.mean(1, keepdims=True)
    contrast: np.ndarray = np.sqrt(np.square(values).mean(1, keepdims=True))
    return values / np.maximum(contrast, LEAST_CONTRAST)


def pairs_by_features(
    features: np.ndarray, cosine: float, device: torch.device | str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of images whose features have at least this cosine; every image is compared with every other.

    Args:
        features: ``(N, width)`` features of length 1.
        cosine: the least cosine, above 0 and at most 1.
        device: the device that compares.

    Returns:
        ``(P, 2)`` the numbers of the images of each pair, the lower one first; and ``(P,)`` their cosines.

    Raises:
        ValueError: ``cosine`` is out of its range.
    """
    if not 0 < cosine <= 1:
        raise ValueError(f"the cosine of near-duplicates must be above 0 and at most 1; got {cosine}")
    blocks = torch.from_numpy(features).to(device).split(BLOCK)
    pairs, cosines = [np.empty((0, 2), np.int64)], [np.empty(0)]
    for row, block in enumerate(blocks):
        rows = block.float()
        for column in range(row, len(blocks)):
            products = rows @ blocks[column].float().T
            if row == column:
                products = products.triu(1)
            near = (products >= cosine).nonzero()
            cosines.append(products[near[:, 0], near[:, 1]].double().cpu().numpy())
            pairs.append((near + torch.tensor([row, column], device=near.device) * BLOCK).cpu().numpy())
    return np.concatenate(pairs), np.concatenate(cosines)


class Repeats(NamedTuple):
    """Which image each one repeats.

    Attributes:
        original: ``(N,)`` the number of the image that it repeats; its own for an image that stays.
        likeness: ``(N,)`` how near the two are: the distance of their hashes in bits, or the cosine of their features.
    """

    original: np.ndarray
    likeness: np.ndarray


def repeats_by_hash(hashes: np.ndarray, colours: np.ndarray, bits: int) -> Repeats:
    """Return which image each one repeats, by hashes and colours; see :func:`pairs_by_hash` and :func:`first_of_each`.

    The images stand in the order in which they are preferred.
    """
    # Equal images are compared once: of ten thousand blank ones, each pair would be a pair.
    rows = np.concatenate([hashes[:, None].view(np.uint8), colours], 1)
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    numbers = np.sort(first)
    place = np.searchsorted(numbers, first[inverse.ravel()])
    pairs, distances = pairs_by_hash(hashes[numbers], colours[numbers], bits)
    distinct = first_of_each(pairs, distances, len(numbers))
    return Repeats(numbers[distinct.original][place], distinct.likeness[place])


def repeats_by_features(features: np.ndarray, cosine: float, device: torch.device | str = "cpu") -> Repeats:
    """Return which image each one repeats, by features; see :func:`pairs_by_features` and :func:`first_of_each`."""
    pairs, cosines = pairs_by_features(features, cosine, device)
    return first_of_each(pairs, cosines, len(features))


def first_of_each(pairs: np.ndarray, likeness: np.ndarray, count: int) -> Repeats:
    """Return which of ``count`` images each one repeats, if ``pairs`` of them are alike.

    The images stand in the order in which they are preferred. Each is compared with those before it that stay, so a
    chain of images, each a little different from the last, keeps more than its first.
    """
    original, found = np.arange(count), np.zeros(count)
    order = np.lexsort((pairs[:, 0], pairs[:, 1]))
    for (first, second), value in zip(pairs[order].tolist(), likeness[order].tolist(), strict=True):
        if original[second] == second and original[first] == first:
            original[second], found[second] = first, value
    return Repeats(original, found)
