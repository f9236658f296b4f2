"""Distances between generated and real images, from the features of any network: pure functions of ``(n, d)`` tensors.

The distances of whole sets (:data:`DISTANCES`) take counts, which say how often each sample counts. So a bootstrap
changes the counts, and a sample that counts twice is never paired with itself as if it were two samples that agree. The
other metrics are means over one value per sample, which a bootstrap resamples directly.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Callable[[Tensor, Tensor], float]
"""A distance of two sets, given how often each sample of the two counts, ``(n,)`` and ``(m,)``."""

KERNEL_WIDTH = 10.0
"""Width of the Gaussian kernel on features of unit length, as in CMMD."""

SCALE = 1000.0
"""Factor that CMMD multiplies its values by, so that they are easy to read."""


def frechet(generated: Tensor, real: Tensor) -> Distance:
    """Return the Frechet distance between Gaussians with the sets' means and covariances (Heusel et al. 2017).

    On Inception's features it is FID. The trace of the square root of the covariances' product is the sum of the
    singular values of ``X Y'``, where X and Y are the centred features. This is exact, and much cheaper than the square
    root of a d x d matrix if there are fewer samples than features.

    Args:
        generated: features ``(n, d)``, n >= 2.
        real: features ``(m, d)``, m >= 2.
    """
    generated, real = generated.double(), real.double()

    def distance(generated_counts: Tensor, real_counts: Tensor) -> float:
        (mean, x), (other_mean, y) = _moments(generated, generated_counts), _moments(real, real_counts)
        roots = torch.linalg.svdvals(_compress(x) @ _compress(y).T).sum()
        between = (mean - other_mean).square().sum()
        # If the sets are equal, rounding errors can make the sum negative.
        return max(0.0, float(between + x.square().sum() + y.square().sum() - 2 * roots))

    return distance


def _moments(features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean, and rows X such that X'X is the covariance."""
    counts = counts.to(features)
    mean = counts @ features / counts.sum()
    kept = counts > 0
    rows = (features[kept] - mean) * (counts[kept] / (counts.sum() - 1)).sqrt()[:, None]
    return mean, rows


def _compress(rows: Tensor) -> Tensor:
    """Return at most d rows with the same ``X'X``."""
    return rows if rows.shape[0] <= rows.shape[1] else torch.linalg.qr(rows, mode="r").R


def kid(generated: Tensor, real: Tensor) -> Distance:
    """Return the kernel Inception distance (Binkowski et al. 2018) over all samples at once.

    It is the unbiased squared MMD with the kernel ``(x'y / d + 1)^3``. It suits small sets, and may be below 0.
    """
    width = generated.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / width + 1) ** 3

    return _mmd(kernel, generated.double(), real.double(), unbiased=True)


def mmd(generated: Tensor, real: Tensor) -> Distance:
    """Return CMMD's distance (Jayasumana et al. 2024) on any features.

    It is 1000 times the squared MMD with a Gaussian kernel of width 10 on features of unit length. As in CMMD, each
    sample is also paired with itself.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return SCALE * torch.exp(-torch.cdist(x, y).square() / (2 * KERNEL_WIDTH**2))

    return _mmd(kernel, F.normalize(generated.double()), F.normalize(real.double()), unbiased=False)


def _mmd(kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, unbiased: bool) -> Distance:
    kernel_xx, kernel_yy, kernel_xy = kernel(x, x), kernel(y, y), kernel(x, y)
    if unbiased:
        kernel_xx.fill_diagonal_(0)
        kernel_yy.fill_diagonal_(0)

    def within(gram: Tensor, counts: Tensor) -> Tensor:
        pairs = counts.sum() ** 2 - (counts.square().sum() if unbiased else 0)
        return counts @ gram @ counts / pairs

    def distance(generated_counts: Tensor, real_counts: Tensor) -> float:
        a, b = generated_counts.double(), real_counts.double()
        cross = a @ kernel_xy @ b / (a.sum() * b.sum())
        return float(within(kernel_xx, a) + within(kernel_yy, b) - 2 * cross)

    return distance


DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Distance]] = {"frechet": frechet, "kid": kid, "mmd": mmd}
"""Distances of whole sets, by name; smaller is better."""


def unit_counts(samples: Tensor) -> Tensor:
    """Return counts with which each sample of a set counts once."""
    return torch.ones(len(samples), dtype=torch.float64)


# --- one value per sample -----------------------------------------------------------------------


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = 3) -> tuple[Tensor, Tensor]:
    """Return improved precision and recall (Kynkaanniemi et al. 2019), as 0 or 1 per generated and per real sample.

    Precision is the share of generated samples that lie within the reach of a real one, which is the distance to that
    one's k-th nearest neighbour among the real ones. Recall is the same with the two sets exchanged.

    Args:
        generated: features ``(n, d)``.
        real: features ``(m, d)``.
        neighbours: k, which must be below n and m.
    """
    generated, real = generated.double(), real.double()
    between = torch.cdist(generated, real)
    precision = (between <= _neighbour_distances(real, neighbours)).any(1)
    recall = (_neighbour_distances(generated, neighbours) >= between.T).any(1)
    return precision.double(), recall.double()


def _neighbour_distances(samples: Tensor, neighbours: int) -> Tensor:
    """Return each sample's distance to its k-th nearest neighbour, itself not counted."""
    return torch.cdist(samples, samples).kthvalue(neighbours + 1, dim=1).values


def nearest_neighbours(samples: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each sample the distance to the nearest of the others, and the index of that one."""
    distances, indices = torch.cdist(samples.double(), others.double()).min(1)
    return distances, indices


def retrieval(similarity: Tensor, captions: list[str], k: int) -> Tensor:
    """Return for each image 1 if its caption is among the k most similar of all distinct captions, else 0.

    Args:
        similarity: ``(n, n)``, similarity of image i (row) and caption j (column).
        captions: n captions, some of which may be equal.
        k: number of most similar captions, at least 1.
    """
    firsts = {caption: index for index, caption in reversed(list(enumerate(captions)))}
    columns = sorted(firsts.values())
    own = torch.tensor([columns.index(firsts[caption]) for caption in captions])
    best = similarity[:, columns].topk(min(k, len(columns)), dim=1).indices
    return (best == own[:, None]).any(1).double()
