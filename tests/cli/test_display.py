"""Progress on standard error, tables on standard output."""

import pytest

from compress import table
from compress.cli.display import Bars, print_rows


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
    print_rows([deferred, failed])
    out, err = capsys.readouterr()
    assert err == ""
    assert "prune+ptq+trt deferred: no [GPU] here.\nIn 04-trt on the target run:\n    trtexec --option=value" in out
    assert max(map(len, out.splitlines())) > 400  # a command is one line, to be copied
    assert out.endswith("\nx failed: not tried.\n")
