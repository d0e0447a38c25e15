"""The run in plain sentences, each claim no stronger than its measurement."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.report.entries import Entry, Metric, baseline_of, entries_of, metric_of
from compress.units import format_bytes, format_interval, format_ms, format_percent, three_digits

SAME = 0.005  # ratios this close to 1 are called the same


def summarize(table: Mapping[str, Any]) -> list[str]:
    """Say in plain sentences what the run bought and cost: the last measured row against the baseline.

    Returns:
        At least one sentence: what the run bought and what it cost, then the steps that were deferred or failed.
    """
    entries = entries_of(table["rows"])
    metric = metric_of(table["rows"])
    result, baseline = headline(entries), baseline_of(entries)
    if baseline is None:
        return ["The run has no rows."]
    sentences = [_alone(baseline, metric) if result is None else _comparison(result, baseline, metric)]
    for status in ("deferred", "failed"):
        labels = [entry.label for entry in entries if entry.row["status"] == status]
        if labels:
            happened = "failed" if status == "failed" else "was deferred" if len(labels) == 1 else "were deferred"
            sentences.append(f"{_listed(labels)} {happened}: the reason is below.")
    return sentences


def headline(entries: Sequence[Entry]) -> Entry | None:
    """Choose the row that the summary is about: the last one carried out here that is not the baseline."""
    baseline = baseline_of(entries)
    done = [entry for entry in entries if entry.is_ok and entry is not baseline]
    return done[-1] if done else None


def difference_is_shown(entry: Entry, baseline: Entry, metric: Metric) -> bool | None:
    """Tell whether the two error rates differ by more than their intervals leave open.

    The paired interval of the difference decides where it was measured: both rates come from the same trials, so it
    is narrower than the rates' own intervals suggest.

    Returns:
        False if 0 lies in the interval of the difference; without one, if an interval is wider than the difference
        or the two overlap. None if a figure or an interval was not measured.
    """
    paired = entry.rise_interval(metric)
    if paired is not None:
        return not paired[0] <= 0 <= paired[1]
    rates = entry.error(metric), baseline.error(metric)
    ours, theirs = entry.interval(metric), baseline.interval(metric)
    if rates[0] is None or rates[1] is None or ours is None or theirs is None:
        return None
    overlap = ours[0] <= theirs[1] and theirs[0] <= ours[1]
    wider = max(ours[1] - ours[0], theirs[1] - theirs[0]) > abs(rates[0] - rates[1])
    return not (overlap or wider)


def ratio_words(old: float | None, new: float | None, words: tuple[str, str, str]) -> str | None:
    """Put a ratio in words, ('smaller', 'larger', 'as large'): '3.12× smaller'; None where one is not measured."""
    if not old or not new:
        return None
    ratio = old / new
    if abs(ratio - 1) <= SAME:
        return f"just {words[2]}"
    return f"{three_digits(ratio)}× {words[0]}" if ratio > 1 else f"{three_digits(1 / ratio)}× {words[1]}"


def size_words(entry: Entry, baseline: Entry) -> str | None:
    """Compare sizes in words."""
    return ratio_words(baseline.size_bytes, entry.size_bytes, ("smaller", "larger", "as large"))


def speed_words(entry: Entry, baseline: Entry) -> str | None:
    """Compare latencies in words."""
    return ratio_words(baseline.latency_ms, entry.latency_ms, ("faster", "slower", "as fast"))


def _alone(baseline: Entry, metric: Metric) -> str:
    if not baseline.is_ok:
        return f"Nothing was measured: {baseline.label} is {baseline.row['status']}."
    figures = {
        "size": format_bytes(baseline.size_bytes) if baseline.size_bytes is not None else None,
        "latency": format_ms(baseline.latency_ms) if baseline.latency_ms is not None else None,
        metric.name: _rate(baseline, metric),
    }
    known = ", ".join(f"{name} {figure}" for name, figure in figures.items() if figure is not None)
    return f"Only {_the(baseline)} was measured here: {known or 'it has no figures'}."


def _comparison(result: Entry, baseline: Entry, metric: Metric) -> str:
    than = f"than {_the(baseline)}"
    bought = [words for words in (size_words(result, baseline), speed_words(result, baseline)) if words is not None]
    cost = _error_words(result, baseline, metric)
    if not bought:
        return f"{result.label} against {_the(baseline)}: {cost}."
    against = f"as {_the(baseline)}" if bought[-1].startswith("just") else than
    return f"{result.label} is {' and '.join(bought)} {against}{_elsewhere(result, baseline)}; {cost}."


def _error_words(result: Entry, baseline: Entry, metric: Metric) -> str:
    new, old = result.error(metric), baseline.error(metric)
    if new is None or old is None:
        missing = [entry.label for entry, rate in ((result, new), (baseline, old)) if rate is None]
        return f"{metric.name} of {' and '.join(missing)} was not measured"
    verb = "stays at" if format_percent(new) == format_percent(old) else "rises to" if new > old else "falls to"
    change = f"{metric.name} {verb} {format_percent(new)}"
    if verb != "stays at":
        change = f"{metric.name} {verb.split()[0]} from {format_percent(old)} to {format_percent(new)}"
    shown = difference_is_shown(result, baseline, metric)
    if shown is None:
        return f"{change}; how certain that is was not measured"
    paired = result.rise_interval(metric)
    if paired is not None and verb != "stays at":
        span = f"95 % interval of the difference {100 * paired[0]:+.2f} to {100 * paired[1]:+.2f} points"
        return f"{change} ({span}{'' if shown else ', so these trials do not show a change'})"
    if shown:
        return f"{change}, more than the 95 % intervals leave to chance"
    intervals = [interval for interval in (baseline.interval(metric), result.interval(metric)) if interval is not None]
    widest = max(intervals, key=lambda interval: interval[1] - interval[0])
    if verb == "stays at":
        return f"{change} (95 % interval {format_interval(widest)} %)"
    if widest[1] - widest[0] > abs(new - old):
        return (
            f"{change}, but a 95 % interval ({format_interval(widest)} %) is wider than this difference, "
            "so these trials do not show a change"
        )
    return f"{change}, but the 95 % intervals overlap, so these trials do not show a change for certain"


def _rate(entry: Entry, metric: Metric) -> str | None:
    rate, interval = entry.error(metric), entry.interval(metric)
    if rate is None:
        return None
    return format_percent(rate) + (f" (95 % interval {format_interval(interval)} %)" if interval else "")


def _elsewhere(result: Entry, baseline: Entry) -> str:
    """Say it when the two latencies come from different devices."""
    devices = result.row["device"], baseline.row["device"]
    if None in devices or devices[0] == devices[1]:
        return ""
    return f" (measured on {devices[0]}; {baseline.label} on {devices[1]})"


def _the(baseline: Entry) -> str:
    return "the baseline" if baseline.label == "baseline" else baseline.label


def _listed(labels: Sequence[str]) -> str:
    return " and ".join([*([", ".join(labels[:-1])] if labels[1:] else []), labels[-1]])
