"""Progress on standard error, tables on standard output."""

import pytest

from compress import table
from compress.cli.display import Bars, print_rows, print_table


def test_progress_passes_items_through_and_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    assert list(bars.track([3, 1, 2], "counting")) == [3, 1, 2]
    assert list(bars.track(iter("ab"), "letters")) == ["a", "b"]
    bars.say("[bold]as it is[/bold]")
    with bars.counter("decoding") as progress:
        progress(1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "counting: 3 done\nletters: all done\n[bold]as it is[/bold]\n"


def test_the_table_fits_a_file_and_reasons_follow(capsys: pytest.CaptureFixture[str]) -> None:
    deferred = table.row(
        variant="prune+ptq+trt",
        format="tensorrt",
        status="deferred",
        reason="no [GPU] here.",
        command="trtexec " + "--option=value " * 30,
        artifact={"folder": "04-trt", "sha256": "ab"},
    )
    failed = table.row(variant="x", format="onnx", status="failed", reason="not tried.")
    print_rows([deferred, failed], ["It is [smaller]."])
    out, err = capsys.readouterr()
    assert err == ""
    assert "\n\nIt is [smaller].\n\nprune+ptq+trt deferred: no [GPU] here.\n" in out
    assert "\nIn 04-trt on the target run:\n    trtexec --option=value" in out
    assert max(map(len, out.splitlines())) > 400  # a command is one line, to be copied
    assert out.endswith("\nx failed: not tried.\n")


def test_no_cell_is_cut_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    figures = table.row(
        variant="a [long] name of a run: prune+finetune+ptq",
        runtime="onnxruntime",
        precision="int8",
        status="ok",
        params=4_110_000,
        size_bytes=4_312_000,
        eer=0.0342,
        eer_ci95=(0.0291, 0.0402),
        decision_flips=1234,
        n_trials=5670,
        latency_ms={"p50": 9.61},
        speedup=2.5,
    )
    print_rows([figures])
    header, line = capsys.readouterr().out.splitlines()
    assert all(name in header for name in table.COLUMNS)
    assert all(cell in line for cell in table.cells(figures))


def test_a_table_of_any_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([])
    assert capsys.readouterr().out == ""
    rows = [
        {"group": "head.[conv1]", "width": 32, "members": ("a", "b", "c", "d", "e"), "why": None},
        {"group": "out", "width": 12345, "members": ("a",), "why": "it is an output"},
    ]
    print_table(rows)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "group          width  members             why",
        "head.[conv1]      32  a, b, c and 2 more",
        "out           12,345  a                   it is an output",
    ]
