"""Q/DQ graphs: where it is placed, of which type, and the rewriting for TensorRT."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from compress.artifact import Artifact
from compress.errors import ModelError
from compress.onnx_file import open_session
from compress.passes import PTQ
from compress.tensorrt.forms import forms
from compress.tensorrt.qdq import for_tensorrt, inputs_of_layers_only, largest_magnitude

QUANTIZED = ["tiny_int8", "campplus_int8"]


def graph_of(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load_from_string(artifact.onnx)


def tensors_of(model: onnx.ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def nodes_of(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def makers_of(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output}


def cosines(left: onnx.ModelProto, right: onnx.ModelProto, utterances: list[np.ndarray]) -> np.ndarray:
    sessions = [open_session(model.SerializeToString(), 1) for model in (left, right)]
    found = []
    for features in utterances:
        a, b = (session.run(None, {"feats": features[None]})[0][0] for session in sessions)
        found.append(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return np.array(found)


@given(scale=st.floats(1e-6, 1e3), zero_point=st.integers(0, 255))
def test_symmetric_range_holds_the_unsigned_one(scale: float, zero_point: int) -> None:
    low, high = (0 - zero_point) * scale, (255 - zero_point) * scale
    magnitude = float(largest_magnitude(np.float32(scale), np.uint8(zero_point)))
    assert magnitude == pytest.approx(max(-low, high), rel=1e-6)


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_are_s8_per_channel_and_activations_u8(request, name: str) -> None:
    model = graph_of(request.getfixturevalue(name))
    tensors, makers = tensors_of(model), makers_of(model)
    convolutions = [node for node in nodes_of(model, "Conv") if node.input[1] in makers]
    assert len(convolutions) >= len(nodes_of(model, "Conv")) - 1, "one of one input channel stays in float"
    assert convolutions
    for node in convolutions:
        weight = makers[node.input[1]]
        assert weight.op_type == "DequantizeLinear"
        stored, scale, zero_point = (tensors[name] for name in weight.input)
        assert (stored.data_type, zero_point.data_type) == (TensorProto.INT8, TensorProto.INT8)
        assert list(scale.dims) == [stored.dims[0]], "one scale for each output channel"
        assert not numpy_helper.to_array(zero_point).any()
        activation = makers[node.input[0]]
        assert activation.op_type == "DequantizeLinear"
        assert tensors[activation.input[2]].data_type == TensorProto.UINT8
        assert list(tensors[activation.input[1]].dims) in ([], [1])


@pytest.mark.parametrize("name", QUANTIZED)
def test_products_of_two_activations_stay_in_float(request, name: str) -> None:
    model = graph_of(request.getfixturevalue(name))
    tensors, makers = tensors_of(model), makers_of(model)

    def is_constant(value: str) -> bool:
        return value in tensors or (
            value in makers and makers[value].op_type == "DequantizeLinear" and makers[value].input[0] in tensors
        )

    products = [node for node in nodes_of(model, "MatMul") if not any(map(is_constant, node.input))]
    assert products, "both networks pool by a matrix product"
    for node in products:
        # One input may share the Q/DQ of a convolution; a runtime multiplies in INT8 only where both have one.
        assert any(makers[value].op_type != "DequantizeLinear" for value in node.input if value in makers)


@pytest.mark.parametrize("name", QUANTIZED)
def test_tensorrt_graph_is_signed_symmetric_with_float_biases(request, name: str) -> None:
    model = for_tensorrt(graph_of(request.getfixturevalue(name)))
    onnx.checker.check_model(model, full_check=True)
    tensors = tensors_of(model)
    quantizers = [*nodes_of(model, "QuantizeLinear"), *nodes_of(model, "DequantizeLinear")]
    assert quantizers
    for node in quantizers:
        zero_point = tensors[node.input[2]]
        assert zero_point.data_type == TensorProto.INT8
        assert not numpy_helper.to_array(zero_point).any()
        assert (numpy_helper.to_array(tensors[node.input[1]]) > 0).all()
    assert TensorProto.INT32 not in {tensor.data_type for tensor in tensors.values()}
    for node in nodes_of(model, "DequantizeLinear"):
        assert node.input[0] not in tensors or tensors[node.input[0]].data_type == TensorProto.INT8
    used = {value for node in model.graph.node for value in node.input}
    assert set(tensors) <= used, "nothing is left over"


def test_tensorrt_graph_of_a_tiny_network_gives_the_same_embeddings(tiny_int8: Artifact, noise) -> None:
    model = graph_of(tiny_int8)
    assert cosines(model, for_tensorrt(model), noise(12, 16, seed=1)).min() >= 0.99


def test_tensorrt_graph_of_campplus_gives_the_same_embeddings(campplus_int8: Artifact, speech_features) -> None:
    model = graph_of(campplus_int8)
    assert cosines(model, for_tensorrt(model), speech_features[:6]).min() >= 0.99


@pytest.mark.parametrize("name", ["tiny_onnx", "campplus_onnx"])
def test_float_graph_comes_back_as_it_is(request, name: str) -> None:
    data = request.getfixturevalue(name).onnx
    assert for_tensorrt(onnx.load_from_string(data)) == onnx.load_from_string(data)


def test_given_graph_is_left_alone(tiny_int8: Artifact) -> None:
    model = graph_of(tiny_int8)
    for_tensorrt(model)
    assert model == graph_of(tiny_int8)


def test_rewriting_twice_changes_nothing_more(tiny_int8: Artifact) -> None:
    once = for_tensorrt(graph_of(tiny_int8))
    assert for_tensorrt(once) == once


def shared_scale_graph() -> onnx.ModelProto:
    """Two quantizers with one scale and different zero points, as other tools write them."""
    tensors = [
        numpy_helper.from_array(np.float32(0.1), "scale"),
        numpy_helper.from_array(np.uint8(100), "zero1"),
        numpy_helper.from_array(np.uint8(0), "zero2"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["feats", "scale", "zero1"], ["q1"]),
        helper.make_node("DequantizeLinear", ["q1", "scale", "zero1"], ["d1"]),
        helper.make_node("Relu", ["d1"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "scale", "zero2"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "scale", "zero2"], ["embedding"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("feats", "embedding")]
    made = helper.make_graph(nodes, "shared", values[:1], values[1:], tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_scale_that_two_zero_points_share_is_split() -> None:
    model = for_tensorrt(shared_scale_graph())
    onnx.checker.check_model(model)
    tensors = tensors_of(model)
    scales = [float(numpy_helper.to_array(tensors[node.input[1]])) for node in model.graph.node if len(node.input) == 3]
    assert scales == pytest.approx([15.5 / 127, 15.5 / 127, 25.5 / 127, 25.5 / 127])


def test_weights_that_only_a_branch_uses_are_kept() -> None:
    model = shared_scale_graph()
    value = helper.make_tensor_value_info("then", TensorProto.FLOAT, None)
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.float32(2), "factor"), numpy_helper.from_array(np.bool_(True), "condition")]
    )
    branch = helper.make_graph([helper.make_node("Mul", ["d2", "factor"], ["then"])], "branch", [], [value])
    model.graph.node[-1].output[0] = "d2"
    model.graph.node.append(
        helper.make_node("If", ["condition"], ["embedding"], then_branch=branch, else_branch=branch)
    )
    rewritten = for_tensorrt(model)
    features = np.ones((1, 4), np.float32)
    assert open_session(rewritten.SerializeToString(), 1).run(None, {"feats": features})[0] == pytest.approx(2, abs=0.3)


def test_quantizer_without_constant_scale_is_refused() -> None:
    model = shared_scale_graph()
    model.graph.initializer.pop(0)
    model.graph.input.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, []))
    with pytest.raises(ModelError, match=r"trt: the scale or zero point of .* is not a constant"):
        for_tensorrt(model)


def test_scales_made_by_constant_nodes_are_rewritten_too() -> None:
    model = shared_scale_graph()
    for tensor in model.graph.initializer:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del model.graph.initializer[:]
    rewritten = for_tensorrt(model)
    onnx.checker.check_model(rewritten)
    assert not [t for t in tensors_of(rewritten).values() if t.data_type == TensorProto.UINT8]
    features = np.linspace(-9, 9, 4, dtype=np.float32)[None]
    assert (
        np.abs(
            open_session(rewritten.SerializeToString(), 1).run(None, {"feats": features})[0] - np.maximum(features, 0)
        ).max()
        < 0.3
    )


BLOCK = """
    z = Constant <value = uint8 {128}> ()
    s = Constant <value = float {0.03}> ()
    xq = QuantizeLinear (x, s, z)
    xd = DequantizeLinear (xq, s, z)
    w1 = DequantizeLinear <axis = 0> (stored1, steps1, zeros)
    a = Conv <pads = [1, 1]> (xd, w1)
    b = Relu (a)
    bq = QuantizeLinear (b, s, z)
    bd = DequantizeLinear (bq, s, z)
    w2 = DequantizeLinear <axis = 0> (stored2, steps2, zeros)
    c = Conv <pads = [1, 1]> (bd, w2)
    cq = QuantizeLinear (c, s, z)
    cd = DequantizeLinear (cq, s, z)
    sum = Add (cd, bd)
    gate = Sigmoid (sum)
    gq = QuantizeLinear (gate, s, z)
    gd = DequantizeLinear (gq, s, z)
    w3 = DequantizeLinear <axis = 0> (depthwise, steps3, zeros)
    d = Conv <group = 8> (gd, w3)
    dq = QuantizeLinear (d, s, z)
    dd = DequantizeLinear (dq, s, z)
    w4 = DequantizeLinear <axis = 0> (last, steps4, zeros)
    y = Conv (dd, w4)
