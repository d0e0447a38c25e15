"""FakeDriver and FakeTensorRT: they stand in for the GPU that is not here."""

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from compress.tensorrt.bundle import BundleSettings, bundle
from compress.tensorrt.target import cuda

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def fake_driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FakeDriver as a library; tests that need it skip where there is no C compiler."""
    if shutil.which("cc") is None:
        pytest.skip("FakeDriver needs a C compiler")
    path = tmp_path_factory.mktemp("fake_driver") / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", str(HERE / "fake_driver.c"), "-o", str(path)], check=True)
    return path


@pytest.fixture
def fake_driver(fake_driver_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """FakeDriver in place of the driver, in this process and its children."""
    monkeypatch.setattr(cuda, "LIBRARY", str(fake_driver_library))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_driver_library.parent))
    cuda.library.cache_clear()
    yield fake_driver_library
    cuda.library.cache_clear()


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No driver, also where there is one."""
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-that-is-not-there.so.1")
    cuda.library.cache_clear()
    yield
    cuda.library.cache_clear()


@pytest.fixture
def fake_tensorrt(fake_driver: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Puts FakeTensorRT of a version, with a fault if wanted, in place of tensorrt, here and in children."""
    there = sys.modules.pop("tensorrt", None)

    def make(version: str = "8.6.0", fault: str = "") -> ModuleType:
        monkeypatch.setenv("FAKE_TENSORRT_VERSION", version)
        monkeypatch.setenv("FAKE_TENSORRT_FAULT", fault)
        sys.modules.pop("tensorrt", None)
        return importlib.import_module("tensorrt")

    monkeypatch.syspath_prepend(str(HERE / "fake"))
    monkeypatch.setenv("PYTHONPATH", str(HERE / "fake"))
    yield make
    sys.modules.pop("tensorrt", None)
    if there is not None:
        sys.modules["tensorrt"] = there


@pytest.fixture(scope="session")
def quantized_graph() -> onnx.ModelProto:
    """Mean over frames, an INT8 layer 16 -> 8, ReLU, a float layer 8 -> 4; feats (batch, frames, 16) -> embedding."""
    rng = np.random.default_rng(0)
    w1 = rng.standard_normal((16, 8)).astype(np.float32)
    values = {
        "w1_q": np.round(w1 / np.abs(w1).max(0) * 127).astype(np.int8),
        "w2": rng.standard_normal((8, 4)).astype(np.float32),
        "s1": np.abs(w1).max(0).astype(np.float32) / 127,
        "z1": np.zeros(8, np.int8),
        "s0": np.float32(0.01).reshape(()),
        "z0": np.int8(0).reshape(()),
    }
    nodes = [
        helper.make_node("ReduceMean", ["feats"], ["mean"], "pool", axes=[1], keepdims=0),
        helper.make_node("QuantizeLinear", ["mean", "s0", "z0"], ["mean_q"], "q0"),
        helper.make_node("DequantizeLinear", ["mean_q", "s0", "z0"], ["mean_dq"], "dq0"),
        helper.make_node("DequantizeLinear", ["w1_q", "s1", "z1"], ["w1_dq"], "dq1", axis=1),
        helper.make_node("MatMul", ["mean_dq", "w1_dq"], ["hidden"], "first"),
        helper.make_node("Relu", ["hidden"], ["positive"], "relu"),
        helper.make_node("MatMul", ["positive", "w2"], ["embedding"], "second"),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("feats", ["batch", "frames", 16]), ("embedding", ["batch", 4]))
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="session")
def bundle_files(quantized_graph: onnx.ModelProto) -> dict[str, bytes]:
    rng = np.random.default_rng(1)
    features = [rng.standard_normal((90, 16), dtype=np.float32) for _ in range(2)]
    settings = BundleSettings(min_frames=10, opt_frames=40, max_frames=60, max_batch=2)
    return bundle(quantized_graph, features, settings, {"task": "sv"})


@pytest.fixture
def bundle_folder(bundle_files: dict[str, bytes], tmp_path: Path) -> Path:
    """A bundle of the small graph, with both precisions."""
    folder = tmp_path / "bundle"
    (folder / "target").mkdir(parents=True)
    for name, data in bundle_files.items():
        (folder / name).write_bytes(data)
    return folder
