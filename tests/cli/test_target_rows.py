"""``compare`` with rows that were measured on a target. There is no target here: the rows are made up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run_folder(tiny_run: Path, tmp_path: Path) -> Path:
    """A run whose last step is deferred, to be changed."""
    return Path(shutil.copytree(tiny_run, tmp_path / "tiny"))


@pytest.fixture
def measured(run_folder: Path) -> dict[str, Any]:
    """What build_engine.py would write for that step on a T4."""
    files = json.loads((run_folder / "02-trt" / "artifact.json").read_text())["files"]
    graph = next(about["sha256"] for name, about in files.items() if name.endswith(".onnx"))
    return {
        "schema": 1,
        "status": "ok",
        "graph_sha256": graph,
        "runtime": "tensorrt 8.6.1",
        "precision": "int8",
        "device": "Tesla T4",
        "size_bytes": 123456,
        "latency_ms": {"mean": 0.61, "p50": 0.6, "p95": 0.7, "p99": 0.8, "more": 1},
        "rtf": 0.0002,
        "qps": 1600.0,
        "build_s": 71.5,
        "sha256": "ab" * 32,
        "notes": ["spinning wait, with CUDA graph"],
        "something": "that no table has",
    }


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def rows(out: str) -> list[dict[str, Any]]:
    return list(json.loads(out))


def test_a_row_in_the_folder_of_its_step_is_taken(cli: Callable, run_folder: Path, measured: dict[str, Any]) -> None:
    before = rows(cli("compare", run_folder, "--json").out)[-1]
    write(run_folder / "02-trt" / "row.json", measured)
    code, out, _ = cli("compare", run_folder, "--json")
    assert code == 0
    after = rows(out)[-1]
    assert (before["status"], after["status"]) == ("deferred", "ok")
    assert (after["device"], after["runtime"], after["precision"]) == ("Tesla T4", "tensorrt 8.6.1", "int8")
    assert after["latency_ms"] == {"mean": 0.61, "p50": 0.6, "p95": 0.7, "p99": 0.8}
    assert (after["reason"], after["command"], after["speedup"], after["eer"]) == (None, None, None, None)
    assert after["artifact"] == {"folder": "02-trt", "sha256": "ab" * 32}
    assert after["notes"] == [*before["notes"], "spinning wait, with CUDA graph"]
    for name in ("variant", "pass", "settings", "params", "format"):
        assert after[name] == before[name]
    assert after.keys() == before.keys()


def test_the_printed_table_names_the_gpu(cli: Callable, run_folder: Path, measured: dict[str, Any]) -> None:
    write(run_folder / "02-trt" / "row.json", measured)
    code, out, _ = cli("compare", run_folder)
    assert code == 0
    (line,) = [line for line in out.splitlines() if "ptq+trt" in line]
    assert "tensorrt 8.6.1, Tesla T4" in line
    assert "0.60 ms" in line
    assert line.rstrip().endswith("ok")
    assert "Measured on the target, without a speed-up over rows of other machines: Tesla T4." in out
    assert "deferred" not in out


def test_several_targets_are_several_rows(
    cli: Callable, run_folder: Path, measured: dict[str, Any], tmp_path: Path
) -> None:
    t4 = write(run_folder / "02-trt" / "row.json", measured)
    orin = write(tmp_path / "orin" / "row.json", measured | {"device": "Orin"})
    _, out, _ = cli("compare", run_folder, orin, t4, "--json")
    assert [row["device"] for row in rows(out)][2:] == ["Tesla T4", "Orin"]


def test_nothing_is_written(cli: Callable, run_folder: Path, measured: dict[str, Any], tmp_path: Path) -> None:
    stock = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    cli("compare", run_folder, write(tmp_path / "row.json", measured))
    assert stock == {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["tiny/02-trt/row.json", "row.json"])
def test_a_row_of_another_graph_is_refused(
    cli: Callable, run_folder: Path, measured: dict[str, Any], tmp_path: Path, where: str
) -> None:
    path = write(tmp_path / where, measured | {"graph_sha256": "0123456789abcdef" * 4})
    code, out, err = cli("compare", run_folder, path)
    assert (code, out) == (2, "")
    assert "row.json was measured on another graph (SHA-256 0123456789ab...) than that of the step: " in err
    assert "02-trt. Give the run whose folder was copied to the target, or build the engine anew from this one." in err


def test_a_row_without_a_run_is_refused(cli: Callable, measured: dict[str, Any], tmp_path: Path) -> None:
    code, _, err = cli("compare", write(tmp_path / "row.json", measured))
    assert code == 2
    assert "none: no step of the runs given is deferred" in err


@pytest.mark.parametrize(
    "damage",
    [
        {"status": "failed"},
        {"device": None},
        {"latency_ms": {"p50": 1}},
        {"latency_ms": [1]},
        {"notes": "text"},
        {"qps": "many"},
        {"graph_sha256": 7},
    ],
)
def test_a_damaged_row_is_refused(
    cli: Callable, run_folder: Path, measured: dict[str, Any], damage: dict[str, Any]
) -> None:
    path = write(run_folder / "02-trt" / "row.json", measured | damage)
    code, _, err = cli("compare", run_folder)
    assert code == 2
    assert f"{path} is not a row that build_engine.py wrote, or is damaged." in err


def test_a_run_whose_step_is_gone_keeps_its_deferred_row(cli: Callable, run_folder: Path) -> None:
    shutil.rmtree(run_folder / "02-trt")
    code, out, _ = cli("compare", run_folder, "--json")
    assert code == 0
    assert rows(out)[-1]["status"] == "deferred"
