"""``doctor``: the machine, what is missing, and the verdict on INT8."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.cli import doctor
from compress.cli.doctor import about_cache
from compress.evaluation.int8_probe import Probe, probe_int8
from compress.runners import RUNNERS


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
    assert {"compress", "cpu", "int8 on this cpu", "torch", "nvidia driver", "gpus", "trtexec", *runtimes} <= set(lines)
    assert all(lines.values())
    assert lines["torch"][0].isdigit()
    assert lines["runs onnxruntime"] == lines["onnxruntime"]


def test_json_holds_the_same(cli: Callable) -> None:
    code, out, _ = cli("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["runtimes"]["torch"] == {"version": found["packages"]["torch"], "missing": None}
    assert found["gpu"].keys() == {"driver", "gpus", "missing", "trtexec"}
    assert found["cores"] >= 1


def test_what_is_missing_is_told_with_its_command(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    _, out, _ = cli("doctor")
    assert "OpenVINO is not installed. Install it: pip install openvino\n" in out
    assert "NOT INSTALLED, but needed: install speech-compress again\n" in out


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
