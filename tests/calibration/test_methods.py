"""Ranges from histograms are those that a direct computation on the values finds."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.calibration import methods
from compress.calibration.histogram import Histogram

DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "relu": lambda rng, n: np.maximum(rng.standard_normal(n) - 0.5, 0),
    "laplace": lambda rng, n: rng.laplace(size=n) - 1,
    "uniform": lambda rng, n: rng.uniform(-3, 1, n),
    "negative": lambda rng, n: -rng.gamma(2, size=n),
    "silu": lambda rng, n: (x := 3 * rng.standard_normal(n)) / (1 + np.exp(-x)),
}
distribution = st.sampled_from(sorted(DISTRIBUTIONS))


def draw(name: str, seed: int, count: int, scale: float = 1.0) -> tuple[np.ndarray, Histogram]:
    values = (scale * DISTRIBUTIONS[name](np.random.default_rng(seed), count)).astype(np.float32)
    histogram = Histogram()
    histogram.add(values, float(values.min()), float(values.max()))
    return values.astype(np.float64), histogram


def folded(values: np.ndarray, histogram: Histogram, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    return (np.abs(values), methods.folded(histogram.counts)) if symmetric else (values, histogram.counts)


@settings(max_examples=60, deadline=None)
@given(distribution, st.integers(0, 99), st.integers(8000, 10000), st.floats(1e-3, 1e3), st.booleans())
def test_percentile_is_within_a_bin_of_the_true_one(
    name: str, seed: int, hundredths: int, scale: float, symmetric: bool
) -> None:
    values, histogram = draw(name, seed, 2999, scale)  # a prime: no share falls between two values
    values, counts = folded(values, histogram, symmetric)
    percent = hundredths / 100
    outside = (100 - percent) / (1 if symmetric else 2)
    # numpy's by counting: the least value that has at most so many above it
    high = max(np.percentile(values, 100 - outside, method="inverted_cdf"), 0)
    low = min(-np.percentile(-values, 100 - outside, method="inverted_cdf"), 0)
    found = np.array(methods.percentile(counts, percent, symmetric)) * histogram.width
    assert found[1] == pytest.approx(high, abs=1.001 * histogram.width)
    if not symmetric:
        assert found[0] == pytest.approx(low, abs=1.001 * histogram.width)


def rounding_error(values: np.ndarray, low: float, high: float, steps: int) -> float:
    """Squared error of a uniform affine quantizer, the direct way."""
    scale = (high - low) / steps
    zero_point = np.rint(-low / scale)
    quantized = np.clip(np.rint(values / scale) + zero_point, 0, steps)
    return float(((values - (quantized - zero_point) * scale) ** 2).sum())


@settings(max_examples=40, deadline=None)
@given(distribution, st.integers(0, 99), st.floats(0.15, 1), st.floats(0.15, 1))
def test_squared_error_is_that_of_quantizing_the_values(name: str, seed: int, below: float, above: float) -> None:
    values, histogram = draw(name, seed, 3000)
    low, high = (round(p * end) for p, end in zip((below, above), methods.occupied(histogram.counts), strict=True))
    low -= max(0, 512 - (high - low))  # bins stay small beside the steps
    estimate = methods.squared_error(histogram.counts, np.array([low]), np.array([high]), 255)[0]
    width = histogram.width
    within_bins = len(values) / 12  # of values anywhere in their bins, which the estimate takes to be in the middle
    assert (estimate + within_bins) * width**2 == pytest.approx(
        rounding_error(values, low * width, high * width, 255), rel=0.15
    )


@settings(max_examples=20, deadline=None)
@given(distribution, st.integers(0, 99), st.booleans())
def test_mse_is_near_the_best_of_all_ranges(name: str, seed: int, symmetric: bool) -> None:
    values, histogram = draw(name, seed, 4000)
    values, counts = folded(values, histogram, symmetric)
    steps = 127 if symmetric else 255
    low, high = np.array(methods.mse(counts, symmetric)) * histogram.width
    lows, highs = (np.linspace(0.2, 1, 25) * end for end in (min(values.min(), 0), max(values.max(), 0)))
    best = min(rounding_error(values, a, b, steps) for a in np.unique(lows) for b in np.unique(highs) if b > a)
    assert rounding_error(values, low, high, steps) <= 1.05 * best


def slow_divergence(counts: np.ndarray, low: int, high: int, levels: int) -> float:
    """The published procedure, bin by bin."""
    half = len(counts) // 2
    inside = [float(c) for c in counts[half + low : half + high]]
    true = list(inside)
    true[0] += counts[: half + low].sum()
    true[-1] += counts[half + high :].sum()
    quantized = [0.0] * len(inside)
    edges = [round(level * len(inside) / levels) for level in range(levels + 1)]
    for start, end in pairwise(edges):
        filled = [i for i in range(start, end) if true[i] > 0]
        for i in filled:
            quantized[i] = sum(inside[start:end]) / len(filled)
    divergence = 0.0
    for p, q in zip(true, quantized, strict=True):
        if p > 0:
            if q == 0:
                return math.inf
            divergence += p / sum(true) * math.log((p / sum(true)) / (q / sum(quantized)))
    return divergence


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 50), min_size=64, max_size=64).filter(lambda c: sum(c) > 0),
    low=st.integers(-32, -1),
    high=st.integers(1, 32),
    levels=st.integers(1, 12),
)
def test_divergence_is_that_of_the_published_procedure(counts: list[int], low: int, high: int, levels: int) -> None:
    levels = min(levels, high - low)
    found = methods.divergence(np.array(counts), np.array([low]), np.array([high]), levels)[0]
    if not sum(counts[32 + low : 32 + high]):
        assert found == math.inf
    else:
        assert found == pytest.approx(slow_divergence(np.array(counts), low, high, levels), abs=1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("method", "kept"), [(methods.entropy, 12), (methods.mse, 35)])
def test_outliers_are_cut_off_and_a_bulk_is_not(method, kept: float, symmetric: bool) -> None:
    bulk = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    for values, least, most in ((np.append(bulk, np.float32(40)), 2.5, kept), (bulk, 2.5, 6)):
        histogram = Histogram()
        histogram.add(values, float(values.min()), float(values.max()))
        counts = methods.folded(histogram.counts) if symmetric else histogram.counts
        low, high = np.array(method(counts, symmetric)) * histogram.width
        assert least < high < most
        assert low == 0 if symmetric else -6 < low < -least


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
@pytest.mark.parametrize("method", [methods.entropy, methods.mse, lambda c, s: methods.percentile(c, 99.9, s)])
def test_a_constant_is_covered(method, value: float) -> None:
    histogram = Histogram()
    histogram.add(np.full(1000, value, np.float32), value, value)
    low, high = np.array(method(histogram.counts, False)) * histogram.width
    assert low <= value < high or (value < 0 and low <= value < high + histogram.width)


def test_search_tries_the_other_side_again() -> None:
    asked = []

    def cost(lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
        asked.append((len(set(lows.tolist())), len(set(highs.tolist()))))
        return (highs + lows - 10) ** 2 + 3.0 * (highs - 300) ** 2  # least at low = -290, high = 300

    low, high = methods.search(cost, -600, 600, least=2)
    assert abs(high - 300) < 25  # 78 off after the first round
    assert abs(low + 290) < 25
    assert [max(pair) > 1 for pair in asked] == [True] * 4
