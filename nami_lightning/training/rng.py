"""Chance as a pure function: every random number of training belongs to one sample of one global batch.

A sample's draws come from a generator seeded by (seed, batch number, place in the global batch, purpose), so
they do not depend on ranks, workers, or interruptions, and a new purpose does not move the others.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def uniform_of(*parts: int | str) -> float:
    """A number in [0, 1) from numbers and words, the same on every machine."""
    return (seed_of(*parts) >> 10) / 2**53


@dataclass(frozen=True)
class Draws:
    """Base draws of a micro-batch of n samples.

    Attributes:
        noise: ``(n, C, H, W)`` standard normal.
        normal: ``(n,)`` standard normal, for tau.
        uniform: ``(n, 3)`` in [0, 1): two for tau, one for the prompt dropout.
    """

    noise: Tensor
    normal: Tensor
    uniform: Tensor


def draw(
    seed: int, batch: int | str, places: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Draws:
    """The draws of the samples at ``places`` of global batch ``batch``; ``shape`` is the noise's, ``(C, H, W)``."""
    generator = torch.Generator(device)
    noise, normal, uniform = [], [], []
    for place in places:
        generator.manual_seed(seed_of(seed, batch, place, "noise"))
        noise.append(torch.randn(*shape, generator=generator, device=device))
        generator.manual_seed(seed_of(seed, batch, place, "time"))
        normal.append(torch.randn(1, generator=generator, device=device))
        uniform.append(torch.rand(3, generator=generator, device=device))
    return Draws(torch.stack(noise), torch.cat(normal), torch.stack(uniform))


def draw_normal(
    seed: int, batch: int | str, places: Sequence[int], purpose: str, shape: Sequence[int], device: torch.device | str
) -> Tensor:
    """``(n, *shape)`` standard normal draws of another ``purpose`` (the autoencoder's, say)."""
    generator = torch.Generator(device)
    rows = []
    for place in places:
        generator.manual_seed(seed_of(seed, batch, place, purpose))
        rows.append(torch.randn(*shape, generator=generator, device=device))
    return torch.stack(rows)
