"""Random numbers as a pure function: each one of training belongs to one sample of one global batch.

A sample's numbers come from a generator that is seeded by (seed, seed key, index in the global batch, purpose). The
seed key is the number of the batch, or a word such as ``validation``. So the numbers do not depend on ranks, workers or
interruptions, and a new purpose does not move the others.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that is computed from numbers and words, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def derive_uniform(*parts: int | str) -> float:
    """Return a number in [0, 1) that is computed from numbers and words, the same on every machine."""
    return (derive_seed(*parts) >> 10) / 2**53


@dataclass(frozen=True)
class RandomNumbers:
    """The random numbers of a micro-batch of n samples.

    Attributes:
        noise: ``(n, C, H, W)`` standard normal.
        normal: ``(n,)`` standard normal, for tau.
        uniform: ``(n, 3)`` in [0, 1): two for tau, one for the prompt dropout.
    """

    noise: Tensor
    normal: Tensor
    uniform: Tensor


def sample(
    seed: int,
    seed_key: int | str,
    global_indices: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> RandomNumbers:
    """Return the random numbers of some samples of a global batch.

    Args:
        seed: of the run.
        seed_key: number of the global batch, or a word.
        global_indices: indices of the samples in the global batch.
        shape: ``(C, H, W)`` of the noise.
        device: where they are made; a CPU's numbers differ from a GPU's.
    """
    generator = torch.Generator(device)
    noise, normal, uniform = [], [], []
    for index in global_indices:
        generator.manual_seed(derive_seed(seed, seed_key, index, "noise"))
        noise.append(torch.randn(*shape, generator=generator, device=device))
        generator.manual_seed(derive_seed(seed, seed_key, index, "time"))
        normal.append(torch.randn(1, generator=generator, device=device))
        uniform.append(torch.rand(3, generator=generator, device=device))
    return RandomNumbers(torch.stack(noise), torch.cat(normal), torch.stack(uniform))


def sample_normal(
    seed: int,
    seed_key: int | str,
    global_indices: Sequence[int],
    purpose: str,
    shape: Sequence[int],
    device: torch.device | str,
) -> Tensor:
    """Return ``(n, *shape)`` standard normal numbers for another ``purpose``, as :func:`sample` does."""
    generator = torch.Generator(device)
    rows = []
    for index in global_indices:
        generator.manual_seed(derive_seed(seed, seed_key, index, purpose))
        rows.append(torch.randn(*shape, generator=generator, device=device))
    return torch.stack(rows)
