"""Quantized graphs of all targets stay near the float graph, whatever operators they have."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from compress.calibration import collect_ranges
from compress.errors import InputError, ModelError
from compress.openvino_file import core
from compress.quantization import (
    OPERATORS,
    SCHEMES,
    operators_run,
    plan,
    quantize,
    quantize_lstms,
    slim,
    summary,
    tensors,
)
from compress.quantization.placement import round_weight

TARGETS = pytest.mark.parametrize("target", SCHEMES)
WEIGHTED = ("Conv", "Gemm", "MatMul", "LSTM")


def int8(model: onnx.ModelProto, utterances, target: str, operators=WEIGHTED, bits: int = 8) -> onnx.ModelProto:
    scheme = SCHEMES[target]
    planned = plan(model, scheme, operators)
    ranges = collect_ranges(model, tensors(model, planned, scheme), utterances, symmetric=scheme.symmetric).ranges
    return slim(quantize_lstms(quantize(model, planned, ranges, scheme, bits), planned))


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99),
    target=st.sampled_from(list(SCHEMES)),
    gate=st.booleans(),
    concat=st.booleans(),
    lstm=st.booleans(),
    pooling=st.booleans(),
    every_operator=st.booleans(),
)
def test_random_graphs_stay_near_optimized_or_not(
    random_graph, speechlike, nearness, seed: int, target: str, every_operator: bool, **parts: bool
) -> None:
    model = random_graph(seed, **parts)
    made = int8(model, speechlike, target, OPERATORS if every_operator else WEIGHTED)
    onnx.checker.check_model(made)
    floor = 0.98 if every_operator else 0.995
    for optimized in (True, False):
        assert nearness(model, made, speechlike, optimized) >= floor


@TARGETS
def test_types_are_those_of_the_target(random_graph, speechlike, target: str) -> None:
    made = int8(random_graph(gate=True, concat=True), speechlike, target)
    constants = {tensor.name: tensor for tensor in made.graph.initializer}
    scheme = SCHEMES[target]
    quantizers = [node for node in made.graph.node if node.op_type == "QuantizeLinear"]
    assert quantizers
    for node in quantizers:
        zero_point = constants[node.input[2]]
        assert zero_point.data_type == (TensorProto.INT8 if scheme.symmetric else TensorProto.UINT8)
        assert not scheme.symmetric or not numpy_helper.to_array(zero_point).any()
    stored = {tensor.data_type for tensor in constants.values()}
    assert (TensorProto.INT32 in stored) == scheme.int_bias
    weights = [t for t in constants.values() if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
    assert len(weights) == (5 if scheme.tensor_cores else 6), "the last layer may stay in float"
    for node in made.graph.node:
        if node.op_type == "DequantizeLinear" and len(constants.get(node.input[0], TensorProto()).dims) > 1:
            axis = next(a.i for a in node.attribute if a.name == "axis")
            assert constants[node.input[1]].dims[0] == constants[node.input[0]].dims[axis], "a scale per channel"
            zeros = [numpy_helper.to_array(constants[name]) for name in node.input[2:]]
            assert len(zeros) == scheme.weight_zero_points
            assert not any(values.any() for values in zeros)


def test_onnx_runtime_runs_what_was_planned_in_int8(random_graph, speechlike) -> None:
    model = random_graph(gate=True, concat=True, lstm=True)
    made = int8(model, speechlike, "onnxruntime")
    run = {
        operator.name: operator for operator in operators_run(made.SerializeToString(), {"feats": speechlike[0][None]})
    }
    assert run["QLinearConv"].count == sum(node.op_type == "Conv" for node in model.graph.node)
    assert run["DynamicQuantizeLSTM"].count == 1
    assert not {"Conv", "FusedConv", "LSTM"} & set(run)
    assert sum(operator.share for operator in run.values()) == pytest.approx(1)
    told = summary(tuple(run.values()))
    assert "5 QLinearConv" in told
    assert "1 DynamicQuantizeLSTM" in told


def test_float_graph_runs_nothing_in_int8(random_graph, speechlike) -> None:
    run = operators_run(random_graph().SerializeToString(), {"feats": speechlike[0][None]})
    assert "nothing in INT8" in summary(run)
    assert not [operator for operator in run if operator.precision == "int8"]


@pytest.mark.parametrize("bits", [7, 8])
def test_weights_take_the_bits_they_are_given(random_graph, speechlike, bits: int) -> None:
    made = int8(random_graph(), speechlike, "onnxruntime", bits=bits)
    stored = [numpy_helper.to_array(t) for t in made.graph.initializer if t.data_type == TensorProto.INT8]
    assert max(int(np.abs(values.astype(int)).max()) for values in stored) == {7: 64, 8: 127}[bits]


def test_ranges_of_the_graph_are_those_of_calibration(random_graph) -> None:
    rng = np.random.default_rng(0)
    utterances = [rng.standard_normal((frames, 8)).astype(np.float32) for frames in (5, 50, 97)]
    utterances[2][5, 5], utterances[0][0, 0] = 9.0, -7.0
    made = int8(random_graph(), utterances, "onnxruntime")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    first = next(node for node in made.graph.node if node.op_type == "QuantizeLinear")
    scale, zero = (float(constants[name]) for name in first.input[1:])
    assert -zero * scale == pytest.approx(-7.0, abs=scale)
    assert (255 - zero) * scale == pytest.approx(9.0, abs=scale)


def test_small_scales_do_not_overflow_a_bias(random_graph, speechlike, nearness) -> None:
    model = random_graph()
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if values.ndim == 3:
            values[0] = 0  # a channel that gives its bias alone
            values[1] *= 1e-9
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    assert nearness(model, int8(model, speechlike, "onnxruntime"), speechlike) >= 0.995


def test_old_opset_is_refused(random_graph, speechlike) -> None:
    model = random_graph()
    model.opset_import[0].version = 11
    with pytest.raises(ModelError, match=r"the graph has opset 11; per-channel Q/DQ needs 13 or later\. Export again"):
        int8(model, speechlike, "onnxruntime")


def test_a_tensor_that_is_no_number_is_named(random_graph, speechlike) -> None:
    model = random_graph()
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 3)
    values = numpy_helper.to_array(weight).copy()
    values[0] = np.inf
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    with pytest.raises(InputError, match=r"Relu_2"):
        int8(model, speechlike, "onnxruntime")


@TARGETS
def test_given_graph_is_left_alone(random_graph: Callable[..., onnx.ModelProto], speechlike, target: str) -> None:
    model = random_graph(lstm=True, gate=True)
    before = model.SerializeToString(deterministic=True)
    int8(model, speechlike, target)
    assert model.SerializeToString(deterministic=True) == before


def test_openvino_runs_every_convolution_in_int8(random_graph, speechlike, nearness) -> None:
    pytest.importorskip("openvino")
    model = random_graph(gate=True, concat=True)
    made = int8(model, speechlike, "openvino")
    network = core().read_model(made.SerializeToString())
    feats = speechlike[0][None]
    network.reshape(list(feats.shape))
    compiled = core().compile_model(network, "CPU", {"INFERENCE_NUM_THREADS": 1})
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [(str(info["layerType"].astype(str)), str(info["runtimePrecision"].astype(str))) for info in infos]
    convolutions = [precision for kind, precision in kinds if kind == "Convolution"]
    assert convolutions
    assert set(convolutions) <= {"u8", "i8"}


def test_a_channel_of_zeros_gets_a_scale_that_fp16_has() -> None:
    weight = np.zeros((3, 4), np.float32)
    weight[1], weight[2] = 0.5, 1e-9
    integers, step = round_weight(weight, 0)
    assert not integers[0].any()
    assert step[0] == np.float16(step[0]) > 0
    assert (integers[1:] == 127).all(), "small channels keep their own step"
