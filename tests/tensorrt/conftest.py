"""Running graphs in ONNX Runtime, optimized and as they are written."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime
import pytest

from compress.tensorrt.typed import FP16_UNSAFE_OPTIMIZERS

Array = np.ndarray


def outputs(model: onnx.ModelProto, inputs: Sequence[Array], optimized: bool = False) -> list[Array]:
    """First output for each input (batch, frames, num_mel_bins)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED if optimized else levels.ORT_DISABLE_ALL
    is_typed = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=FP16_UNSAFE_OPTIMIZERS if is_typed else [],
    )
    return [session.run(None, {session.get_inputs()[0].name: batch})[0].astype(np.float64) for batch in inputs]


@pytest.fixture(scope="session")
def run() -> Callable[..., list[Array]]:
    """Runs a graph on several inputs."""
    return outputs


@pytest.fixture(scope="session")
def least_cosine() -> Callable[..., float]:
    """Lowest cosine between what two graphs give, optimized and not."""

    def least(reference: onnx.ModelProto, model: onnx.ModelProto, inputs: Sequence[Array]) -> float:
        expected = outputs(reference, inputs)
        found = [outputs(model, inputs, optimized) for optimized in (True, False)]
        pairs = [(a.ravel(), b.ravel()) for results in found for a, b in zip(results, expected, strict=True)]
        return min(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs)

    return least


@pytest.fixture(scope="session")
def batches() -> list[Array]:
    """Inputs (batch, frames, 8) of several sizes."""
    rng = np.random.default_rng(7)
    return [rng.standard_normal(size, dtype=np.float32) for size in ((1, 40, 8), (3, 25, 8))]
