import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.units import (
    NOT_MEASURED,
    format_bytes,
    format_count,
    format_interval,
    format_ms,
    format_percent,
    format_seconds,
    format_speedup,
)

FORMATS = (format_bytes, format_count, format_ms, format_percent, format_seconds, format_speedup, format_interval)


@pytest.mark.parametrize("format_figure", FORMATS)
def test_an_unmeasured_figure_is_a_dash(format_figure) -> None:
    assert format_figure(None) == NOT_MEASURED


@pytest.mark.parametrize("format_figure", FORMATS[:-1])
def test_zero_is_a_figure(format_figure) -> None:
    assert format_figure(0).startswith("0")


@given(size=st.integers(0, 10**15 - 1))
def test_bytes_and_counts_have_at_most_three_digits_and_are_right_to_them(size: int) -> None:
    powers = {"": 1, "B": 1, "k": 10**3, "kB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9}
    powers |= {"T": 10**12, "TB": 10**12}
    for text in (format_bytes(size), format_count(size)):
        number, _, unit = text.partition(" ")
        assert len(number.replace(".", "")) <= (4 if "T" in unit else 3)
        assert float(number) * powers[unit] == pytest.approx(size, rel=0.0051)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_bytes(27_400_000), "27.4 MB"),
        (format_bytes(999_600), "1.00 MB"),
        (format_bytes(512), "512 B"),
        (format_count(6_850_000), "6.85 M"),
        (format_count(428_738), "429 k"),
        (format_count(40), "40"),
        (format_percent(0.034), "3.40 %"),
        (format_percent(0.5, digits=0), "50 %"),
        (format_interval((0.029, 0.0402)), "2.90–4.02"),
        (format_ms(0.421), "0.42 ms"),
        (format_ms(9.996), "10.0 ms"),
        (format_ms(1204.4), "1204 ms"),
        (format_seconds(12.34), "12.3 s"),
        (format_seconds(725), "12 min 5 s"),
        (format_seconds(7380), "2 h 3 min"),
        (format_speedup(3.119), "3.12×"),
    ],
)
def test_examples(text: str, expected: str) -> None:
    assert text == expected
