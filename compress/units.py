"""Figures as people read them: three significant digits and a unit; an unmeasured figure is a dash.

The printed table and the report share these, so a figure looks the same everywhere.
"""

from collections.abc import Sequence

NOT_MEASURED = "–"


def format_bytes(size_bytes: float | None) -> str:
    """Format a size in decimal units: 27400000 is '27.4 MB' (1 MB is 10^6 bytes)."""
    return NOT_MEASURED if size_bytes is None else _scaled(size_bytes, ("B", "kB", "MB", "GB", "TB"))


def format_count(count: float | None) -> str:
    """Format a count of parameters, MACs or trials: 6850000 is '6.85 M'; below a thousand it is exact."""
    return NOT_MEASURED if count is None else _scaled(count, ("", "k", "M", "G", "T"))


def format_percent(fraction: float | None, digits: int = 2) -> str:
    """Format a fraction as a percentage: 0.034 is '3.40 %'."""
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.{digits}f} %"


def format_interval(interval: Sequence[float] | None) -> str:
    """Format an interval of fractions in percent, without the unit: (0.029, 0.0402) is '2.90–4.02'."""
    return NOT_MEASURED if interval is None else f"{100 * interval[0]:.2f}–{100 * interval[1]:.2f}"


def format_ms(milliseconds: float | None) -> str:
    """Format a duration given in milliseconds: '0.42 ms', '31.2 ms', '1204 ms'."""
    return NOT_MEASURED if milliseconds is None else f"{three_digits(milliseconds)} ms"


def format_seconds(seconds: float | None) -> str:
    """Format a duration given in seconds: '0.42 s', '31.2 s', '12 min 5 s', '2 h 3 min'."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 99.95:
        return f"{three_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_speedup(ratio: float | None) -> str:
    """Format a ratio of latencies or sizes: 3.12 is '3.12×'."""
    return NOT_MEASURED if ratio is None else f"{three_digits(ratio)}×"


def three_digits(value: float) -> str:
    """Round to three significant digits, but never to more than two decimals or coarser than one."""
    for decimals, limit in ((2, 10), (1, 100)):
        if abs(round(value, decimals)) < limit:
            return f"{value:.{decimals}f}"
    return f"{value:.0f}"


def _scaled(value: float, units: Sequence[str]) -> str:
    if abs(value) < 1000:
        return f"{round(value)} {units[0]}".rstrip()
    for power, unit in enumerate(units[1:], start=1):
        scaled = value / 1000**power
        # 999.6 kB rounds to 1000 kB; the next unit says it as 1.00 MB
        if abs(round(scaled)) < 1000 or unit == units[-1]:
            return f"{three_digits(scaled)} {unit}"
    raise AssertionError("the last unit takes every value")
