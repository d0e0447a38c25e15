"""The table: every field or null, and its three forms."""

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress import table

# Section 6 of the specification, and what the report and the command line add to it.
SPECIFIED = (
    "variant pass settings status reason format runtime precision device threads params size_bytes macs eer eer_ci95 "
    "min_dcf threshold decision_flips n_trials cosine_mean cosine_min latency_ms e2e_latency_ms rtf qps peak_rss_bytes "
    "build_s artifact"
)


def measured(**changes: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "variant": "prune+ptq",
        "pass": "ptq",
        "settings": {"utterances": 40},
        "notes": ["calibrated on 40", "24 of 26 in INT8"],
        "status": "ok",
        "format": "onnx",
        "runtime": "onnxruntime",
        "precision": "int8",
        "device": "cpu",
        "threads": 1,
        "params": 4110000,
        "size_bytes": 4312000,
        "eer": 0.0342,
        "eer_ci95": [0.029, 0.0402],
        "decision_flips": 37,
        "n_trials": 5670,
        "latency_ms": {"mean": 9.8, "p50": 9.61, "p95": 10.4, "p99": 12.0},
        "speedup": 3.124,
        "artifact": {"folder": "03-ptq", "sha256": "ab"},
    }
    return table.row(**figures | changes)


def test_a_row_has_every_specified_field() -> None:
    assert set(SPECIFIED.split()) <= set(table.FIELDS)
    assert len(set(table.FIELDS)) == len(table.FIELDS)


@given(st.sets(st.sampled_from(table.FIELDS)))
def test_what_was_not_measured_is_null(given_fields: set[str]) -> None:
    row = table.row(**dict.fromkeys(given_fields, 1))
    assert list(row) == list(table.FIELDS)
    assert {name for name, value in row.items() if value is not None} == given_fields
    assert json.loads(json.dumps(row)) == row


def test_a_misspelt_field_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="latency"):
        table.row(latency=1)


def test_printed_columns() -> None:
    assert dict(zip(table.COLUMNS, table.cells(measured()), strict=True)) == {
        "variant": "prune+ptq",
        "runtime": "onnxruntime",
        "precision": "int8",
        "params": "4.11 M",
        "size": "4.31 MB",
        "EER (95 %)": "3.42 % (2.90–4.02)",
        "flips": "37 of 5,670",
        "latency p50": "9.61 ms",
        "speed-up": "3.12×",
        "status": "ok",
    }


def test_without_an_interval_the_rate_stands_alone() -> None:
    assert "3.42 %" in table.cells(measured(eer_ci95=None))


def test_unmeasured_figures_are_dashes() -> None:
    bare = table.row(variant="trt", format="tensorrt", status="deferred")
    assert table.cells(bare) == ("trt", "tensorrt", *["–"] * 7, "deferred")


def test_markdown_has_a_line_for_each_row() -> None:
    lines = table.to_markdown([measured(), table.row(variant="trt", format="tensorrt", status="failed")]).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith("| variant | runtime | precision |")
    assert set(lines[1]) <= set("| -")


def test_csv_has_all_fields_and_splits_nested_ones() -> None:
    rows = [measured(), table.row(variant="trt", format="tensorrt", status="deferred", notes=[])]
    first, second = csv.DictReader(io.StringIO(table.to_csv(rows)))
    nested = {"settings", "latency_ms", "artifact"}
    assert set(table.FIELDS) - nested <= set(first)
    assert first["latency_ms.p95"] == "10.4"
    assert first["settings.utterances"] == "40"
    assert first["artifact.folder"] == "03-ptq"
    assert first["eer_ci95"] == "0.029 0.0402"
    assert first["notes"] == "calibrated on 40; 24 of 26 in INT8"
    assert second["eer"] == second["latency_ms.p50"] == ""


names = st.text("abc,\"'\n;é ", max_size=10)


@given(st.lists(st.builds(measured, variant=names, notes=st.lists(names, max_size=3)), min_size=1, max_size=4))
def test_csv_reads_back_whatever_the_text(rows: list[dict[str, Any]]) -> None:
    found = list(csv.DictReader(io.StringIO(table.to_csv(rows), newline="")))
    assert [row["variant"] for row in found] == [row["variant"] for row in rows]
    assert [row["notes"] for row in found] == ["; ".join(row["notes"]) for row in rows]
