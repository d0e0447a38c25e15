"""Small random graphs of the kinds of operators that speech networks are made of."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.vectors import cosine

BINS, CHANNELS, SIZE = 8, 12, 6


class Builder:
    """Collects nodes and weights."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []

    def weight(self, *shape: int, scale: float | None = None) -> str:
        fan_in = int(np.prod(shape[1:])) or 1
        values = self.rng.standard_normal(shape) * (scale or 1 / np.sqrt(fan_in))
        return self.constant(values.astype(np.float32))

    def constant(self, values: np.ndarray) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, f"{kind}_{len(self.nodes)}", **attributes))
        return names[0]

    def conv(self, x: str, inside: int, outside: int, taps: int = 3) -> str:
        return self.node(
            "Conv",
            x,
            self.weight(outside, inside, taps),
            self.weight(outside, scale=0.1),
            pads=[taps // 2, taps // 2],
            kernel_shape=[taps],
        )

    def batch_norm(self, x: str, channels: int) -> str:
        scale = np.exp(self.rng.normal(0, 1, channels)).astype(np.float32)
        offset, mean = (self.rng.normal(0, 0.3, channels).astype(np.float32) for _ in range(2))
        parameters = [self.constant(v) for v in (scale, offset, mean, np.ones(channels, np.float32))]
        return self.node("BatchNormalization", x, *parameters)


def build(
    seed: int = 0, gate: bool = False, concat: bool = False, lstm: bool = False, pooling: bool = False, opset: int = 17
) -> onnx.ModelProto:
    """feats (batch, frames, 8) -> embedding (batch, 6)."""
    b = Builder(seed)
    channels = CHANNELS
    x = b.node("Transpose", "feats", perm=[0, 2, 1])
    x = b.node("Relu", b.conv(x, BINS, CHANNELS))
    if gate:
        mean = b.node("ReduceMean", x, axes=[-1], keepdims=1)
        x = b.node("Mul", b.conv(x, CHANNELS, CHANNELS), b.node("Sigmoid", b.conv(mean, CHANNELS, CHANNELS, 1)))
    if concat:
        x = b.node("Concat", x, b.node("Relu", b.conv(x, CHANNELS, CHANNELS)), axis=1)
        channels = 2 * CHANNELS
    if pooling:
        x = b.node("AveragePool", x, kernel_shape=[4], strides=[4], ceil_mode=1)
    x = b.node("Relu", b.batch_norm(x, channels))
    x = b.node("Relu", b.conv(x, channels, CHANNELS))
    if lstm:
        x = b.node("Transpose", x, perm=[2, 0, 1])
        weights = [b.weight(1, 4 * CHANNELS, CHANNELS, scale=0.3) for _ in range(2)] + [
            b.weight(1, 8 * CHANNELS, scale=0.1)
        ]
        x = b.node("LSTM", x, *weights, hidden_size=CHANNELS)
        x = b.node("Transpose", b.node("Squeeze", x, b.constant(np.array([1]))), perm=[1, 2, 0])
    centre = b.node("Sub", x, b.node("ReduceMean", x, axes=[-1], keepdims=1))
    variance = b.node("ReduceMean", b.node("Mul", centre, centre), axes=[-1], keepdims=0)
    deviation = b.node("Sqrt", b.node("Add", variance, b.constant(np.float32(1e-3))))
    statistics = b.node("Concat", b.node("ReduceMean", x, axes=[-1], keepdims=0), deviation, axis=1)
    b.node("Gemm", statistics, b.weight(SIZE, 2 * CHANNELS), b.weight(SIZE, scale=0.1), transB=1)
    b.nodes[-1].output[0] = "embedding"
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("feats", ["batch", "frames", BINS]), ("embedding", ["batch", SIZE]))
    ]
    graph = helper.make_graph(b.nodes, "random", ends[:1], ends[1:], b.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="session")
def random_graph() -> Callable[..., onnx.ModelProto]:
    """Makes small random networks with the operators asked for."""
    return build


@pytest.fixture(scope="session")
def speechlike() -> list[np.ndarray]:
    """Features (frames, 8) of 6 utterances of different length."""
    rng = np.random.default_rng(5)
    return [rng.standard_normal((30 + 11 * i, BINS)).astype(np.float32) for i in range(6)]


def embeddings(model: onnx.ModelProto, utterances: list[np.ndarray], optimized: bool = True) -> np.ndarray:
    """The first output for each utterance, (utterances, ...) where they are embeddings."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"feats": u[None]})[0] for u in utterances])


@pytest.fixture(scope="session")
def outputs() -> Callable[..., np.ndarray]:
    """Runs a graph in ONNX Runtime, with its optimizations or without."""
    return embeddings


@pytest.fixture(scope="session")
def nearness() -> Callable[..., float]:
    """Lowest cosine between the embeddings of two graphs."""

    def lowest(reference: onnx.ModelProto, model: onnx.ModelProto, utterances: list, optimized: bool = True) -> float:
        pairs = zip(embeddings(reference, utterances), embeddings(model, utterances, optimized), strict=True)
        return min(cosine(a, b) for a, b in pairs)

    return lowest
