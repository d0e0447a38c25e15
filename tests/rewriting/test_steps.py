"""All steps together: nothing is ever changed beyond rounding, and what would be is refused."""

import math

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from compress.errors import ModelError
from compress.rewriting import RUNTIMES, optimize, rewrite, steps
from compress.rewriting.matching import at
from compress.rewriting.steps import outputs_of, relative_error

CHANNELS = 6
LAYERS = ("conv", "dilated", "wide", "strided", "norm", "relu", "gate", "concat", "context", "grouped")


class Graph:
    """A graph of random layers over x (batch, CHANNELS, frames), built node by node."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.x = self.add("Transpose", ["feats"], perm=[0, 2, 1])

    def add(self, kind: str, inputs: list[str], **attributes: object) -> str:
        """Add a node and give its output."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def weight(self, *shape: int, positive: bool = False) -> str:
        """Add a weight of noise that keeps values near 1: of a saturated sigmoid little but rounding is left."""
        fan_in = math.prod(shape[1:])
        values = self.rng.uniform(0.5, 2, shape) if positive else self.rng.standard_normal(shape) / math.sqrt(fan_in)
        return self.constant(values.astype(np.float32))

    def constant(self, values: object) -> str:
        """Add a constant."""
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def conv(self, x: str, channels: int = CHANNELS, kernel: int = 1, **attributes: object) -> str:
        """Add a convolution to CHANNELS channels."""
        weight = self.weight(CHANNELS, channels, kernel)
        return self.add("Conv", [x, weight, self.weight(CHANNELS)], kernel_shape=[kernel], **attributes)

    def norm(self, x: str) -> str:
        """Add a batch norm."""
        return self.add("BatchNormalization", [x, *(self.weight(CHANNELS, positive=i != 1) for i in range(4))])

    def layer(self, kind: str) -> None:
        """Put a layer behind what there is."""
        x = self.x
        if kind == "conv":
            self.x = self.conv(x)
        elif kind == "dilated":
            self.x = self.conv(x, kernel=3, pads=[2, 2], dilations=[2])
        elif kind == "wide":
            self.x = self.conv(x, kernel=3, auto_pad="SAME_UPPER")
        elif kind == "strided":
            self.x = self.conv(x, kernel=3, pads=[1, 1], strides=[2])
        elif kind == "grouped":
            self.x = self.conv(x, channels=2, kernel=3, pads=[1, 1], group=3)
        elif kind == "norm":
            self.x = self.norm(x)
        elif kind == "relu":
            self.x = self.add("Relu", [x])
        elif kind == "gate":
            mean = self.add("ReduceMean", [x, self.constant([-1])], keepdims=1)
            self.x = self.add("Mul", [x, self.add("Sigmoid", [self.conv(mean)])])
        elif kind == "concat":
            joined = self.add("Concat", [x, self.add("Relu", [self.norm(x)])], axis=1)
            self.x = self.conv(joined, channels=2 * CHANNELS)
        else:
            pool = self.add("AveragePool", [x], kernel_shape=[20], strides=[20], ceil_mode=1)
            column = self.add("Unsqueeze", [pool, self.constant([-1])])
            repeated = self.add("Expand", [column, self.constant([1, 1, 1, 20])])
            flat = self.add("Reshape", [repeated, self.constant([0, 0, -1])])
            end = self.add("Shape", [x], start=2, end=3)
            cut = self.add("Slice", [flat, self.constant([0]), end, self.constant([2]), self.constant([1])])
            self.x = self.add("Mul", [x, self.add("Sigmoid", [self.conv(cut)])])

    def model(self) -> onnx.ModelProto:
        """End in the mean over frames and a linear layer."""
        mean = self.add("ReduceMean", [self.x, self.constant([2])], keepdims=0)
        self.nodes.append(helper.make_node("Gemm", [mean, self.weight(3, CHANNELS)], ["embedding"], transB=1))
        ends = [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes)
            for name, axes in (("feats", ["batch", "frames", CHANNELS]), ("embedding", ["batch", 3]))
        ]
        graph = helper.make_graph(self.nodes, "random", ends[:1], ends[1:], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model)
        return model


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    layers=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=6),
    runtime=st.sampled_from(RUNTIMES),
    float_form=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_graphs_keep_their_outputs(layers: list[str], runtime: str, float_form: bool, seed: int) -> None:
    graph = Graph(seed)
    for kind in layers:
        graph.layer(kind)
    model = graph.model()
    shapes = ((1, 1), (2, 19), (1, 20), (3, 21), (1, 47), (2, 80))
    expected = outputs_of(model, shapes)
    result = optimize(model, runtime, float_form)  # type: ignore[arg-type]
    onnx.checker.check_model(result, full_check=True)
    assert expected
    assert relative_error(outputs_of(result, shapes), expected) <= 1e-5
    ceil_modes = [a.i for node in result.graph.node for a in node.attribute if a.name == "ceil_mode"]
    assert not any(ceil_modes)


def dense_graph() -> onnx.ModelProto:
    graph = Graph(0)
    for kind in ("dilated", "norm", "relu", "conv", "context", "concat"):
        graph.layer(kind)
    return graph.model()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("float_form", [False, True])
def test_a_second_time_the_pooling_alone_is_written_anew(runtime: str, float_form: bool) -> None:
    once = rewrite(dense_graph(), runtime, float_form)  # type: ignore[arg-type]
    again = rewrite(once.model, runtime, float_form)  # type: ignore[arg-type]
    assert once.nodes_after == len(once.model.graph.node)
    assert again.nodes_after <= once.nodes_after
    assert {name for name in again.applied if "pooling" not in name} == set()


def test_the_given_graph_is_not_changed() -> None:
    model = dense_graph()
    before = model.SerializeToString()
    optimize(model, "openvino", float_form=True)
    assert model.SerializeToString() == before


def test_metadata_and_ends_stay() -> None:
    model = dense_graph()
    helper.set_model_props(model, {"task": "sv"})
    result = optimize(model, "onnxruntime")
    assert {entry.key: entry.value for entry in result.metadata_props} == {"task": "sv"}
    assert list(result.graph.input) == list(model.graph.input)
    assert [value.name for value in result.graph.output] == ["embedding"]
    assert not any(node.metadata_props for node in result.graph.node)


def test_a_rule_that_errs_is_named_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_rules() -> list:
        return at(["Sigmoid"], lambda op, node: op.Tanh(node.inputs[0]))

    monkeypatch.setattr(steps, "batch_norm_rules", wrong_rules)
    with pytest.raises(ModelError, match=r"after 'batch norm into weights' the output differs by .* \(allowed 1e-05\)"):
        optimize(dense_graph(), "onnxruntime")


def test_a_fixed_batch_or_length_is_compared_at_that_size() -> None:
    model = dense_graph()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 40
    assert rewrite(model, "onnxruntime").compared == ((1, 40), (3, 40), (2, 40))
