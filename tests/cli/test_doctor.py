"""``doctor``: the machine, what is missing, and the verdict on INT8."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import machine
from compress.cli import doctor
from compress.cli.doctor import about_cache
from compress.evaluation.int8_probe import Probe, probe_int8
from compress.runners import RUNNERS
from compress.tensorrt.target import devices
from compress.tensorrt.target.cuda import Device, Driver
from compress.tensorrt.target.devices import Installed


@pytest.fixture(scope="module")
def probe() -> Probe:
    """Three rounds."""
    return probe_int8(budget_s=0)


@pytest.fixture
def short(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once for all tests."""
    monkeypatch.setattr(doctor, "probe_int8", lambda: probe)


def test_doctor_tells_of_the_machine(cli: Callable) -> None:
    code, out, _ = cli("doctor")
    assert code == 0
    lines = {line[:18].strip(): line[18:].strip() for line in out.splitlines()}
    runtimes = {f"runs {kind.runtime}" for kind in RUNNERS}
    assert {"compress", "cpu", "int8 on this cpu", "torch", "nvidia driver", "tensorrt", "trtexec", *runtimes} <= set(
        lines
    )
    assert all(lines.values())
    assert lines["torch"][0].isdigit()
    assert lines["runs onnxruntime"] == lines["onnxruntime"]


def test_json_holds_the_same(cli: Callable) -> None:
    code, out, _ = cli("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["runtimes"]["torch"] == {"version": found["packages"]["torch"], "missing": None}
    assert found["gpu"].keys() == {"driver", "cuda", "gpus", "missing", "board", "tensorrt", "advice"}
    assert found["gpu"]["advice"]
    assert found["cores"] >= 1


def test_what_is_missing_is_told_with_its_command(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    _, out, _ = cli("doctor")
    assert "OpenVINO is not installed. Install it: pip install openvino\n" in out
    assert "NOT INSTALLED, but needed: install speech-compress again\n" in out


def test_no_gpu_is_said_with_what_it_means(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "probe_cuda", lambda: Driver(None, None, (), "there is no NVIDIA driver"))
    _, out, _ = cli("doctor")
    assert "nvidia driver     there is no NVIDIA driver\n" in out
    assert "gpus              none\n" in out
    assert "No engine can be built or run here: there is no NVIDIA driver." in out
    assert "The trt pass writes a folder to copy to a machine with an NVIDIA GPU" in out


def test_a_gpu_is_told_with_what_it_can_do(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed: what the driver would say is made up."""
    t4 = Device(0, "Tesla T4", (7, 5), 15_800_000_000, integrated=False)
    monkeypatch.setattr(machine, "probe_cuda", lambda: Driver("12.2", "535.104.05", (t4,), None))
    monkeypatch.setattr(devices, "find_tensorrt", lambda: Installed("8.6.1", None, "/usr/bin/trtexec"))
    _, out, _ = cli("doctor")
    lines = {line[:18].strip(): line[18:].strip() for line in out.splitlines()}
    assert lines["nvidia driver"] == "535.104.05, runs CUDA up to 12.2"
    assert lines["gpu 0"].startswith("Tesla T4, 15.8 GB, compute capability 7.5: FP32, FP16, INT8; TensorRT 8.5 to 10;")
    assert lines["tensorrt"] == "8.6.1 for this Python"
    assert lines["trtexec"] == "/usr/bin/trtexec"
    assert lines["tensorrt engines"] == "Engines can be built here."


def test_int8_is_measured_and_judged(cli: Callable, short: None) -> None:
    code, out, err = cli("doctor", "--int8")
    assert code == 0
    assert err == "timing a small network in each precision, with one thread\n"
    assert "onnxruntime fp32" in out
    assert "1.00×" in out
    assert "on this CPU: " in out


def test_json_of_the_probe_has_figures_and_verdict(cli: Callable, short: None) -> None:
    code, out, err = cli("doctor", "--int8", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["milliseconds"].keys() == found["speedups"].keys()
    assert found["speedups"]["onnxruntime fp32"] == 1
    assert "INT8" in found["verdict"][0]
    assert found["threads"] == 1


def test_cache_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", "off")
    assert about_cache() == {"folder": None, "writable": False}
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "new"))
    assert about_cache() == {"folder": str(tmp_path / "new" / "openvino"), "writable": True}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "file"))
    assert not about_cache()["writable"]
