"""A histogram that grows with what it is given, and comes out the same whatever the order."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Counts = NDArray[np.int64]

HALF = 8192  # bins on either side of 0; at least half of them lie below the largest magnitude seen
SMALLEST_EXPONENT = -100  # of the magnitude covered: the scale of smaller values would be infinite in float32


class Histogram:
    """Counts of values in equal bins around 0, whose width is a power of two.

    When a value lies outside, the width doubles and bins are added in pairs. Scaling by a power of two is exact, so
    the pairs hold what the wider bins would have counted: the result does not depend on the order of the values. (Below
    1e-30 the processor may take a value for 0.)

    Attributes:
        counts: (2 * HALF,); bin ``HALF + i`` counts the values in [i, i + 1) * width.
        width: Of a bin.
    """

    def __init__(self) -> None:
        self.counts: Counts = np.zeros(2 * HALF, np.int64)
        self._exponent = SMALLEST_EXPONENT

    @property
    def width(self) -> float:
        """Width of a bin, in the unit of the values."""
        return math.ldexp(1.0, self._exponent) / HALF

    def add(self, values: Array, low: float, high: float, weight: int = 1) -> None:
        """Count values.

        Args:
            values: (n,) finite.
            low: No value is less.
            high: No value is greater.
            weight: How often each counts.
        """
        self._cover(max(-low, high))
        scale = np.float32(1 / self.width)
        first = math.floor(np.float32(low) * scale)
        bins = np.floor(values * scale).astype(np.int16)
        bins -= np.int16(first)
        counts = np.bincount(bins)
        self.counts[HALF + first : HALF + first + len(counts)] += weight * counts

    def _cover(self, magnitude: float) -> None:
        exponent = math.frexp(magnitude)[1] if magnitude else SMALLEST_EXPONENT  # magnitude < 2 ** exponent
        while self._exponent < exponent:
            if not self.counts.any():
                self._exponent = exponent
                return
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(pairs, HALF // 2)
            self._exponent += 1


def thinned(values: NDArray[Any], wanted: int) -> tuple[NDArray[Any], int]:
    """Take every n-th value of an array, about ``wanted`` of them, and n; all of them where there are not more.

    The step has no factor in common with the size, so that it goes through all channels, bins and frames alike,
    whatever the order of the axes.
    """
    step = max(1, math.ceil(values.size / wanted))
    while math.gcd(step, values.size) > 1:
        step += 1
    return values.reshape(-1)[::step], step
