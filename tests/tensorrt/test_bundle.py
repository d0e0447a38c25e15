"""The files of a bundle: what they say of the graphs, and the float twin of a quantized graph."""

import io
import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from compress.artifact import Artifact
from compress.onnx_file import open_session
from compress.tensorrt.bundle import (
    BundleSettings,
    bundle,
    main_precision,
    reference_inputs,
    reference_lengths,
    weighted_layers,
    without_quantization,
)
from compress.tensorrt.forms import forms
from compress.tensorrt.target.plan import sha256


def run(model: onnx.ModelProto, features: np.ndarray) -> np.ndarray:
    session = open_session(model.SerializeToString(), 1)
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: features})[0]
    return found


def test_float_twin_has_the_weights_but_rounds_nothing(tiny_onnx: Artifact, tiny_int8: Artifact, noise) -> None:
    quantized = forms(onnx.load_from_string(tiny_int8.onnx)).portable
    twin = without_quantization(quantized)
    onnx.checker.check_model(twin, full_check=True)
    assert not [node for node in twin.graph.node if "Quantize" in node.op_type]
    assert main_precision(quantized) == "int8"
    assert main_precision(twin) == "fp16"
    assert {node.op_type for node in quantized.graph.node} > {node.op_type for node in twin.graph.node}
    features = noise(1, 16)[0][None]
    wanted, int8, found = (
        run(onnx.load_from_string(tiny_onnx.onnx), features),
        run(quantized, features),
        run(twin, features),
    )
    assert np.abs(found - wanted).max() < np.abs(int8 - wanted).max()
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()  # its weights are on a grid of 8 bits


def test_float_twin_of_stored_integers_is_what_they_mean() -> None:
    integers = np.array([[1, -2], [3, 4], [-127, 127]], np.int8)
    scales = np.array([0.5, 0.25, 0.1], np.float32)
    initializers = {"w": integers, "s": scales, "z": np.zeros(3, np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["w_dq"], "dq", axis=0),
        helper.make_node("MatMul", ["x", "w_dq"], ["y"], "product"),
    ]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", ["n", 3]), ("y", ["n", 2]))]
    tensors = [numpy_helper.from_array(value, name) for name, value in initializers.items()]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    twin = without_quantization(model)
    assert [node.op_type for node in twin.graph.node] == ["MatMul"]
    (weight,) = twin.graph.initializer
    assert np.array_equal(numpy_helper.to_array(weight), integers * scales[:, None])
    features = np.eye(3, dtype=np.float32)
    assert np.array_equal(run(twin, features), run(model, features))


def test_layers_are_counted_alike_in_both_forms(tiny_int8: Artifact) -> None:
    both = forms(onnx.load_from_string(tiny_int8.onnx))
    weighted, quantized = weighted_layers(both.portable)
    assert (weighted, quantized) == weighted_layers(both.typed)
    assert 0 < quantized <= weighted
    assert weighted_layers(without_quantization(both.portable)) == (weighted, 0)


@given(frames=st.lists(st.integers(3, 6000), min_size=3, max_size=3).map(sorted))
def test_references_lie_in_the_profile_and_reach_its_ends(frames: list[int]) -> None:
    low, opt, high = frames
    lengths = reference_lengths(BundleSettings(low, opt, high))
    assert lengths == sorted(set(lengths))
    assert {low, opt} <= set(lengths)
    assert low <= lengths[0]
    assert lengths[-1] == (high if high <= 3000 else max(opt, 3000))


def test_references_are_utterances_in_a_row() -> None:
    features = [np.full((4, 2), value, np.float32) for value in (1, 2)]
    found = reference_inputs(features, [3, 6, 10])
    assert [array.shape for array in found] == [(1, 3, 2), (1, 6, 2), (1, 10, 2)]
    assert found[2][0, :, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("precision", "files"),
    [
        ("best", ["portable.onnx", "typed.onnx", "portable-fp16.onnx", "typed-fp16.onnx"]),
        ("int8", ["portable.onnx", "typed.onnx"]),
        ("fp16", ["portable.onnx", "typed.onnx"]),
    ],
)
def test_record_tells_the_target_what_it_cannot_read(tiny_int8: Artifact, noise, precision, files: list[str]) -> None:
    settings = BundleSettings(max_frames=400, precision=precision)
    found = bundle(onnx.load_from_string(tiny_int8.onnx), noise(2, 16), settings, {"task": "sv"})
    record = json.loads(found["bundle.json"])
    assert [graph["file"] for graph in record["graphs"]] == files
    assert record["input"] == {"name": "feats", "shape": [None, None, 16]}
    assert record["about"] == {"task": "sv"}
    assert all(sha256(found[name]) == digest for name, digest in record["sha256"].items())
    arrays = np.load(io.BytesIO(found["references.npz"]))
    for graph in record["graphs"]:
        model = onnx.load_from_string(found[graph["file"]])
        names = [node.name for node in model.graph.node]
        assert graph["nodes"] == [f"{node.name} ({node.op_type})" for node in model.graph.node]
        assert set(graph["float_nodes"]) <= set(names)
        assert (graph["float_nodes"] == []) == graph["typed"]
        assert f"{graph['outputs']['embedding']}_3" in arrays
        assert bool(graph["reference"]) == (precision == "best" and graph["precision"] == "int8")
