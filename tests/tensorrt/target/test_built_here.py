"""Where there is a GPU, trt builds at once and the runner runs the engine; here on FakeDriver and FakeTensorRT."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from compress.artifact import Artifact
from compress.errors import MachineError, ModelError
from compress.passes import TRT, Context, trt
from compress.runners import OnnxRuntimeRunner, TensorRTRunner
from compress.runners import tensorrt as runner_module

Fake = Callable[..., ModuleType]


@pytest.fixture
def made(fake_tensorrt: Fake, tiny_int8: Artifact, tiny_context: Context, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """An INT8 engine of the tiny network."""
    fake_tensorrt()
    monkeypatch.setattr(trt, "missing_here", lambda: None)
    monkeypatch.setattr(trt, "OPTIONS", ("--no-measure",))
    monkeypatch.setattr(TensorRTRunner, "missing", lambda: None)
    said: list[str] = []
    context = Context(calibration=tiny_context.calibration, say=said.append)
    artifact = TRT(max_frames=400, max_batch=2, precision="int8").run(tiny_int8, context)
    assert "FakeDriver T4, driver CUDA 12.2, TensorRT 8.6.0" in said
    return artifact


def test_engine_is_built_saved_and_run(made: Artifact, tiny_int8: Artifact, noise, tmp_path: Path) -> None:
    assert made.deferred is None
    assert made.precision == "int8"
    assert made.history[-1].notes[-1] == "built here: int8 on FakeDriver T4, tensorrt 8.6.0"
    assert made.size_bytes == len(made.files["model.plan"])
    assert {"model.plan.json", "model.layers.json", "build.json", "row.json", "bundle.json"} <= set(made.files)
    made.save(tmp_path / "engine")
    loaded = Artifact.load(tmp_path / "engine")
    runner, reference = TensorRTRunner(loaded), OnnxRuntimeRunner(tiny_int8, 1)
    for features in noise(3, 16):
        found, wanted = runner.run(features[None])[0], reference.run(features[None])[0]
        assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.99
    with pytest.raises(ModelError, match=r"feats: 401 frames are outside the optimization profile \(50 to 400\)"):
        runner.run(np.zeros((1, 401, 16), np.float32))
    assert runner.run(np.zeros((2, 60, 16), np.float32)).shape == (2, 24)  # it goes on
    os.kill(runner._process.pid, 9)
    with pytest.raises(MachineError, match=r"tensorrt: the process crashed with SIGKILL"):
        runner.run(np.zeros((1, 60, 16), np.float32))
    runner.close()
    runner_module.run_once(str(tmp_path / "engine"), (1, 60, 16), 1)


def test_a_plan_that_was_exchanged_is_refused_before_it_is_loaded(made: Artifact, fake_tensorrt: Fake) -> None:
    fake_tensorrt(fault="crash_runtime")  # would end the child if it were asked
    changed = Artifact(**{**vars_of(made), "files": {**made.files, "model.plan": b"native code of somebody else"}})
    with pytest.raises(ModelError, match=r"model\.plan is damaged or was exchanged"):
        TensorRTRunner(changed)
    record = {**json.loads(made.files["model.plan.json"]), "written_by": "somebody else"}
    foreign = {**made.files, "model.plan.json": json.dumps(record).encode()}
    with pytest.raises(ModelError, match=r"was not built here"):
        TensorRTRunner(Artifact(**{**vars_of(made), "files": foreign}))
    with pytest.raises(MachineError, match=r"tensorrt: the process crashed with SIGSEGV\. The last lines of its log"):
        TensorRTRunner(made)


def vars_of(artifact: Artifact) -> dict[str, object]:
    return {name: getattr(artifact, name) for name in artifact.__dataclass_fields__}


def test_a_build_that_fails_here_is_an_error(fake_tensorrt, tiny_onnx: Artifact, monkeypatch) -> None:
    fake_tensorrt(fault="no_engine")
    monkeypatch.setattr(trt, "missing_here", lambda: None)
    with pytest.raises(MachineError, match=r"(?s)trt: .* built no engine of portable\.onnx\. TensorRT says:\n  10"):
        TRT(max_frames=400).run(tiny_onnx, Context())
