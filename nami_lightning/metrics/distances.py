"""Distances between drawn and real images, from the features of any network: pure functions on ``(n, d)`` tensors.

The distances of whole sets (:data:`DISTANCES`) take how often each sample counts, so that a bootstrap is a change of
counts and not of samples; a pair of a sample with itself is never taken for two samples that agree. The others are
means over one number a sample, which a bootstrap resamples directly.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Callable[[Tensor, Tensor], float]
"""Of two sets, given how often each sample of the first and of the second counts, ``(n,)`` and ``(m,)``."""

SIGMA = 10.0
"""Width of the Gaussian kernel on features of unit length; CMMD's choice."""

SCALE = 1000.0
"""By which CMMD multiplies, so that its values are easy to read."""


def frechet(drawn: Tensor, real: Tensor) -> Distance:
    """Frechet distance between Gaussians of the same means and covariances (Heusel et al. 2017; FID on Inception).

    The trace of the root of the covariances' product is the sum of the singular values of ``X Y'``, X and Y being the
    centred features: exact, and much cheaper than a root of d x d matrices where there are fewer samples than features.

    Args:
        drawn: ``(n, d)``, n >= 2.
        real: ``(m, d)``, m >= 2.
    """
    drawn, real = drawn.double(), real.double()

    def distance(drawn_counts: Tensor, real_counts: Tensor) -> float:
        (mean, x), (other_mean, y) = _moments(drawn, drawn_counts), _moments(real, real_counts)
        roots = torch.linalg.svdvals(_short(x) @ _short(y).T).sum()
        between = (mean - other_mean).square().sum()
        # The sum can fall below 0 by rounding where the sets are equal.
        return max(0.0, float(between + x.square().sum() + y.square().sum() - 2 * roots))

    return distance


def _moments(features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and rows X with X'X the covariance."""
    counts = counts.to(features)
    mean = counts @ features / counts.sum()
    kept = counts > 0
    rows = (features[kept] - mean) * (counts[kept] / (counts.sum() - 1)).sqrt()[:, None]
    return mean, rows


def _short(rows: Tensor) -> Tensor:
    """At most d rows with the same ``X'X``."""
    return rows if rows.shape[0] <= rows.shape[1] else torch.linalg.qr(rows, mode="r").R


def kid(drawn: Tensor, real: Tensor) -> Distance:
    """Kernel Inception distance (Binkowski et al. 2018) over all samples at once: the unbiased squared MMD under the
    kernel ``(x'y / d + 1)^3``. Fit for small sets; may be below 0."""
    width = drawn.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / width + 1) ** 3

    return _mmd(kernel, drawn.double(), real.double(), unbiased=True)


def mmd(drawn: Tensor, real: Tensor) -> Distance:
    """CMMD's distance (Jayasumana et al. 2024) on any features: 1000 times the squared MMD under a Gaussian kernel of
    width 10 on features of unit length, each sample paired with itself too, as there."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return SCALE * torch.exp(-torch.cdist(x, y).square() / (2 * SIGMA**2))

    return _mmd(kernel, F.normalize(drawn.double()), F.normalize(real.double()), unbiased=False)


def _mmd(kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, unbiased: bool) -> Distance:
    kernel_xx, kernel_yy, kernel_xy = kernel(x, x), kernel(y, y), kernel(x, y)
    if unbiased:
        kernel_xx.fill_diagonal_(0)
        kernel_yy.fill_diagonal_(0)

    def within(gram: Tensor, counts: Tensor) -> Tensor:
        pairs = counts.sum() ** 2 - (counts.square().sum() if unbiased else 0)
        return counts @ gram @ counts / pairs

    def distance(drawn_counts: Tensor, real_counts: Tensor) -> float:
        a, b = drawn_counts.double(), real_counts.double()
        cross = a @ kernel_xy @ b / (a.sum() * b.sum())
        return float(within(kernel_xx, a) + within(kernel_yy, b) - 2 * cross)

    return distance


DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Distance]] = {"frechet": frechet, "kid": kid, "mmd": mmd}
"""Of whole sets; smaller is better."""


def once(samples: Tensor) -> Tensor:
    """Counts of a set in which each sample counts once."""
    return torch.ones(len(samples), dtype=torch.float64)


# --- one number a sample -----------------------------------------------------------------------


def precision_recall(drawn: Tensor, real: Tensor, neighbours: int = 3) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), as 0 or 1 for each drawn and for each real sample.

    Precision is the share of drawn samples within the reach of a real one, the distance to that one's k-th nearest
    neighbour among the real; recall the same with the sides exchanged.

    Args:
        drawn: ``(n, d)``.
        real: ``(m, d)``.
        neighbours: k, below n and m.
    """
    drawn, real = drawn.double(), real.double()
    between = torch.cdist(drawn, real)
    precision = (between <= _reach(real, neighbours)).any(1)
    recall = (_reach(drawn, neighbours) >= between.T).any(1)
    return precision.double(), recall.double()


def _reach(samples: Tensor, neighbours: int) -> Tensor:
    """Each sample's distance to its k-th nearest neighbour; the nearest of all is itself."""
    return torch.cdist(samples, samples).kthvalue(neighbours + 1, dim=1).values


def nearest(samples: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample the distance to the nearest of the others, and which that is."""
    distances, indices = torch.cdist(samples.double(), others.double()).min(1)
    return distances, indices


def retrieval(similarity: Tensor, captions: list[str], k: int) -> Tensor:
    """For each image 0 or 1: whether its own caption is among the k most similar of all different ones.

    Args:
        similarity: ``(n, n)``, of image i (row) and caption j.
        captions: n, some perhaps equal.
        k: at least 1.
    """
    firsts = {caption: index for index, caption in reversed(list(enumerate(captions)))}
    columns = sorted(firsts.values())
    own = torch.tensor([columns.index(firsts[caption]) for caption in captions])
    best = similarity[:, columns].topk(min(k, len(columns)), dim=1).indices
    return (best == own[:, None]).any(1).double()
