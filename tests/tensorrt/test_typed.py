"""The typed form: valid, near, without a Cast where it would do harm."""

from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from compress.tensorrt.forms import name_nodes, portable
from compress.tensorrt.islands import islands
from compress.tensorrt.typed import typed

DEVIATION = """
    axis = Constant <value_ints = [2]> ()
    a = Conv (x, w)
    n = BatchNormalization (a, gamma, beta, mu, var)
    r = Relu (n)
    mean = ReduceMean <keepdims = 1> (r, axis)
    centred = Sub (r, mean)
    square = Mul (centred, centred)
    variance = ReduceMean <keepdims = 1> (square, axis)
    deviation = Sqrt (variance)
    both = Concat <axis = 1> (mean, deviation)
    y = Conv (both, v)
"""
SHAPES = {"w": (8, 8, 1), "v": (4, 16, 1), **dict.fromkeys(("gamma", "beta", "mu", "var"), (8,))}
QUANTIZED = """
    z = Constant <value = int8 {0}> ()
    q = QuantizeLinear (x, scale, z)
    d = DequantizeLinear (q, scale, z)
    w = DequantizeLinear <axis = 0> (stored, steps, zeros)
    a = Conv <pads = [0, 1, 0, 1]> (d, w, bias)
    y = Relu (a)
"""


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Type of every value and constant."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    known = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return known | {tensor.name: tensor.data_type for tensor in graph.initializer}


def quantized(graph_of, scale: float = 0.02, step: float = 0.01) -> onnx.ModelProto:
    """A convolution with Q/DQ over an image of one row."""
    text = "row = Constant <value_ints = [2]> ()\n i = Unsqueeze (x, row)\n" + QUANTIZED.replace("(x, sc", "(i, sc")
    rng = np.random.default_rng(1)
    constants = {
        "scale": np.float32(scale),
        "stored": rng.integers(-127, 128, (8, 8, 1, 3)).astype(np.int8),
        "steps": rng.uniform(step / 2, step, 8).astype(np.float32),
        "zeros": np.zeros(8, np.int8),
    }
    model = graph_of(text, {"bias": (8,), **dict.fromkeys(constants, (1,))}, rank=4)
    for tensor in model.graph.initializer[1:]:
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(constants[tensor.name]), tensor.name))
    return portable(model)


def test_casts_stand_at_the_ends_and_around_islands_only(graph_of, run, batches, least_cosine) -> None:
    model = portable(graph_of(DEVIATION, SHAPES))
    made = typed(model, islands(model))
    onnx.checker.check_model(made, full_check=True)
    types, casts = types_of(made), [node for node in made.graph.node if node.op_type == "Cast"]
    assert {node.input[0] for node in casts} == {"feats", "r", "mean", "deviation", "y_fp16"}
    assert {types[name] for name in ("centred", "square", "variance", "deviation", "y", "feats")} == {TensorProto.FLOAT}
    assert {types[name] for name in ("a", "n", "r", "both", "w_fp16", "v_fp16")} == {TensorProto.FLOAT16}
    assert least_cosine(model, made, batches) >= 0.99999


def test_no_weight_is_there_twice_and_nothing_is_left_over(graph_of) -> None:
    made = typed(portable(graph_of(DEVIATION, SHAPES)), ())
    read = [name for node in made.graph.node for name in node.input]
    assert sorted(tensor.name for tensor in made.graph.initializer) == sorted(
        {*read} & {t.name for t in made.graph.initializer}
    )
    assert not {"w", "v", "gamma", "var"} & {tensor.name for tensor in made.graph.initializer}


def test_batch_norms_are_folded_before_they_are_rounded(graph_of, run, batches) -> None:
    model = graph_of("y = BatchNormalization <epsilon = 1e-12> (x, gamma, beta, mu, var)", SHAPES)
    for tensor in model.graph.initializer:
        if tensor.name == "var":  # in FP16 it would be 0
            tensor.CopyFrom(numpy_helper.from_array(np.full(8, 1e-9, np.float32), "var"))
        if tensor.name == "gamma":
            tensor.CopyFrom(numpy_helper.from_array(np.full(8, 1e-4, np.float32), "gamma"))
    model = portable(model)
    made = typed(model, ())
    for found, expected in zip(run(made, batches), run(model, batches), strict=True):
        assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()


