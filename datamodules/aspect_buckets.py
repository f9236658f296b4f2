"""Image shapes: the squares and the other aspect ratios that buckets have.

All resolutions share one set of aspect ratios, which is chosen at the coarsest resolution. The shape at a finer
resolution is the shape at the coarsest one, doubled as often as needed. So an image of any bucket can be reduced to the
resolution of every coarser stage.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple


class Shape(NamedTuple):
    """The width and the height of an image, in px."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Aspect(NamedTuple):
    """An aspect ratio: a shape's width and height, each divided by the resolution. (1, 1) is the square."""

    width: Fraction
    height: Fraction

    def shape(self, resolution: int) -> Shape:
        """Return the shape of this aspect ratio at ``resolution``."""
        return Shape(int(self.width * resolution), int(self.height * resolution))

    @property
    def ratio(self) -> float:
        """The width divided by the height."""
        return float(self.width / self.height)

    def __str__(self) -> str:
        ratio = self.width / self.height
        return f"{ratio.numerator}:{ratio.denominator}"


SQUARE = Aspect(Fraction(1), Fraction(1))


def aspect_of(shape: Shape, resolution: int) -> Aspect:
    """Return the aspect ratio of a bucket that has ``shape`` at ``resolution``."""
    return Aspect(Fraction(shape.width, resolution), Fraction(shape.height, resolution))


def aspects(resolution: int, step: int | None, widest: float) -> list[Aspect]:
    """Return the aspect ratios that a data set's buckets have, from the tallest to the widest.

    Args:
        resolution: the coarsest resolution in px. The area of each shape there is as near to ``resolution**2`` as
            ``step`` allows.
        step: the sides of all shapes are multiples of this number of px: the model's patch size times the
            autoencoder's factor. None gives squares only.
        widest: the largest ratio of the longer side to the shorter side.

    Raises:
        ValueError: ``resolution`` is not a multiple of ``step``, or ``widest`` is below 1.
    """
    if step is None:
        return [SQUARE]
    if resolution % step or widest < 1:
        raise ValueError(
            f"aspect_step {step} must divide the coarsest resolution, {resolution} px, and widest_aspect {widest} "
            "must be at least 1"
        )
    tall: list[Shape] = []
    for height in range(resolution + step, int(resolution * math.sqrt(widest)) + step, step):
        width = round(resolution**2 / height / step) * step
        if width and height / width <= widest and all(shape.width != width for shape in tall):
            tall.append(Shape(width, height))
    shapes = [*reversed(tall), Shape(resolution, resolution), *(Shape(h, w) for w, h in tall)]
    return [aspect_of(shape, resolution) for shape in shapes]


def nearest_aspect(width: int, height: int, candidates: Sequence[Aspect]) -> Aspect:
    """Return the aspect ratio for which cropping removes least of an image of ``width`` by ``height``."""
    return min(candidates, key=lambda aspect: abs(math.log(aspect.ratio * height / width)))


def highest_filled(width: int, height: int, aspect: Aspect, resolutions: Sequence[int]) -> int | None:
    """Return the highest of ``resolutions`` whose shape an image covers without being enlarged, or None."""
    filled = [r for r in resolutions if width >= aspect.shape(r).width and height >= aspect.shape(r).height]
    return max(filled, default=None)