"""


@pytest.fixture(scope="module")
def graph_of_text(request):
    """The fixture ``graph_of``, whose name a function has here."""
    return request.getfixturevalue("graph_of")


@pytest.fixture(scope="module")
def block(graph_of_text) -> onnx.ModelProto:
    """A residual block as tools for x86 quantize it: Q/DQ on results, on both inputs of the addition, everywhere."""
    rng = np.random.default_rng(0)
    stored = {"stored1": (8, 8, 3), "stored2": (8, 8, 3), "depthwise": (8, 1, 1), "last": (8, 8, 1)}
    constants = {name: rng.integers(-127, 128, shape).astype(np.int8) for name, shape in stored.items()}
    constants |= {f"steps{i}": rng.uniform(0.001, 0.004, 8).astype(np.float32) for i in (1, 2, 3, 4)}
    constants["zeros"] = np.zeros(8, np.int8)
    model = graph_of_text(BLOCK, dict.fromkeys(constants, (1,)))
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(constants[tensor.name], tensor.name))
    return model


def test_quantizers_stay_at_inputs_of_layers_and_at_the_skip_alone(block, run, batches) -> None:
    model = inputs_of_layers_only(for_tensorrt(block))
    onnx.checker.check_model(model, full_check=True)
    makers = makers_of(model)

    def before(name: str) -> str:
        node = makers[name]
        while node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            node = makers[node.input[0]]
        return node.output[0]

    users = {
        (node.output[0], before(name))
        for node in model.graph.node
        for name in node.input
        if name in makers and makers[name].op_type == "DequantizeLinear" and makers[name].input[0] in makers
    }
    assert users == {("a", "x"), ("c", "b"), ("sum", "b")}
    assert makers["sum"].input[0] == "c"
    assert len(nodes_of(model, "QuantizeLinear")) == 2
    assert len(nodes_of(model, "DequantizeLinear")) == 4, "and those of two weights"
    tensors = tensors_of(model)
    for layer in ("d", "y"):
        assert tensors[makers[layer].input[1]].data_type == TensorProto.FLOAT
    for found, expected in zip(run(model, batches), run(block, batches), strict=True):
        assert found.ravel() @ expected.ravel() / np.linalg.norm(found) / np.linalg.norm(expected) >= 0.98, (
            "less is rounded"
        )


def test_weights_of_layers_left_in_float_are_the_numbers_that_were_stored(block) -> None:
    model = inputs_of_layers_only(block)
    tensors, given = tensors_of(model), {name: numpy_helper.to_array(t) for name, t in tensors_of(block).items()}
    weight = numpy_helper.to_array(tensors[makers_of(model)["y"].input[1]])
    assert np.array_equal(weight, given["last"] * given["steps4"].reshape(8, 1, 1))


def test_a_second_placement_changes_nothing(block) -> None:
    once = inputs_of_layers_only(for_tensorrt(block))
    twice = inputs_of_layers_only(once)
    assert str(twice).splitlines() == str(once).splitlines()


def test_placement_of_a_float_graph_changes_nothing(tiny_onnx: Artifact) -> None:
    model = graph_of(tiny_onnx)
    assert inputs_of_layers_only(model) is model


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_both_forms_of_the_trained_network_stay_near(
    campplus_onnx, campplus_int8, speech_context, speech_features, least_cosine, target: str
) -> None:
    made = campplus_int8
    if target == "tensorrt":
        made = PTQ(utterances=12, target="tensorrt").run(campplus_onnx, speech_context)
    inputs = [features[None] for features in speech_features[12:]]
    both = forms(graph_of(made), inputs[:4])
    for model in (both.portable, both.typed):
        assert least_cosine(graph_of(campplus_onnx), model, inputs) >= 0.999