def test_an_output_that_is_read_inside_too_stays_fp32(graph_of, run, batches) -> None:
    model = graph_of("y = Conv (x, w)\n z = Relu (y)", {"w": (8, 8, 1)})
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", "A", "B"]))
    model = portable(model)
    made = typed(model, ())
    onnx.checker.check_model(made, full_check=True)
    assert [value.name for value in made.graph.output] == ["y", "z"]
    assert np.allclose(run(made, batches)[0], run(model, batches)[0], atol=0.02)


def test_quantizers_become_fp16_with_their_scales(graph_of, batches, least_cosine) -> None:
    model = quantized(graph_of)
    made = typed(model, islands(model))
    onnx.checker.check_model(made, full_check=True)
    types, kinds = types_of(made), Counter(node.op_type for node in made.graph.node)
    assert kinds["Cast"] == 2, "at the input and at the output"
    for node in made.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert types[node.input[1]] == TensorProto.FLOAT16
    assert least_cosine(model, made, batches) >= 0.999


def test_a_layer_with_a_small_scale_stays_fp32_with_its_quantizers(graph_of, batches, least_cosine) -> None:
    model = quantized(graph_of, step=1e-7)
    found = islands(model)
    made = typed(model, found)
    types = types_of(made)
    makers = {output: node for node in made.graph.node for output in node.output}
    conv = next(node for node in made.graph.node if node.op_type == "Conv")
    assert [makers[name].op_type for name in conv.input[:2]] == ["DequantizeLinear"] * 2, "no Cast between"
    assert {types[name] for name in conv.input} == {TensorProto.FLOAT}
    steps = next(tensor for tensor in made.graph.initializer if tensor.name == "steps")
    assert numpy_helper.to_array(steps).max() < 2e-7
    assert least_cosine(model, made, batches) >= 0.999


def test_layers_of_both_types_read_one_quantizer_by_two_dq(graph_of, batches, least_cosine) -> None:
    text = """
        z = Constant <value = int8 {0}> ()
        q = QuantizeLinear (x, scale, z)
        d = DequantizeLinear (q, scale, z)
        a = Conv (d, w)
        b = Conv (d, v)
        y = Add (a, b)
    """
    model = graph_of(text, {"scale": (), "w": (8, 8, 1), "v": (8, 8, 1)})
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "scale")
    scale.CopyFrom(numpy_helper.from_array(np.float32(0.0201), "scale"))
    model = portable(model)
    name_nodes(model.graph)
    second = next(node.name for node in model.graph.node if node.output[0] == "b")
    made = typed(model, [second])
    onnx.checker.check_model(made, full_check=True)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    quantizers = [
        node for node in made.graph.node if node.op_type.endswith("quantizeLinear") or node.op_type.startswith("Quant")
    ]
    scales = [constants[node.input[1]] for node in quantizers]
    assert [str(value.dtype) for value in scales] == ["float16", "float16", "float32"]
    assert len({float(value) for value in scales}) == 1, "all the same number"
    assert least_cosine(model, made, batches) >= 0.9999


@settings(max_examples=6, deadline=None)
@given(
    kinds=st.lists(
        st.sampled_from(["Relu", "Sigmoid", "Exp", "Softmax", "Conv", "Mul", "Mean"]), min_size=1, max_size=6
    )
)
def test_any_chain_is_valid_and_near(graph_of, batches, least_cosine, kinds: list[str]) -> None:
    lines, value = ["axis = Constant <value_ints = [2]> ()"], "x"
    for i, kind in enumerate(kinds):
        arguments = {"Conv": f"{value}, w", "Mul": f"{value}, x", "Mean": f"{value}, axis"}.get(kind, value)
        lines.append(f"v{i} = {'ReduceMean' if kind == 'Mean' else kind} ({arguments})")
        value = f"v{i}"
    model = portable(graph_of("\n".join([*lines, f"y = Tanh ({value})"]), {"w": (8, 8, 1)}))
    made = typed(model, islands(model, batches))
    onnx.checker.check_model(made, full_check=True)
    assert least_cosine(model, made, batches) >= 0.999


@pytest.mark.parametrize("data", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_casts_of_the_graph_go_to_the_type_of_their_place(graph_of, run, batches, data: int) -> None:
    model = portable(
        graph_of("i = Cast <to = 6> (x)\n f = Cast <to = 1> (i)\n g = Cast <to = 1> (f)\n y = Relu (g)", {})
    )
    made = typed(model, [model.graph.node[-2].name] if data == TensorProto.FLOAT else ())
    onnx.checker.check_model(made, full_check=True)
    assert types_of(made)["g"] == data
    assert np.array_equal(run(made, batches)[0], run(model, batches)[0])
