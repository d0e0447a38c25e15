"""Axes: where a value lies between the two ends of an axis, and which ticks it gets."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

DET_TICKS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
LOG_FROM_RATIO = 8.0  # a wider range than this crowds its small values on a linear axis


@dataclass(frozen=True)
class Scale:
    """One axis: its ends, its tick values with their labels, and the function it is linear in."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    transform: Callable[[float], float] = float
    kind: str = "linear"

    def fraction(self, value: float) -> float:
        """Give the place of a value along the axis: 0 at the low end, 1 at the high end."""
        start, end = self.transform(self.low), self.transform(self.high)
        return (self.transform(value) - start) / (end - start)


def scale_for(values: Sequence[float], from_zero: bool = False) -> Scale:
    """Choose a linear axis around the values, or a logarithmic one if they span a wide range.

    Args:
        values: What must be on the axis; none of them negative, at least one.
        from_zero: Start a linear axis at 0, so that lengths compare; it takes a wider range to give that up.
    """
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_FROM_RATIO * (3 if from_zero else 1):
        return _log_scale(low, high)
    if from_zero:
        low, high = 0.0, 1.08 * high
    else:
        room = 0.12 * (high - low) or 0.1 * high
        low, high = max(0.0, low - room), high + room
    if high <= low:
        high = low + 1.0
    return Scale(low, high, tuple((tick, f"{tick:g}") for tick in nice_ticks(low, high)))


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Choose round tick values, 1, 2 or 5 times a power of ten apart, within the ends of an axis."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda candidate: abs(candidate - rough))
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, decimals) for index in range(first, last + 1)]


def _log_scale(low: float, high: float) -> Scale:
    low, high = low / 1.4, high * 1.4
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    shown = tuple((tick, f"{tick:g}") for tick in ticks if low <= tick <= high)
    return Scale(low, high, shown, math.log10, "log")


def det_scale(rates: Sequence[float]) -> Scale:
    """Choose a normal-deviate axis that shows a decade below the lowest of the error rates and all above it.

    Args:
        rates: Operating points, as fractions.
    """
    measured = [rate for rate in rates if rate > 0] or [0.01]
    low = max((tick for tick in DET_TICKS if tick <= min(measured) / 10), default=DET_TICKS[0])
    high = min((tick for tick in DET_TICKS if tick >= max(0.4, 1.3 * max(measured))), default=DET_TICKS[-1])
    ticks = tuple((tick, f"{100 * tick:g}") for tick in DET_TICKS if low <= tick <= high)
    return Scale(low, high, ticks, NormalDist().inv_cdf, "normal deviate")
