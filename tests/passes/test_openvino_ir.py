"""The IR of a graph: the same network in fewer operators and fewer bytes."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.artifact import Artifact
from compress.onnx_file import open_session
from compress.openvino_file import compile_network, read_network
from compress.passes.openvino_ir import (
    biases_as_additions,
    convert,
    join_quantizers,
    shape_constants,
    without_spaces,
)

openvino = pytest.importorskip("openvino")


def kinds(network: "openvino.Model") -> list[str]:
    """Types of the operators."""
    return [node.get_type_name() for node in network.get_ordered_ops()]


def test_joined_quantizers_compute_the_same(tiny_int8: Artifact) -> None:
    model = onnx.load_from_string(tiny_int8.onnx)
    biases_as_additions(model)
    networks = [read_network(model.SerializeToString(), b"") for _ in range(2)]
    join_quantizers(networks[1])
    shape_constants(networks[1])
    before, after = (kinds(network) for network in networks)
    assert before.count("FakeQuantize") == after.count("FakeQuantize") > 0
    assert "Subtract" in before
    assert after.count("Subtract") < before.count("Subtract")
    assert len(after) < 0.8 * len(before)
    features = np.random.default_rng(0).standard_normal((2, 50, 16)).astype(np.float32)
    expected, found = (compile_network(network, 1, "f32")({0: features})[0] for network in networks)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("zero", "kind"), [(0, np.uint8), (128, np.uint8), (7, np.uint8), (0, np.int8), (-3, np.int8)])
def test_a_joined_quantizer_has_the_grid_of_the_pair(zero: int, kind: type) -> None:
    """Where nothing can be fused, on values between, on and beyond the levels."""
    initializers = [
        numpy_helper.from_array(np.float32(0.25), "scale"),
        numpy_helper.from_array(np.array(zero, kind), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy"]
    graph = helper.make_graph(nodes, "pair", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    network = read_network(model.SerializeToString(), b"")
    join_quantizers(network)
    assert kinds(network).count("FakeQuantize") == 1
    assert not {"Convert", "Subtract", "Multiply"} & set(kinds(network))
    values = np.linspace(-80, 80, 1537, dtype=np.float32) + 0.01  # no value lies between two levels exactly
    expected = open_session(model.SerializeToString(), 1).run(None, {"x": values})[0]
    np.testing.assert_allclose(compile_network(network, 1, "f32")({0: values})[0], expected, atol=1e-4)


def test_a_file_without_spaces_is_read_as_the_same_network(tiny_int8: Artifact) -> None:
    graph, weights = convert(tiny_int8.onnx, {}, half=False)
    assert without_spaces(graph) == graph
    assert b"\n\t" not in graph
    assert kinds(read_network(graph, weights)).count("FakeQuantize") > 0


def test_biases_become_additions_and_nothing_else_changes(tiny_int8: Artifact) -> None:
    model = onnx.load_from_string(tiny_int8.onnx)
    biases_as_additions(model)
    onnx.checker.check_model(model)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert convolutions
    assert all(len(node.input) == 2 for node in convolutions)
    features = np.random.default_rng(0).standard_normal((2, 50, 16)).astype(np.float32)
    sessions = [open_session(data, 1) for data in (tiny_int8.onnx, model.SerializeToString())]
    before, after = (session.run(None, {"feats": features})[0] for session in sessions)
    assert np.abs(before - after).max() <= 0.05 * np.abs(before).max()  # INT8 rounds elsewhere


def test_files_depend_on_the_graph_alone(tiny_int8: Artifact) -> None:
    assert convert(tiny_int8.onnx, {}, half=False) == convert(tiny_int8.onnx, {}, half=False)
