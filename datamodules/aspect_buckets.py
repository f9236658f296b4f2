"""Shapes of images: the squares and the aspect ratios that buckets are made of.

All resolutions share one set of aspect ratios, chosen at the coarsest: a shape of a finer resolution is that of a
coarser one, doubled and doubled again, so an image of any bucket can be brought to every stage below it.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple


class Shape(NamedTuple):
    """Width and height in px."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Aspect(NamedTuple):
    """A shape relative to its resolution; (1, 1) is the square."""

    width: Fraction
    height: Fraction

    def shape(self, resolution: int) -> Shape:
        """The shape of this aspect at ``resolution``."""
        return Shape(int(self.width * resolution), int(self.height * resolution))

    @property
    def ratio(self) -> float:
        """Width by height."""
        return float(self.width / self.height)

    def __str__(self) -> str:
        ratio = self.width / self.height
        return f"{ratio.numerator}:{ratio.denominator}"


SQUARE = Aspect(Fraction(1), Fraction(1))


def aspect_of(shape: Shape, resolution: int) -> Aspect:
    """The aspect of a bucket's ``shape``."""
    return Aspect(Fraction(shape.width, resolution), Fraction(shape.height, resolution))


def aspects(resolution: int, step: int | None, widest: float) -> list[Aspect]:
    """The aspects of a data set, the widest last.

    Args:
        resolution: the coarsest; a shape's area there is as near to its square as ``step`` allows.
        step: sides are multiples of this (the model's patch times the autoencoder's factor); None: squares only.
        widest: largest ratio of the longer to the shorter side.

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
    found = [*reversed(tall), Shape(resolution, resolution), *(Shape(h, w) for w, h in tall)]
    return [aspect_of(shape, resolution) for shape in found]


def nearest_aspect(width: int, height: int, candidates: Sequence[Aspect]) -> Aspect:
    """The aspect that an image of ``width`` by ``height`` loses least to by cropping."""
    return min(candidates, key=lambda aspect: abs(math.log(aspect.ratio * height / width)))


def highest_filled(width: int, height: int, aspect: Aspect, resolutions: Sequence[int]) -> int | None:
    """The highest of ``resolutions`` whose shape an image covers without being enlarged; None if it covers none."""
    filled = [r for r in resolutions if width >= aspect.shape(r).width and height >= aspect.shape(r).height]
    return max(filled, default=None)
