"""Segment pooling, however it is written, comes out in operators that every runtime computes alike."""

import numpy as np
import onnx
import pytest

from compress.errors import ModelError
from compress.onnx_file import open_session
from compress.openvino_file import core
from compress.rewriting import optimize
from compress.rewriting.segments import (
    PoolMatrix,
    SpreadMatrix,
    context_rules,
    find_matrices,
    matrix_rules,
    pooling_rules,
)
from compress.rewriting.steps import matrices_of, outputs_of, relative_error, sweep

# As 3D-Speaker writes its context: average pooling with a short last window, repeated and cut to the frames.
POOL = (
    "p = AveragePool <kernel_shape = [50], strides = [50], ceil_mode = 1> (x)\n"
    "last = Constant <value_ints = [-1]> ()\n u = Unsqueeze (p, last)\n"
    "rest = Constant <value_ints = [1, 1, 1, 50]> ()\n e = Expand (u, rest)\n"
    "flat = Constant <value_ints = [0, 0, -1]> ()\n r = Reshape (e, flat)\n"
    "zero = Constant <value_ints = [0]> ()\n end = Shape <start = 2, end = 3> (x)\n"
    "two = Constant <value_ints = [2]> ()\n one = Constant <value_ints = [1]> ()\n"
    "s = Slice (r, zero, end, two, one)\n m = ReduceMean <keepdims = 1> (x, last)\n a = Add (m, s)\n"
)
CONTEXT = POOL + "c = Conv (a, w, b)\n g = Relu (c)\n d = Conv (g, v)\n h = Sigmoid (d)\n y = Mul (x, h)"
SHAPES = {"w": (4, 8, 1), "b": (4,), "v": (8, 4, 1)}


@pytest.fixture(scope="module")
def context(graph_of) -> onnx.ModelProto:
    return graph_of(CONTEXT, SHAPES)


def kinds_of(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_expansion_and_cut_become_one_gather(context: onnx.ModelProto, swept) -> None:
    kinds = swept(context, pooling_rules({}))
    assert kinds["Gather"] == 1
    assert not kinds.keys() & {"Expand", "Slice", "Unsqueeze"}


def test_pooling_has_no_ceil_mode_then(context: onnx.ModelProto) -> None:
    result, _ = sweep(context, pooling_rules({}))
    (pool,) = [node for node in result.graph.node if node.op_type == "AveragePool"]
    assert {a.name: a.ints or a.i for a in pool.attribute}["pads"] == [0, 49]
    assert not any(a.name in ("ceil_mode", "count_include_pad") and a.i for a in pool.attribute)


def test_what_follows_is_computed_once_per_segment(context: onnx.ModelProto, swept) -> None:
    once, _ = sweep(context, pooling_rules({}))
    swept(once, context_rules())
    moved = kinds_of(sweep(once, context_rules())[0])
    assert moved.index("Gather") > moved.index("Sigmoid")


def test_a_convolution_across_frames_is_not_moved(graph_of, swept) -> None:
    text = POOL + "y = Conv <pads = [1, 1]> (a, w)"
    once, _ = sweep(graph_of(text, {"w": (4, 8, 3)}), pooling_rules({}))
    swept(once, context_rules())
    moved = kinds_of(sweep(once, context_rules())[0])
    assert moved.index("Gather") < moved.index("Conv")


def test_a_sum_with_values_of_each_frame_is_not_moved(graph_of, swept) -> None:
    once, _ = sweep(graph_of(POOL + "y = Add (a, x)", {}), pooling_rules({}))
    kinds = kinds_of(sweep(once, context_rules())[0])
    swept(once, context_rules())
    assert len(kinds) - kinds[::-1].index("Gather") <= len(kinds) - kinds[::-1].index("Add")


def test_products_with_matrices_say_the_same(context: onnx.ModelProto, swept) -> None:
    once, _ = sweep(context, pooling_rules({}))
    kinds = swept(sweep(once, context_rules())[0], matrix_rules())
    assert kinds["MatMul"] == 2
    assert not kinds.keys() & {"AveragePool", "Gather", "ReduceMean"}


def test_matrices_are_recognised_by_what_they_compute_and_written_anew(context: onnx.ModelProto) -> None:
    for_onnxruntime = optimize(context, "onnxruntime")
    assert set(matrices_of(for_onnxruntime).values()) == {PoolMatrix(50, True), SpreadMatrix(50)}
    for_openvino = optimize(for_onnxruntime, "openvino")
    assert "MatMul" not in kinds_of(for_openvino)
    assert kinds_of(for_openvino).count("AveragePool") == 1
    assert relative_error(outputs_of(for_openvino), outputs_of(context)) <= 1e-5


def test_any_length_gives_the_same(context: onnx.ModelProto) -> None:
    shapes = tuple((batch, frames) for batch in (1, 3) for frames in (1, 2, 49, 50, 51, 99, 100, 101, 149, 333))
    expected = outputs_of(context, shapes)
    assert expected.keys() == set(shapes)
    for runtime in ("onnxruntime", "openvino"):
        assert relative_error(outputs_of(optimize(context, runtime), shapes), expected) <= 1e-5


def test_openvino_takes_fewer_frames_than_a_segment(context: onnx.ModelProto) -> None:
    pytest.importorskip("openvino")
    graph = core().read_model(optimize(context, "openvino").SerializeToString())
    compiled = core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    for frames in (3, 49, 50, 120):
        features = np.random.default_rng(frames).standard_normal((2, frames, 8)).astype(np.float32)
        (expected,) = open_session(context.SerializeToString(), 1).run(None, {"feats": features})
        assert np.abs(compiled([features])[0] - expected).max() <= 1e-5 * np.abs(expected).max()


def matrix(frames: int, length: int) -> np.ndarray:
    return (np.arange(frames)[:, None] // length == np.arange(-(-frames // length))).astype(np.float32)


def test_other_matrices_are_not_taken_for_segments() -> None:
    sizes = (30, 40, 65)
    member = [matrix(frames, 10) for frames in sizes]
    values = {
        "pool": [m / m.sum(0) for m in member],
        "with mean": [m / m.sum(0) + 1 / len(m) for m in member],
        "spread": [m.T for m in member],
        "sums": member,
        "whole window": [m / 10 for m in member],
        "noise": [np.random.default_rng(0).standard_normal(m.shape).astype(np.float32) for m in member],
        "identity": [np.eye(frames, dtype=np.float32) for frames in sizes],
    }
    assert find_matrices(values) == {
        "pool": PoolMatrix(10, False),
        "with mean": PoolMatrix(10, True),
        "spread": SpreadMatrix(10),
    }


def test_a_graph_that_runs_at_no_size_is_refused(graph_of) -> None:
    model = graph_of("y = Conv (x, w)", {"w": (8, 8, 1)})
    model.graph.initializer[0].dims[1] = 4
    model.graph.initializer[0].raw_data = b"\0" * (8 * 4 * 4)
    with pytest.raises(ModelError, match=r"(cannot load the graph|runs the graph at none)"):
        optimize(model, "onnxruntime")
