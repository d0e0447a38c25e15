"""What stays in FP32: statistics, what is computed of lengths, and what FP16 cannot hold."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.errors import ModelError
from compress.tensorrt.forms import name_nodes
from compress.tensorrt.islands import LENGTH, STATISTIC, islands

AXIS = "axis = Constant <value_ints = [2]> ()\n"


def why(model: onnx.ModelProto, features=()) -> dict[str, str]:
    """Reasons by what a node gives, shorter than by its name."""
    name_nodes(model.graph)
    outputs = {node.name: node.output[0] for node in model.graph.node}
    return {outputs[name]: reason for name, reason in islands(model, features).items()}


def set_weight(model: onnx.ModelProto, name: str, value: float) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.full(tensor.dims, value, np.float32), name))


DEVIATION = f"""{AXIS}
    a = Conv (x, w)
    mean = ReduceMean <keepdims = 1> (a, axis)
    centred = Sub (a, mean)
    square = Mul (centred, centred)
    variance = ReduceMean <keepdims = 1> (square, axis)
    safe = Add (variance, eps)
    deviation = Sqrt (safe)
    both = Concat <axis = 1> (mean, deviation)
    y = Conv (both, v)
"""
DEVIATION_SHAPES = {"w": (8, 8, 1), "eps": (1,), "v": (4, 16, 1)}


def test_statistics_pooling_is_one_island_from_mean_to_root(graph_of) -> None:
    found = why(graph_of(DEVIATION, DEVIATION_SHAPES))
    assert found == dict.fromkeys(["mean", "centred", "square", "variance", "safe", "deviation"], STATISTIC)


def test_attention_is_one_island_from_softmax_to_sum(graph_of) -> None:
    text = f"{AXIS} s = Conv (x, w)\n a = Softmax (s)\n p = Mul (a, x)\n t = ReduceSum <keepdims = 0> (p, axis)\n"
    found = why(graph_of(text + "y = MatMul (t, m)", {"w": (8, 8, 1), "m": (8, 4)}, rank=2))
    assert found == dict.fromkeys(["a", "p", "t"], STATISTIC)


def test_normalisation_is_an_island_with_its_division(graph_of) -> None:
    text = f"{AXIS} n = ReduceL2 <keepdims = 1> (x, axis)\n c = Clip (n, low)\n y = Div (x, c)"
    assert why(graph_of(text, {"low": ()})) == dict.fromkeys(["n", "c", "y"], STATISTIC)


def test_a_gate_is_no_island_but_its_mean(graph_of) -> None:
    text = f"{AXIS} a = Conv (x, w)\n m = ReduceMean <keepdims = 1> (a, axis)\n g = Conv (m, w)\n s = Sigmoid (g)\n"
    assert why(graph_of(text + "y = Mul (a, s)", {"w": (8, 8, 1)})) == {"m": STATISTIC}


def test_what_is_computed_of_lengths_is_fp32(graph_of) -> None:
    text = "s = Shape <start = 2> (x)\n f = Cast <to = 1> (s)\n r = Div (one, f)\n y = Mul (x, r)"
    assert why(graph_of(text, {"one": (1,)})) == dict.fromkeys(["f", "r"], LENGTH)


@pytest.mark.parametrize(
    ("value", "reason"), [(1e-9, "its constant 1e-09 is 0 in FP16"), (1e5, "its constant 100000 is beyond FP16")]
)
def test_constants_that_fp16_does_not_have(graph_of, value: float, reason: str) -> None:
    model = graph_of("y = Add (x, c)", {"c": (1,)})
    set_weight(model, "c", value)
    assert why(model) == {"y": reason}


def test_small_weights_of_a_convolution_may_vanish(graph_of) -> None:
    model = graph_of("y = Conv (x, w)", {"w": (8, 8, 1)})
    set_weight(model, "w", 1e-9)
    assert why(model) == {}


def test_large_values_are_found_by_running_and_have_a_margin(graph_of, batches) -> None:
    model = graph_of(
        "a = Mul (x, c)\n b = Relu (a)\n d = Mul (b, r)\n y = Conv (d, w)", {"c": (1,), "r": (1,), "w": (8, 8, 1)}
    )
    set_weight(model, "c", 1e4)
    set_weight(model, "r", 1e-4)
    assert why(model) == {}, "constants do not tell"
    found = why(model, batches)
    assert list(found) == ["a", "b", "d"]
    peak = max(float(np.abs(batch).max()) for batch in batches) * 1e4
    assert found["a"] == f"values up to {peak:.3g}; FP16 ends at 65504, and 4 times is kept free"


def test_values_that_are_not_finite_count_as_too_large(graph_of, batches) -> None:
    found = why(graph_of("a = Log (x)\n y = Relu (a)", {}), batches)
    assert "values up to inf" in found["y"]


def test_layers_behind_a_small_scale_are_fp32_with_their_quantizers(graph_of) -> None:
    text = """
        z = Constant <value = int8 {0}> ()
        small = Constant <value = float {0.000001}> ()
        q = QuantizeLinear (x, small, z)
        d = DequantizeLinear (q, small, z)
        a = Conv (d, w)
        y = Relu (a)
    """
    assert why(graph_of(text, {"w": (8, 8, 1)})) == dict.fromkeys(["q", "a"], "a scale of 1e-06 loses digits in FP16")


def test_branches_are_refused(graph_of) -> None:
    text = "c = Constant <value = bool {1}> ()\n y = If (c) <then_branch = t () => (float[A, B, C] u) { u = Relu (x) },"
    text += "else_branch = e () => (float[A, B, C] v) { v = Identity (x) }>"
    with pytest.raises(ModelError, match=r"holds a graph; branches and loops are not supported in FP16"):
        why(graph_of(text, {}))
