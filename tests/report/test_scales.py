import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.report.scales import Scale, det_scale, nice_ticks, scale_for

POSITIVE = st.floats(1e-3, 1e6)


def check(scale: Scale, values: list[float]) -> None:
    assert all(-1e-9 <= scale.fraction(value) <= 1 + 1e-9 for value in values)
    places = [scale.fraction(value) for value, _ in scale.ticks]
    assert places == sorted(places)
    assert all(-1e-6 <= place <= 1 + 1e-6 for place in places)


@given(values=st.lists(POSITIVE, min_size=1), from_zero=st.booleans())
def test_all_values_and_ticks_are_on_the_axis(values: list[float], from_zero: bool) -> None:
    check(scale_for(values, from_zero), values)


def test_zero_alone_has_an_axis() -> None:
    check(scale_for([0.0, 0.0]), [0.0])
    check(scale_for([0.0], from_zero=True), [0.0])


def test_wide_ranges_are_logarithmic() -> None:
    assert scale_for([2, 60]).kind == "log"
    assert scale_for([2, 5]).kind == "linear"
    assert scale_for([0, 60]).kind == "linear"


@given(low=st.floats(-100, 100), length=st.floats(1e-3, 1e4))
def test_ticks_are_few_and_inside(low: float, length: float) -> None:
    ticks = nice_ticks(low, low + length)
    assert 2 <= len(ticks) <= 10
    assert all(low - 1e-6 * length <= tick <= low + length * (1 + 1e-6) for tick in ticks)


@given(rates=st.lists(st.floats(0.001, 0.6), min_size=1))
def test_det_axes_hold_the_operating_points(rates: list[float]) -> None:
    check(det_scale(rates), rates)


def test_det_axis_is_linear_in_normal_deviates() -> None:
    scale = det_scale([0.05])
    assert scale.low == 0.005
    # 2.5758, 1.6449 and 0.2533 standard deviations leave 0.5, 5 and 40 % in the tail
    assert scale.fraction(0.05) == pytest.approx((2.5758 - 1.6449) / (2.5758 - 0.2533), abs=1e-4)
