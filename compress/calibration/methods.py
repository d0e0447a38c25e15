"""Which part of a histogram 8 bits should cover.

Ends are numbers of bins: the range [low, high) has the bins low..high - 1, of which bin 0 starts at the value 0.
Always low <= 0 <= high. For a symmetric range the values are folded to their magnitudes first, and low is 0.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.calibration.histogram import HALF, Counts

Ends = NDArray[np.int64]
Costs = NDArray[np.float64]

CANDIDATES = 96  # ends tried on a side, from the outermost value inwards
ENTROPY_MERGED = 2  # histogram bins to a bin of the divergence, which needs counts rather than resolution


def folded(counts: Counts) -> Counts:
    """Counts of the magnitudes."""
    magnitudes = np.zeros_like(counts)
    magnitudes[HALF:] = counts[HALF:] + counts[HALF - 1 :: -1]
    return magnitudes


def occupied(counts: Counts) -> tuple[int, int]:
    """Ends of what was counted."""
    bins = np.flatnonzero(counts) - HALF
    return min(int(bins[0]), 0), max(int(bins[-1]) + 1, 0)


def percentile(counts: Counts, percent: float, symmetric: bool) -> tuple[int, int]:
    """Leave out the outermost values, so that ``percent`` of them lie within: as many on either side, if not symmetric.

    Args:
        counts: Folded, if ``symmetric``.
        percent: Of the values, over 0 and up to 100.
        symmetric: Whether ``counts`` are of magnitudes.
    """
    total = int(counts.sum())
    cut = total * (100 - percent) / (100 if symmetric else 200)  # in this order, so that 99.9 % of 3000 are 2997
    high = int(np.argmax(total - np.cumsum(counts) <= cut)) + 1
    low = 2 * HALF - 1 - int(np.argmax(total - np.cumsum(counts[::-1]) <= cut))
    return min(low - HALF, 0), max(high - HALF, 0)


def entropy(counts: Counts, symmetric: bool) -> tuple[int, int]:
    """The range in which the quantized distribution is nearest to the true one, see :func:`divergence`."""
    coarse = counts.reshape(-1, ENTROPY_MERGED).sum(axis=1)
    # The bin with the zeros of ReLU is no part of a density: spread over its level, it would outweigh all the rest.
    zero = HALF // ENTROPY_MERGED
    coarse[zero] = coarse[zero + 1]
    low, high = occupied(counts)
    if not coarse.any():
        return low, high
    low, high = low // ENTROPY_MERGED, -(-high // ENTROPY_MERGED)
    levels = 128 if symmetric else 256
    low, high = search(partial(divergence, coarse, levels=levels), low, high, levels)
    return low * ENTROPY_MERGED, high * ENTROPY_MERGED


def mse(counts: Counts, symmetric: bool) -> tuple[int, int]:
    """The range with the least squared error of rounding and clipping, see :func:`squared_error`."""
    steps = 127 if symmetric else 255
    return search(partial(squared_error, counts, steps=steps), *occupied(counts), 2 * steps)


def search(cost: Callable[[Ends, Ends], Costs], low: int, high: int, least: int) -> tuple[int, int]:
    """Try ends from the given ones inwards, one side after the other, and keep the cheapest; the widest of equals.

    Args:
        cost: Of ranges, from their low and high ends.
        low: Where the values start.
        high: Where they end.
        least: No range of fewer bins is tried: a bin must stay small beside a step.
    """
    for _ in range(2 if low < 0 < high else 1):  # the best end of one side depends on the other
        if high > 0:
            ends = _inwards(high, least + low)
            high = int(ends[np.argmin(cost(np.full_like(ends, low), ends))])
        if low < 0:
            ends = -_inwards(-low, least - high)
            low = int(ends[np.argmin(cost(ends, np.full_like(ends, high)))])
    return low, high


def _inwards(outer: int, least: int) -> Ends:
    inner = min(outer, max(1, least))
    return np.unique(np.linspace(inner, outer, CANDIDATES).round().astype(np.int64))[::-1]


def squared_error(counts: Counts, lows: Ends, highs: Ends, steps: int) -> Costs:
    """Squared error of rounding the values to ``steps`` + 1 levels in each range, in bins squared, summed.

    The levels are multiples of a scale and 0 is among them, as for a uniform affine quantizer.
    """
    centres = np.arange(len(counts)) - len(counts) // 2 + 0.5
    moments = [_before(counts * centres**power) for power in (0, 1, 2)]
    scale = (highs - lows)[:, None] / steps
    levels = (np.arange(steps + 1) - np.rint(-lows[:, None] / scale)) * scale
    # Values between the middles of neighbouring levels go to the same level; the outermost take all that is left.
    cells = np.zeros((len(lows), steps + 2), np.int64)
    middles = levels[:, :-1] + scale / 2
    cells[:, 1:-1] = np.ceil(middles - 0.5) + len(counts) // 2
    cells[:, -1] = len(counts)
    zeroth, first, second = (np.diff(moment[np.clip(cells, 0, len(counts))], axis=1) for moment in moments)
    error: Costs = (second - 2 * levels * first + levels**2 * zeroth).sum(axis=1)
    return error


def divergence(counts: Counts, lows: Ends, highs: Ends, levels: int) -> Costs:
    """Kullback-Leibler divergence of the quantized distribution from the true one, clipped to each range.

    In the true distribution the outermost bins hold all that lies outside. The quantized one knows only what lies
    inside, and spreads the sum of each level evenly over its bins, except those that are empty.

    Source: S. Migacz, "8-bit Inference with TensorRT", GPU Technology Conference 2017.
    """
    start, end = lows + len(counts) // 2, highs + len(counts) // 2
    before, filled, logs = _before(counts), _before(counts > 0), _before(_log_power(counts))
    total, inside = before[-1], before[end] - before[start]
    below, above = before[start], total - before[end]
    first, last = counts[start], counts[end - 1]
    cells = start[:, None] + np.rint(np.arange(levels + 1) * (end - start)[:, None] / levels).astype(np.int64)
    quantized, bins = np.diff(before[cells], axis=1), np.diff(filled[cells], axis=1)
    true = quantized.copy()
    true[:, 0] += below
    true[:, -1] += above
    bins[:, 0] += (first == 0) & (below > 0)
    bins[:, -1] += (last == 0) & (above > 0)
    information = logs[end] - logs[start]
    information += _log_power(first + below) - _log_power(first) + _log_power(last + above) - _log_power(last)
    with np.errstate(divide="ignore", invalid="ignore"):  # a level of outliers alone: infinitely far
        expected = np.where(true > 0, true * np.log(quantized / (inside[:, None] * bins)), 0.0).sum(axis=1)
    divergences: Costs = (information - expected) / total - np.log(total)
    return np.where(inside > 0, divergences, np.inf)


def _before(values: NDArray[Any]) -> Costs:
    """Sum of the values before each, and of all."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _log_power(values: NDArray[Any]) -> Costs:
    """x log x, 0 at 0."""
    powers: Costs = values * np.log(np.maximum(values, 1))
    return powers
