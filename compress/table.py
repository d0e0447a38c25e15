"""The table of a run: one row per variant and runtime, written as JSON, CSV and Markdown."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from compress.units import (
    NOT_MEASURED,
    format_bytes,
    format_count,
    format_interval,
    format_ms,
    format_percent,
    format_speedup,
)

SCHEMA = 1

# Every field of a row, in order. A figure that was not measured is None.
FIELDS = (
    "variant",
    "pass",
    "settings",
    "notes",
    "status",
    "reason",
    "command",
    "format",
    "runtime",
    "precision",
    "device",
    "threads",
    "params",
    "size_bytes",
    "macs",
    "eer",
    "eer_ci95",
    "eer_rise",
    "eer_rise_ci95",
    "min_dcf",
    "threshold",
    "decision_flips",
    "n_trials",
    "cosine_mean",
    "cosine_min",
    "latency_ms",
    "e2e_latency_ms",
    "speedup",
    "rtf",
    "qps",
    "peak_rss_bytes",
    "build_s",
    "artifact",
)

COLUMNS = (
    "variant",
    "runtime",
    "precision",
    "params",
    "size",
    "EER (95 %)",
    "flips",
    "latency p50",
    "speed-up",
    "status",
)


def row(**figures: Any) -> dict[str, Any]:
    """Make a row with every field; what is not given is None."""
    unknown = set(figures) - set(FIELDS)
    assert not unknown, f"not fields of the table: {unknown}"
    return {name: figures.get(name) for name in FIELDS}


def cells(figures: Mapping[str, Any]) -> tuple[str, ...]:
    """Format a row's printed columns."""
    interval = f" ({format_interval(figures['eer_ci95'])})" if figures["eer_ci95"] else ""
    flips, trials = figures["decision_flips"], figures["n_trials"]
    latency = figures["latency_ms"]
    return (
        figures["variant"],
        runtime(figures),
        figures["precision"] or NOT_MEASURED,
        format_count(figures["params"]),
        format_bytes(figures["size_bytes"]),
        format_percent(figures["eer"]) + interval,
        NOT_MEASURED if flips is None else f"{flips:,} of {trials:,}",
        format_ms(latency["p50"] if latency else None),
        format_speedup(figures["speedup"]),
        figures["status"],
    )


def runtime(figures: Mapping[str, Any]) -> str:
    """What ran it, and on which GPU if an engine's own machine measured it."""
    name: str = figures["runtime"] or figures["format"]
    return f"{name}, {figures['device']}" if figures["device"] and figures["format"] == "tensorrt" else name


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the printed columns as a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(cells(figures) for figures in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def reason(figures: Mapping[str, Any]) -> str:
    """Say why a step was deferred or failed."""
    return f"{figures['variant']} {figures['status']}: {figures['reason']}"


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format every field as CSV; nested ones become columns such as ``latency_ms.p50``."""
    flat = [_flatten(figures) for figures in rows]
    names = list(dict.fromkeys(name for figures in flat for name in figures))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()


def _flatten(figures: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{key}": item for key, item in value.items()})
        elif isinstance(value, list | tuple):
            flat[name] = " ".join(map(str, value)) if name != "notes" else "; ".join(value)
        else:
            flat[name] = value
    return flat
