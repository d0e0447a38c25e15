import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from compress.report import TrialScores, render_report

Table = dict[str, Any]
Scores = dict[str, TrialScores]

VOID = {"meta", "wbr", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects the text of a page, what it links to and its element ids, and checks that tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data.replace("\N{NO-BREAK SPACE}", " ") + " "


def test_tags_nest_and_every_variant_appears(table: Table, scores: Scores) -> None:
    page = Page(render_report(table, scores))
    names = " ".join(page.text.split()).replace("+ ", "+")
    for row in table["rows"]:
        assert row["variant"] in names
    for expected in (
        "demo",
        "27.5 MB",
        "3.90 %",
        "3.20–4.60",
        "61 of 8,000",
        "7.85 ms",
        "4.00×",
        "some CPU",
        "03-ptq/",
    ):
        assert expected in names


def test_deferred_row_shows_reason_and_command(table: Table, scores: Scores) -> None:
    page = Page(render_report(table, scores))
    assert "No NVIDIA GPU was found." in page.text
    assert "compress trt 02-onnx --out 04-trt" in page.text


def test_steps_show_notes_and_settings(table: Table, scores: Scores) -> None:
    text = " ".join(Page(render_report(table, scores)).text.split())
    assert "104 of 108 layers in INT8" in text
    assert "method entropy skip head per_channel true seed not set" in text


def test_nothing_is_loaded_from_anywhere(table: Table, scores: Scores) -> None:
    html = render_report(table, scores)
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert "default-src 'none'" in html


def test_script_runs_under_the_page_s_own_policy(table: Table, scores: Scores) -> None:
    html = render_report(table, scores)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


def test_text_from_the_run_is_escaped_everywhere(table: Table, scores: Scores) -> None:
    evil = "<script>alert('$title')</script>\"&"

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoil(inner) for key, inner in value.items()} | {evil: evil}
        if isinstance(value, list) and any(isinstance(inner, (str, dict)) for inner in value):
            return [spoil(inner) for inner in value]
        return evil if isinstance(value, str) and value not in ("ok", "deferred") else value

    spoiled = {key: spoil(value) for key, value in table.items()}
    for row, variant in zip(spoiled["rows"], ("baseline", "prune+ptq", "prune+trt"), strict=True):
        row["variant"] = variant + evil
    page = Page(render_report(spoiled, {name + evil: trials for name, trials in scores.items()}))
    assert page.tags.count("script") == 1
    assert evil in page.text


def test_unmeasured_figures_are_dashes_and_never_zero(table: Table) -> None:
    for row in table["rows"]:
        for field in set(row) - {"variant", "pass", "status", "settings", "notes"}:
            row[field] = None
    html = render_report(table, {})
    text = " ".join(Page(html).text.split())
    assert 'title="not measured">–<' in html
    assert not re.search(r"\b0(\.0+)? (%|ms|MB|B)|0\.00×", text)
    assert '<svg class="chart"' not in html


def test_run_of_one_row(table: Table, scores: Scores) -> None:
    table["rows"] = table["rows"][:1]
    text = Page(render_report(table, {"baseline": scores["baseline"]})).text
    assert "Only the baseline was measured here: size 27.5 MB, latency 31.4 ms, EER 3.40 %" in text


@pytest.mark.parametrize("trials", ["no-targets", "not-finite", "perfect", "constant"])
def test_odd_scores_still_give_a_page(trials: str, table: Table, scores: Scores) -> None:
    labels = scores["baseline"].labels
    odd = {
        "no-targets": TrialScores(np.zeros(5, bool), np.arange(5.0), 0.5),
        "not-finite": TrialScores(labels, np.full(labels.size, np.nan), 0.5),
        "perfect": TrialScores(labels, labels.astype(np.float32), 0.5),
        "constant": TrialScores(labels, np.full(labels.size, 0.3), 0.3),
    }[trials]
    page = Page(render_report(table, scores | {"prune+ptq": odd}))
    assert ("Not drawn" in page.text) == (trials in ("no-targets", "not-finite"))
    Page(render_report(table, {"baseline": odd}))


def test_failed_baseline_still_gives_a_page(table: Table) -> None:
    table["rows"] = [table["rows"][2] | {"variant": "baseline", "status": "failed", "reason": "disk full"}]
    text = Page(render_report(table, {})).text
    assert "Nothing was measured: baseline is failed." in text
    assert "disk full" in text


def test_rows_of_one_variant_are_told_apart_by_runtime(table: Table, scores: Scores) -> None:
    table["rows"].append(table["rows"][1] | {"runtime": "openvino"})
    text = Page(render_report(table, scores)).text
    assert "prune+ptq (openvino)" in text
    assert "prune+ptq (onnxruntime)" in text
