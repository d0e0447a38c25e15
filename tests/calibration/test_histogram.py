"""A histogram grows, and comes out the same whatever the order."""

import math

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compress.calibration.histogram import HALF, Histogram, thinned

value = st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-20 else 0.0)
parts_of_values = st.lists(
    st.lists(value, min_size=1, max_size=20).map(lambda part: np.array(part, np.float32)),
    min_size=1,
    max_size=6,
)


def filled(parts: list[np.ndarray]) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part, float(part.min()), float(part.max()))
    return histogram


@settings(max_examples=60, deadline=None)
@given(parts=parts_of_values, random=st.randoms())
def test_order_and_cutting_do_not_matter(parts: list[np.ndarray], random) -> None:
    together = filled([np.concatenate(parts)])
    shuffled = list(parts)
    random.shuffle(shuffled)
    for histogram in (filled(parts), filled(shuffled)):
        assert histogram.width == together.width
        assert (histogram.counts == together.counts).all()


@settings(max_examples=60, deadline=None)
@given(parts=parts_of_values)
@example(parts=[np.zeros(1, np.float32), np.full(1, 0.25, np.float32)])
def test_values_lie_in_their_bins(parts: list[np.ndarray]) -> None:
    histogram = filled(parts)
    values = np.concatenate(parts).astype(np.float64)
    expected = np.bincount(np.floor(values / histogram.width).astype(int) + HALF, minlength=2 * HALF)
    assert (histogram.counts == expected).all()
    magnitude = np.abs(values).max()
    if magnitude:
        assert HALF / 2 <= magnitude / histogram.width <= HALF  # no more than half of the bins are idle


def test_weight_counts_a_value_so_often() -> None:
    histogram = Histogram()
    histogram.add(np.array([-0.5, 0.25], np.float32), -0.5, 1.0, weight=7)
    assert histogram.counts.sum() == 14
    assert histogram.counts.max() == 7


@settings(max_examples=60, deadline=None)
@given(channels=st.integers(1, 64), frames=st.integers(1, 300), wanted=st.integers(1, 500))
def test_thinning_goes_through_all_channels_and_all_frames(channels: int, frames: int, wanted: int) -> None:
    values, step = thinned(np.arange(channels * frames).reshape(1, channels, frames), wanted)
    assert len(values) == math.ceil(channels * frames / step)
    assert len(values) <= wanted or step == 1
    for axis, indices in ((channels, values % channels), (frames, values % frames)):
        assert len(set(indices.tolist())) == min(axis, len(values))  # (frames, channels), or (channels, frames)


def test_an_array_that_is_small_enough_is_counted_whole() -> None:
    values, step = thinned(np.zeros((3, 5, 7)), 105)
    assert (len(values), step) == (105, 1)
