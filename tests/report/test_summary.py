from typing import Any

import pytest

from compress.report import summarize

Table = dict[str, Any]


def test_interval_wider_than_the_difference_is_said(table: Table) -> None:
    first, second = summarize(table)
    assert first == (
        "prune+ptq is 6.25× smaller and 4.00× faster than the baseline; EER rises from 3.40 % to 3.90 %, but a 95 % "
        "interval (3.20–4.60 %) is wider than this difference, so these trials do not show a change."
    )
    assert second == "prune+trt was deferred: the reason is below."


@pytest.mark.parametrize(
    ("eer", "interval", "said"),
    [
        (0.09, [0.08, 0.10], "EER rises from 3.40 % to 9.00 %, more than the 95 % intervals leave to chance."),
        (0.05, [0.0405, 0.0515], "the 95 % intervals overlap, so these trials do not show a change for certain."),
        (0.01, [0.008, 0.012], "EER falls from 3.40 % to 1.00 %, more than the 95 % intervals leave to chance."),
        (0.034, [0.028, 0.041], "EER stays at 3.40 % (95 % interval 2.80–4.10 %)."),
        (0.05, None, "EER rises from 3.40 % to 5.00 %; how certain that is was not measured."),
        (None, None, "EER of prune+ptq was not measured."),
    ],
)
def test_error_claims_no_more_than_was_measured(eer: Any, interval: Any, said: str, table: Table) -> None:
    table["rows"][1] |= {"eer": eer, "eer_ci95": interval}
    assert summarize(table)[0].endswith(said)


def test_larger_and_slower_is_said(table: Table) -> None:
    table["rows"][1] |= {"size_bytes": 55_000_000, "latency_ms": {"p50": 31.4}}
    assert summarize(table)[0].startswith("prune+ptq is 2.00× larger and just as fast as the baseline;")


def test_unmeasured_latency_is_left_out(table: Table) -> None:
    table["rows"][1]["latency_ms"] = None
    assert summarize(table)[0].startswith("prune+ptq is 6.25× smaller than the baseline;")


def test_other_device_is_said(table: Table) -> None:
    table["rows"][1]["device"] = "cuda"
    assert "than the baseline (measured on cuda; baseline on cpu);" in summarize(table)[0]


def test_deferred_and_failed_steps_are_named(table: Table) -> None:
    table["rows"] += [table["rows"][2] | {"variant": "openvino", "status": "failed"}]
    table["rows"] += [table["rows"][2] | {"variant": "trt-int8"}]
    assert summarize(table)[1:] == [
        "prune+trt and trt-int8 were deferred: the reason is below.",
        "openvino failed: the reason is below.",
    ]


def test_word_error_rate_takes_the_place_of_eer(table: Table) -> None:
    for row, wer in zip(table["rows"], (0.1, 0.2, None), strict=True):
        row |= {"eer": None, "eer_ci95": None, "wer": wer}
    assert "WER rises from 10.00 % to 20.00 %" in summarize(table)[0]
