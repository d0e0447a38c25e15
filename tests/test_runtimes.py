"""Exported graphs give the same result in every ONNX Runtime from 1.17 to the newest, and in OpenVINO."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from compress.artifact import Artifact, FrontEnd
from compress.models import ARCHITECTURES
from compress.openvino_file import core
from compress.passes import PTQ, Context, Onnx
from compress.passes.recovery import reestimate_batch_norm
from compress.vectors import cosine

pytestmark = pytest.mark.slow

# With the libraries of its time: 1.17 was built against NumPy 1.
RELEASES = {
    "1.17.3": ("onnxruntime==1.17.3", "numpy<2"),
    "1.20.1": ("onnxruntime==1.20.1", "numpy"),
    "1.23.2": ("onnxruntime==1.23.2", "numpy"),
}
LENGTHS = ((1, 30), (1, 97), (2, 100), (1, 201), (2, 345))  # batch, frames: under, at and over a segment of CAM++
NETWORKS = {
    "campplus": {"growth_rate": 8, "bn_size": 2, "init_channels": 32},
    "ecapa_tdnn": {"channels": [32, 32, 32, 32, 48], "attention_channels": 16, "se_channels": 16},
    "eres2net": {"m_channels": 8},
    "tdnn_blstm": {"channels": 32, "hidden_size": 24, "attention_channels": 16},
}
CHILD = """
import sys
import numpy as np, onnxruntime
assert onnxruntime.__version__ == sys.argv[1], onnxruntime.__version__
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
for graph, inputs, outputs in zip(sys.argv[2::3], sys.argv[3::3], sys.argv[4::3]):
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    np.savez(outputs, **{key: session.run(None, {name: value})[0] for key, value in np.load(inputs).items()})
"""


@pytest.fixture(scope="module", params=RELEASES)
def release(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A version of ONNX Runtime and the folder where it is installed."""
    folder = tmp_path_factory.mktemp("onnxruntime")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "--target", str(folder)]
    done = subprocess.run([*pip, *RELEASES[request.param]], capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip() or "pip failed").splitlines()[-1]
        pytest.skip(f"ONNX Runtime {request.param} cannot be installed here: {why}")
    return request.param, folder


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, dict[str, np.ndarray]]]:
    """Float, INT8 and waveform graphs by name: the file, its inputs, and what the installed ONNX Runtime gives."""
    folder = tmp_path_factory.mktemp("graphs")
    rng = np.random.default_rng(0)
    artifacts: dict[str, Artifact] = {}
    for name, arguments in NETWORKS.items():
        torch.manual_seed(0)
        network = ARCHITECTURES[name].build(**arguments).eval()
        noise = [rng.standard_normal((frames, 80)).astype(np.float32) for frames in (120, 200, 301, 90) * 2]
        reestimate_batch_norm(network, noise)
        artifacts[name] = Onnx().run(Artifact.from_module(network), Context())
        context = Context(calibration=[lambda features=features: features for features in noise])
        artifacts[f"{name}-int8"] = PTQ(utterances=8).run(artifacts[name], context)
    small = Artifact.from_module(torch.nn.Sequential(torch.nn.Linear(16, 8), Mean()), FrontEnd(num_mel_bins=16))
    artifacts["waveform"] = Onnx(waveform=True).run(small, Context())
    artifacts["opset-20"] = Onnx(opset=20).run(small, Context())
    found = {}
    for name, artifact in artifacts.items():
        shapes = [artifact.front_end.input_shape(batch, frames) for batch, frames in LENGTHS]
        level = np.float32(0.1 if artifact.front_end.in_graph else 1)
        inputs = {f"input_{i}": level * rng.standard_normal(shape, np.float32) for i, shape in enumerate(shapes)}
        path, given = folder / f"{name}.onnx", folder / f"{name}.npz"
        path.write_bytes(artifact.onnx)
        np.savez(given, **inputs)  # type: ignore[arg-type]
        found[name] = path, given, run_here(artifact, inputs)
    return found


class Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def run_here(artifact: Artifact, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without any optimization, which is the arithmetic that the graph says."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(artifact.onnx, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return {key: session.run(None, {name: value})[0] for key, value in inputs.items()}


def assert_same(name: str, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Float graphs agree to rounding; in INT8 a value between two steps may fall to either side."""
    for key, value in expected.items():
        assert found[key].shape == value.shape
        if name.endswith("int8"):
            assert min(cosine(a, b) for a, b in zip(found[key], value, strict=True)) >= 0.99, (name, key)
        else:
            assert np.abs(found[key] - value).max() <= 1e-4 * np.abs(value).max(), (name, key)


def test_every_release_gives_the_same(release: tuple[str, Path], graphs, tmp_path: Path) -> None:
    version, folder = release
    files = [str(file) for name, (path, given, _) in graphs.items() for file in (path, given, tmp_path / f"{name}.npz")]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(  # -S: nothing of this installation
        [sys.executable, "-S", "-c", CHILD, version, *files],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-2000:]
    for name, (_, _, expected) in graphs.items():
        assert_same(name, dict(np.load(tmp_path / f"{name}.npz")), expected)


def test_the_installed_release_gives_the_same_when_it_optimizes(graphs) -> None:
    from compress.onnx_file import open_session

    for name, (path, given, expected) in graphs.items():
        session = open_session(path.read_bytes(), 1)
        key = session.get_inputs()[0].name
        assert_same(name, {k: session.run(None, {key: v})[0] for k, v in np.load(given).items()}, expected)


def test_openvino_gives_the_same(graphs) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    for name, (path, given, expected) in graphs.items():
        if {node.domain for node in onnx.load(path).graph.node} != {""}:
            continue  # it loads ONNX Runtime's DynamicQuantizeLSTM and computes something else: cosine 0.5
        compiled = core().compile_model(str(path), "CPU", exact)
        assert_same(name, {key: compiled(value)[0] for key, value in np.load(given).items()}, expected)


def test_the_file_format_is_one_that_the_oldest_release_reads(graphs) -> None:
    assert {onnx.load(path).ir_version for path, _, _ in graphs.values()} <= {8, 9}
