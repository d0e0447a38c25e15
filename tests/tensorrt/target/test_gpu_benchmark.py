"""``benchmarks/gpu/run.py`` on FakeDriver and FakeTensorRT: steps, limits, and the table. Its figures mean nothing."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from compress.tensorrt import target
from compress.tensorrt.bundle import describe, references
from compress.tensorrt.forms import forms
from compress.tensorrt.target import cuda

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu" / "run.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kit(tmp_path: Path, bundle_files: dict[str, bytes], quantized_graph: onnx.ModelProto) -> Path:
    """A prepared folder of the smallest networks."""
    folder = tmp_path / "kit"
    for name in ("campplus", "fsmn_vad"):
        for file, data in bundle_files.items():
            path = folder / "bundles" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    shutil.copytree(Path(target.__file__).parent, folder / "target", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SCRIPT, folder / "run.py")
    both = forms(quantized_graph)
    inputs = [np.random.default_rng(i).standard_normal((1, n, 16), np.float32) for i, n in enumerate((10, 20, 40))]
    data, outputs = references(inputs, {"graph": both.portable})
    (folder / "case.npz").write_bytes(data)
    graphs = {}
    for kind, graph in (("portable", both.portable), ("typed", both.typed)):
        (folder / f"{kind}.onnx").write_bytes(graph.SerializeToString())
        graphs[kind] = describe(f"{kind}.onnx", "case", kind == "typed", graph, both)
    case = {
        "question": 1,
        "name": "as-it-is",
        "graphs": graphs,
        "references": "case.npz",
        "outputs": outputs["graph"],
        "input": "feats",
        "lengths": [10, 20, 40],
        "repeat": 2,
        "only_with_flags": False,
    }
    flag = {**case, "question": 2, "name": "with-flags", "repeat": 1, "only_with_flags": True}
    record = {"questions": ["one?", "two?", "graphs?"], "cases": [case, flag], "frames": 40}
    (folder / "kit.json").write_text(json.dumps(record))
    return folder


def run(kit: Path, *options: str) -> tuple[int, str, dict[str, Any]]:
    out = kit.parent / "out"
    command = [
        sys.executable,
        str(kit / "run.py"),
        "--out",
        str(out),
        "--torch-python",
        shutil.which("false") or "false",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, cwd=kit.parent)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout, json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_everything_runs_on_the_fakes(kit: Path, fake_tensorrt: Callable[..., ModuleType]) -> None:
    fake_tensorrt("8.6.0")
    code, out, found = run(kit, "--seconds", "0.02")
    steps = found["steps"]
    failed = [title for title, step in steps.items() if "error" in step]
    assert failed == ["pytorch fp16", "pytorch fp32", "onnxruntime fp32", "onnxruntime int8"], "with /bin/false"
    for network in ("campplus", "fsmn_vad"):
        for precision in ("fp16", "int8"):
            assert steps[f"{network} {precision}"]["answer"]["cosine"] > 0.999
            assert steps[f"{network} {precision} graph"]["answer"]["max_abs"] == 0
            assert len(steps[f"{network} {precision} times"]["answer"]["latency"]) == 4
    assert len(steps["case 1 as-it-is"]["answer"]["builds"]) == 2
    assert len(steps["case 2 with-flags"]["answer"]["builds"]) == 1
    assert code == 1, "PyTorch is not there, so one check is open"
    assert "holds  campplus fp16 agrees with ONNX Runtime" in out
    assert "open   TensorRT FP16 against PyTorch FP16" in out
    assert (kit.parent / "out" / "campplus-int8-build.json").is_file()


@pytest.mark.slow
def test_a_crash_is_a_row_and_not_the_end(kit: Path, fake_tensorrt: Callable[..., ModuleType]) -> None:
    fake_tensorrt("8.6.0", "crash_build")
    code, out, found = run(kit, "--seconds", "0.02")
    assert code == 1
    assert "SIGSEGV" in found["steps"]["campplus fp16"]["error"]
    assert "SIGSEGV" in found["steps"]["case 1 as-it-is"]["answer"]["builds"][0]["error"]
    assert "refused: building: the process crashed with SIGSEGV" in out


@pytest.mark.skipif(cuda.probe().missing is None, reason="there is a GPU")
def test_without_a_driver_it_says_so_and_what_is_open(kit: Path) -> None:
    code, out, found = run(kit)
    assert code == 1
    assert "No engine was built: there is no NVIDIA driver" in out
    assert "open   fsmn_vad int8 builds and agrees" in out
    assert found["steps"].keys() >= {"identify", "pytorch fp16", "onnxruntime int8"}
    assert "ended without an answer" in found["steps"]["pytorch fp16"]["error"]


def test_what_comes_too_late_is_a_row(kit: Path) -> None:
    code, out, found = run(kit, "--minutes", "0")
    assert code == 1
    assert found["steps"]["identify"]["error"] == "not tried: the time was up"
    assert "No engine was built: not tried: the time was up." in out


def test_a_step_that_takes_too_long_is_ended(script: ModuleType, tmp_path: Path) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nsleep 60\n")
    sleeper.chmod(0o755)
    assert script.in_process(str(sleeper), "identify", {}, tmp_path / "log", 0.2) == {"error": "ended after 0 s"}


def test_another_python_is_not_told_where_a_relocated_one_lies(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/kit/python")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/kit/lib")
    assert script.environment(sys.executable)["PYTHONHOME"] == "/kit/python"
    other = script.environment("/usr/bin/python3")
    assert "PYTHONHOME" not in other
    assert "LD_LIBRARY_PATH" not in other
    assert other["PYTHONPATH"] == str(SCRIPT.parent)


def test_a_folder_that_is_not_prepared_is_refused() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not a prepared folder. First: python run.py prepare KIT" in done.stderr


def answers(**changes: Any) -> dict[str, Any]:
    """Results as a run on a GPU would leave them; the figures are made up."""

    def latency(p50: float) -> dict[str, float]:
        return {"mean": p50, "p50": p50, "p99": 1.5 * p50}

    def times(p50: float) -> dict[str, Any]:
        entries = [
            {"wait": "spinning", "graph": graph, "end_to_end_ms": latency(p50 / (1 + graph))} for graph in (False, True)
        ]
        return {"latency": entries, "throughput": [{"batch": 64, "utterances_per_s": 9000.0}]}

    agreement = [{"frames": 298, "cosine": 0.9999, "not_finite": 0}]
    build = {
        "int8_layers": 2,
        "weighted_layers": 3,
        "layers": 9,
        "compute_ms": 0.1,
        "sha256": "a",
        "agreement": agreement,
    }
    steps: dict[str, Any] = {
        "identify": {"identity": {"gpu": "Some GPU", "driver": "1.2", "tensorrt": "8.6.0"}},
        "pytorch fp16": {"end_to_end_ms": latency(4.0)},
        "case 1 as-it-is": {
            "asked_for_int8": 2,
            "of": 3,
            "builds": [build, {**build, "sha256": "b", "compute_ms": 0.2}],
        },
    }
    for network in ("campplus", "fsmn_vad"):
        for precision in ("fp16", "int8"):
            engine = {
                "cosine": 0.99999,
                "int8_layers": 2 * (precision == "int8"),
                "weighted_layers": 3,
                "int8_told": True,
                "build_s": 60.0,
            }
            steps |= {
                f"{network} {precision}": engine,
                f"{network} {precision} graph": {"max_abs": 0.0, "largest": 1.0},
            }
            steps[f"{network} {precision} times"] = times(2.0)
    steps |= changes
    return {"started": "some day", "steps": {title: {"answer": answer} for title, answer in steps.items()}}


KIT = {"questions": ["one?", "graphs?"], "cases": [{"question": 1, "name": "as-it-is"}]}


def test_the_checks_are_those_of_the_figures(script: ModuleType) -> None:
    assert {good for _, good, _ in script.checks(answers())} == {True}
    worse = {
        "campplus int8": {"cosine": 0.998, "int8_layers": 0, "weighted_layers": 3, "int8_told": True, "build_s": 1.0},
        "fsmn_vad fp16": {
            "cosine": float("nan"),
            "int8_layers": 0,
            "weighted_layers": 3,
            "int8_told": True,
            "build_s": 1.0,
        },
        "campplus fp16 graph": {"max_abs": 0.5, "largest": 1.0},
        "pytorch fp16": {"end_to_end_ms": {"mean": 1.5, "p50": 1.5, "p99": 1.5}},
    }
    failed = [name for name, good, _ in script.checks(answers(**worse)) if good is False]
    assert failed == [
        "campplus fp16 with CUDA graph is the same",
        "campplus int8 agrees with ONNX Runtime",
        "campplus int8 runs in INT8",
        "fsmn_vad fp16 agrees with ONNX Runtime",
        "TensorRT FP16 against PyTorch FP16",
    ]


def test_int8_that_is_not_told_is_open(script: ModuleType) -> None:
    silent = {"cosine": 0.9999, "int8_layers": 0, "weighted_layers": 0, "int8_told": False, "build_s": 1.0}
    found = script.checks(answers(**{"campplus int8": silent}))
    assert [entry for entry in found if entry[1] is not True] == [
        ("campplus int8 runs in INT8", None, "not told: 0 of 0 layers with weights")
    ]


def test_the_table_has_figures_checks_and_answers(script: ModuleType) -> None:
    text = script.table(answers(), KIT)
    assert text.startswith("Some GPU, driver 1.2, TensorRT 8.6.0, some day\n")
    lines = {line[:28].strip(): line[28:] for line in text.splitlines()}
    assert lines["PyTorch FP16, GPU"].split() == ["4.000", "6.000", "250", "-"]
    assert lines["TensorRT FP16 + CUDA graph"].split() == ["1.000", "1.500", "1000", "9000"]
    assert "4.00 times as fast, needed 2" in text
    assert "not measured: not tried" in lines["ONNX Runtime FP32, CPU"]
    assert "INT8 2 of 3 (asked 2 of 3); 9 layers; 0.100 to 0.200 ms; cosine 0.999900; 2 different plans of 2" in text
    assert "campplus fp16    2.000 ms without, 1.000 ms with" in text


def test_what_a_build_was_refused_for_is_told(script: ModuleType) -> None:
    refused = {"asked_for_int8": 2, "of": 3, "builds": [{"error": "TensorRT does not take x.onnx:\n  node: no"}]}
    assert script.of_builds(refused) == "refused: TensorRT does not take x.onnx: node: no"
    assert script.shortened("begin " + "x" * 500 + " end", 60).endswith(" end")


def test_what_flags_would_do_is_not_asked_of_versions_without(script: ModuleType) -> None:
    found = script.case({"case": {"only_with_flags": True}, "here": {"typed": True}})
    assert script.of_builds(found) == "this TensorRT takes precision from the graph alone"
