"""Small pieces of HTML and text that the report's sections share."""

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from compress.report.entries import Entry, finite
from compress.report.markup import Markup, element, join
from compress.report.scores import TrialScores, error_rates
from compress.units import NOT_MEASURED, format_percent

Format = Callable[[float | None], str]
FACT_NAMES = {"n_utterances": "utterances", "n_speakers": "speakers", "n_trials": "trials", "trials": "trial list"}


def section(title: str, *content: Markup | None) -> Markup:
    """Put content under a heading; what is None is left out."""
    return element("section", element("h2", title), *content)


def scrolled(table: Markup, name: str) -> Markup:
    """Let a wide table scroll within its frame."""
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=name)


def absent() -> Markup:
    """Show that a figure was not measured."""
    return element("span", NOT_MEASURED, class_="absent", title="not measured")


def known(format_figure: Format, value: float | None) -> str | None:
    """Format a figure, None staying None."""
    return None if value is None else format_figure(value)


def figure(
    format_figure: Format, value: float | None, below: Markup | None = None, column: str | None = None
) -> Markup:
    """Make a table cell of a figure, by which it sorts; the column's name shows beside it on narrow screens."""
    if value is None:
        return element("td", absent(), class_="number", data_name=column)
    return element("td", format_figure(value), below, class_="number", data_sort=repr(value), data_name=column)


def words(value: object, column: str | None = None) -> Markup:
    """Make a table cell of text."""
    return element("td", str(value) if value else absent(), data_name=column)


def runtime(entry: Entry) -> str | None:
    """Name the runtime, and the device where it is not the CPU."""
    runtime, device = entry.row["runtime"], entry.row["device"]
    return f"{runtime} · {device}" if runtime and device and device != "cpu" else runtime


def status(status: str) -> Markup:
    """Show a row's status as a coloured word."""
    return element("span", status, class_=f"pill {status if status in ('ok', 'deferred', 'failed') else ''}")


def decision_flips(entry: Entry) -> tuple[str, str | None]:
    """Put the decision flips in words: '61 of 5000 trials', '1.22 %'; 'not measured', None."""
    flips, trials = finite(entry.row["decision_flips"]), finite(entry.row["n_trials"])
    if flips is None or not trials:
        return "not measured", None
    return f"{int(flips):,} of {int(trials):,}", format_percent(flips / trials)


def from_to(format_figure: Format, old: float | None, new: float | None) -> str:
    """Write how a figure changed: '27.4 MB → 4.36 MB'."""
    if new is None:
        return "not measured"
    return f"{format_figure(old)} → {format_figure(new)}" if old is not None else format_figure(new)


def rates(trials: TrialScores) -> tuple[str, str]:
    """Format FPR and FNR at the variant's own threshold."""
    fpr, fnr = error_rates(trials)
    return format_percent(fpr), format_percent(fnr)


def decimal(value: float | None, digits: int = 4) -> str:
    """Format a plain decimal figure."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def nested(field: str, key: str) -> Callable[[Mapping[str, Any]], Any]:
    """Read one figure of a row's field that holds several."""
    return lambda row: (row[field] or {}).get(key)


def setting(value: object) -> str:
    """Write a setting's value as a person would."""
    if value is None:
        return "not set"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def facts(facts: Mapping[str, Any]) -> Markup:
    """List names and values."""
    rows = [
        join(element("dt", FACT_NAMES.get(str(name)) or str(name).replace("_", " ")), element("dd", fact(value)))
        for name, value in facts.items()
    ]
    return element("dl", *rows, class_="facts")


def fact(value: object) -> str | Markup:
    """Write one value of such a list."""
    if value is None:
        return absent()
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else setting(value)


def date(created: object) -> str | None:
    """Give an ISO time as date and minute; as it is if it is something else."""
    try:
        return f"{datetime.fromisoformat(str(created)):%Y-%m-%d %H:%M %Z}".strip() if created else None
    except ValueError:
        return str(created)


def unbroken(words: str) -> str:
    """Keep figures and their units on one line."""
    return re.sub(r"(?<=\d) (?=%|[kMG]?B|m?s\b)", "\N{NO-BREAK SPACE}", words)


def breakable(name: str) -> Markup:
    """Let a long variant name break after a plus sign."""
    return join(*re.split(r"(?<=\+)", name), separator="<wbr>")
