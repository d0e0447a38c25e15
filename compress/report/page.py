"""Put the report together: sections from the table, charts from the scores, into one HTML file."""

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from string import Template
from typing import Any

from compress.report.entries import baseline_of, entries_of, metric_of
from compress.report.markup import join
from compress.report.scores import TrialScores
from compress.report.sections import (
    Context,
    comparison,
    footer,
    header,
    more_figures,
    not_done,
    score_charts,
    step_cards,
    trade_offs,
)


def render_report(table: Mapping[str, Any], scores: Mapping[str, TrialScores]) -> str:
    """Render a run as one HTML file that loads nothing from anywhere.

    Args:
        table: What ``table.json`` holds; every row has every field, or null where it was not measured.
        scores: Trial scores by variant; variants that were not evaluated are absent.

    Returns:
        The page. Its main content needs no JavaScript; all text from the run is escaped.
    """
    entries = entries_of(table["rows"])
    context = Context(
        table=table,
        entries=entries,
        baseline=baseline_of(entries),
        metric=metric_of(table["rows"]),
        scores={name: scores[name] for name in dict.fromkeys(e.row["variant"] for e in entries) if name in scores},
    )
    sections = (comparison, not_done, trade_offs, score_charts, step_cards, more_figures)
    script = _file("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_file("report.html")).substitute(
        title=join(str(table["run"] or "run"), " · compress"),
        script_hash=digest,
        style=_file("report.css"),
        script=script,
        header=header(context),
        main=join(*(section(context) for section in sections), separator="\n"),
        footer=footer(context),
    )


def _file(name: str) -> str:
    return resources.files("compress.report").joinpath(name).read_text(encoding="utf-8").strip()
