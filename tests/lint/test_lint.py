"""Every planted fault is found by its rule alone, with node and remedy; graphs of this package have none."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from compress.artifact import Artifact
from compress.calibration import collect_ranges
from compress.errors import InputError
from compress.lint import DEFAULT_VERSION, Finding, Shapes, errors, lint, read_version
from compress.models import ARCHITECTURES
from compress.onnx_file import open_session
from compress.passes import PTQ, TRT, Context
from compress.passes.onnx_export import export
from compress.quantization import SCHEMES, plan, quantize, tensors
from compress.rewriting import conv1d_as_conv2d
from compress.tensorrt.forms import forms
from compress.tensorrt.qdq import float_weights

Version = tuple[int, int]
PAGE = Path(__file__).parents[2] / "docs" / "commands" / "lint.md"
PROFILE = {"feats": Shapes((1, 50, 8), (1, 300, 8), (4, 3000, 8))}
OLD = (8, 6)
STORED = "stored-integers"


def quantized_graph() -> onnx.ModelProto:
    """Conv2d, ReLU, a concatenation, the mean over frames and a Gemm, quantized as TensorRT wants it, at opset 17."""
    rng = np.random.default_rng(0)
    weights = {
        "conv.weight": rng.integers(-127, 128, (32, 8, 1, 3)).astype(np.int8),
        "conv.weight_scale": rng.uniform(0.001, 0.01, 32).astype(np.float32),
        "conv.weight_zero": np.zeros(32, np.int8),
        "conv.bias": rng.standard_normal(32).astype(np.float32),
        "gemm.weight": rng.integers(-127, 128, (16, 64)).astype(np.int8),
        "gemm.weight_scale": rng.uniform(0.001, 0.01, 16).astype(np.float32),
        "gemm.weight_zero": np.zeros(16, np.int8),
        "row": np.array([2]),
        "in_scale": np.float32(0.05),
        "in_zero": np.int8(0),
        "mid_scale": np.float32(0.02),
        "mid_zero": np.int8(0),
    }
    conv, gemm = ([f"{layer}.weight", f"{layer}.weight_scale", f"{layer}.weight_zero"] for layer in ("conv", "gemm"))
    nodes = [
        helper.make_node("Transpose", ["feats"], ["channels"], "transpose", perm=[0, 2, 1]),
        helper.make_node("QuantizeLinear", ["channels", "in_scale", "in_zero"], ["in_q"], "in_quantize"),
        helper.make_node("DequantizeLinear", ["in_q", "in_scale", "in_zero"], ["in_dq"], "in_dequantize"),
        helper.make_node("Unsqueeze", ["in_dq", "row"], ["image"], "unsqueeze"),
        helper.make_node("DequantizeLinear", conv, ["w"], "conv_dequantize", axis=0),
        helper.make_node("Conv", ["image", "w", "conv.bias"], ["sum"], "conv", pads=[0, 1, 0, 1]),
        helper.make_node("Relu", ["sum"], ["hidden"], "relu"),
        helper.make_node("Sigmoid", ["hidden"], ["gate"], "gate"),
        helper.make_node("Concat", ["hidden", "gate"], ["both"], "concat", axis=1),
        helper.make_node("ReduceMean", ["both"], ["pooled"], "pool", axes=[2, 3], keepdims=0),
        helper.make_node("QuantizeLinear", ["pooled", "mid_scale", "mid_zero"], ["mid_q"], "mid_quantize"),
        helper.make_node("DequantizeLinear", ["mid_q", "mid_scale", "mid_zero"], ["mid_dq"], "mid_dequantize"),
        helper.make_node("DequantizeLinear", gemm, ["v"], "gemm_dequantize", axis=0),
        helper.make_node("Gemm", ["mid_dq", "v"], ["embedding"], "gemm", transB=1),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("feats", ["batch", "frames", 8]), ("embedding", ["batch", 16]))
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def put(model: onnx.ModelProto, name: str, value: Any) -> None:
    """Set an initializer, or add it."""
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name == name]:
        model.graph.initializer.remove(tensor)
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))


def add(model: onnx.ModelProto, kind: str, inputs: list[str], outputs: list[str], **settings: Any) -> None:
    """Append a node named ``planted``."""
    model.graph.node.append(helper.make_node(kind, inputs, outputs, "planted", **settings))


Fault = Callable[[onnx.ModelProto], None]
CASES: list[tuple[str, str, Fault, Version]] = []  # rule, node, fault, version


def planted(rule: str, node_name: str, version: Version = DEFAULT_VERSION) -> Callable[[Fault], Fault]:
    """Register a fault."""

    def register(fault: Fault) -> Fault:
        CASES.append((rule, node_name, fault, version))
        return fault

    return register


@planted("opset", "small", OLD)
def opset_is_too_new(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 18


@planted("opset", "small")
def opset_is_far_too_new(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 25


@planted("opset", "in_quantize")
def opset_is_too_old_for_channels(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 12


@planted("opset", "mid_quantize")
def fp16_scale_at_an_old_opset(model: onnx.ModelProto) -> None:
    put(model, "mid_scale", np.float16(0.02))


@planted("external-data", "conv.bias")
def weights_are_elsewhere(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "conv.bias")
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")


@planted("input", "feats")
def rank_is_not_told(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


@planted("operator", "planted")
def qlinear_conv(model: onnx.ModelProto) -> None:
    q = ["in_scale", "in_zero"]
    weight = ["conv.weight", "conv.weight_scale", "conv.weight_zero"]
    add(model, "QLinearConv", ["in_q", *q, *weight, *q], ["unused"])


@planted("operator", "planted")
def conv_integer(model: onnx.ModelProto) -> None:
    add(model, "ConvInteger", ["in_q", "conv.weight"], ["unused"])


@planted("operator", "planted")
def lstm_of_onnx_runtime(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    add(model, "DynamicQuantizeLSTM", ["channels"], ["unused"], domain="com.microsoft")


@planted("operator", "planted")
def dynamic_ranges(model: onnx.ModelProto) -> None:
    add(model, "DynamicQuantizeLinear", ["channels"], ["unused", "unused_scale", "unused_zero"])


@planted("operator", "planted", (8, 5))
def operator_is_newer_than_the_version(model: onnx.ModelProto) -> None:
    add(model, "LayerNormalization", ["channels", "in_scale"], ["unused"])


@planted("operator", "inside")
def unknown_operator_within_a_branch(model: onnx.ModelProto) -> None:
    put(model, "condition", np.array(True))
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("a", "b")]
    branches = [
        helper.make_graph([helper.make_node("DFT", ["channels"], ["a"], "inside")], "then", [], results[:1]),
        helper.make_graph([helper.make_node("Relu", ["channels"], ["b"], "fine")], "else", [], results[1:]),
    ]
    add(model, "If", ["condition"], ["unused"], then_branch=branches[0], else_branch=branches[1])


@planted("operator", "planted", OLD)
def function_of_the_file(model: onnx.ModelProto) -> None:
    body = helper.make_node("Relu", ["x"], ["y"], "body")
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "Twice", ["x"], ["y"], [body], opsets))
    add(model, "Twice", ["channels"], ["unused"], domain="own")


@planted("restriction", "planted")
def axes_are_computed(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Shape", ["feats"], ["axes"], "shape"))
    add(model, "Unsqueeze", ["channels", "axes"], ["unused"])


@planted("restriction", "planted", OLD)
def axes_are_an_input(model: onnx.ModelProto) -> None:
    add(model, "ReduceMean", ["channels", "row"], ["unused"])


@planted("restriction", "planted")
def pooling_is_dilated(model: onnx.ModelProto) -> None:
    add(model, "AveragePool", ["channels"], ["unused"], kernel_shape=[2], dilations=[2])


@planted("restriction", "planted")
def indices_of_pooling(model: onnx.ModelProto) -> None:
    add(model, "MaxPool", ["channels"], ["unused", "unused_indices"], kernel_shape=[2])


@planted("restriction", "planted")
def statistics_of_layer_norm(model: onnx.ModelProto) -> None:
    add(model, "LayerNormalization", ["channels", "in_scale"], ["unused", "unused_mean"])


@planted("restriction", "planted")
def lstm_of_another_layout(model: onnx.ModelProto) -> None:
    add(model, "LSTM", ["feats", "in_scale", "in_scale"], ["unused"], hidden_size=4, layout=1)


@planted("restriction", "planted")
def lstm_with_coupled_gates(model: onnx.ModelProto) -> None:
    add(model, "LSTM", ["feats", "in_scale", "in_scale"], ["unused"], hidden_size=4, input_forget=1)


@planted("restriction", "planted")
def directions_differ(model: onnx.ModelProto) -> None:
    both = {"direction": "bidirectional", "activations": ["Sigmoid", "Tanh", "Tanh", "Sigmoid", "Relu", "Tanh"]}
    add(model, "LSTM", ["feats", "in_scale", "in_scale"], ["unused"], hidden_size=4, **both)


@planted("restriction", "planted")
def scatter_adds(model: onnx.ModelProto) -> None:
    add(model, "ScatterND", ["channels", "row", "channels"], ["unused"], reduction="add")


@planted("data-type", "planted_words")
def words(model: onnx.ModelProto) -> None:
    put(model, "planted_words", np.array(["a"], object))


@planted("float64", "planted")
def cast_to_float64(model: onnx.ModelProto) -> None:
    add(model, "Cast", ["channels"], ["unused"], to=TensorProto.DOUBLE)


@planted("float64", "planted_constant")
def float64_constant(model: onnx.ModelProto) -> None:
    put(model, "planted_constant", np.array([0.5]))


@planted("int64-range", "planted_constant", OLD)
def large_integers(model: onnx.ModelProto) -> None:
    put(model, "planted_constant", np.array([7, -(2**40)]))
    add(model, "Gather", ["channels", "planted_constant"], ["unused"])


@planted("fp16-range", "conv.bias")
def large_weights(model: onnx.ModelProto) -> None:
    put(model, "conv.bias", np.array([1, -7e4, np.inf, np.nan] * 8, np.float32))


@planted("unsigned-activation", "in_quantize")
def activations_are_unsigned(model: onnx.ModelProto) -> None:
    put(model, "in_zero", np.uint8(128))


@planted("unsigned-weight", "conv_dequantize")
def weights_are_unsigned(model: onnx.ModelProto) -> None:
    put(model, "conv.weight", np.full((32, 8, 1, 3), 130, np.uint8))
    put(model, "conv.weight_zero", np.full(32, 128, np.uint8))


@planted("quantized-type", "mid_quantize")
def activations_have_32_bits(model: onnx.ModelProto) -> None:
    put(model, "mid_zero", np.int32(0))


@planted("zero-point", "mid_quantize")
def activations_are_asymmetric(model: onnx.ModelProto) -> None:
    put(model, "mid_zero", np.int8(-5))


@planted("zero-point", "conv_dequantize")
def one_channel_is_asymmetric(model: onnx.ModelProto) -> None:
    put(model, "conv.weight_zero", np.array([0] * 31 + [3], np.int8))


@planted("zero-point", "conv_dequantize")
def one_zero_point_for_all_channels(model: onnx.ModelProto) -> None:
    put(model, "conv.weight_zero", np.int8(0))


@planted("zero-point-missing", "mid_quantize")
def no_zero_point(model: onnx.ModelProto) -> None:
    del node(model, "mid_quantize").input[2:]
    del node(model, "mid_dequantize").input[2:]


@planted("zero-point-missing", "conv_dequantize", OLD)
def no_zero_point_of_weights(model: onnx.ModelProto) -> None:
    del node(model, "conv_dequantize").input[2:]


@planted("scale", "in_quantize")
def scale_is_zero(model: onnx.ModelProto) -> None:
    put(model, "in_scale", np.float32(0))


@planted("scale", "conv_dequantize")
def scale_of_a_channel_is_negative(model: onnx.ModelProto) -> None:
    put(model, "conv.weight_scale", np.array([0.01] * 31 + [-0.01], np.float32))


@planted("scale", "gemm_dequantize")
def scale_of_a_channel_is_not_a_number(model: onnx.ModelProto) -> None:
    put(model, "gemm.weight_scale", np.array([0.01] * 15 + [np.nan], np.float32))


@planted("scale-fp16", "conv_dequantize")
def scale_vanishes_in_fp16(model: onnx.ModelProto) -> None:
    put(model, "conv.weight_scale", np.array([0.01] * 31 + [1e-12], np.float32))


@planted("scale-fp16", "mid_quantize")
def scale_loses_digits_in_fp16(model: onnx.ModelProto) -> None:
    put(model, "mid_scale", np.float32(1e-6))


@planted("scale-axis", "conv_dequantize")
def scales_are_those_of_input_channels(model: onnx.ModelProto) -> None:
    node(model, "conv_dequantize").attribute[0].i = 1
    put(model, "conv.weight_scale", np.full(8, 0.01, np.float32))
    put(model, "conv.weight_zero", np.zeros(8, np.int8))


@planted("scale-axis", "conv_dequantize")
def scales_are_too_few(model: onnx.ModelProto) -> None:
    put(model, "conv.weight_scale", np.full(16, 0.01, np.float32))
    put(model, "conv.weight_zero", np.zeros(16, np.int8))


@planted("scale-axis", "gemm_dequantize")
def weight_is_not_transposed(model: onnx.ModelProto) -> None:
    put(model, "gemm.weight", np.ones((16, 16), np.int8))
    node(model, "gemm").attribute[0].i = 0


@planted("scale-axis", "planted_dequantize", OLD)
def axis_is_left_to_the_reader(model: onnx.ModelProto) -> None:
    put(model, "planted_weight", np.ones((16, 16), np.int8))
    inputs = ["planted_weight", "gemm.weight_scale", "gemm.weight_zero"]
    model.graph.node.append(helper.make_node("DequantizeLinear", inputs, ["float"], "planted_dequantize"))
    add(model, "MatMul", ["embedding", "float"], ["unused"])


@planted("per-channel-activation", "mid_quantize")
def activations_have_scales_per_channel(model: onnx.ModelProto) -> None:
    put(model, "mid_scale", np.full(64, 0.02, np.float32))
    put(model, "mid_zero", np.zeros(64, np.int8))


@planted("quantized-bias", "conv")
def bias_is_quantized(model: onnx.ModelProto) -> None:
    put(model, "planted_bias", np.ones(32, np.int32))
    put(model, "planted_zero", np.zeros(32, np.int32))
    inputs = ["planted_bias", "conv.weight_scale", "planted_zero"]
    model.graph.node.append(helper.make_node("DequantizeLinear", inputs, ["planted_float"], "bias_dequantize", axis=0))
    node(model, "conv").input[2] = "planted_float"


@planted("conv1d", "planted")
def convolution_over_one_axis(model: onnx.ModelProto) -> None:
    put(model, "planted_weight", np.ones((32, 8, 3), np.int8))
    inputs = ["planted_weight", "conv.weight_scale", "conv.weight_zero"]
    model.graph.node.append(helper.make_node("DequantizeLinear", inputs, ["float"], "dequantize", axis=0))
    add(model, "Conv", ["in_dq", "float"], ["unused"])


@planted("parted-weight", "conv")
def operator_between_weight_and_layer(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["w"], ["planted_weight"], "planted"))
    node(model, "conv").input[1] = "planted_weight"


@planted("fp32-only", "small", (11, 0))
def nothing_is_fp16(model: onnx.ModelProto) -> None:
    pass


@planted("quantized-recurrent", "planted")
def lstm_is_quantized(model: onnx.ModelProto) -> None:
    add(model, "LSTM", ["in_dq", "in_scale", "in_scale"], ["unused"], hidden_size=4)


@planted("q-before-relu", "planted_quantize")
def quantized_before_relu(model: onnx.ModelProto) -> None:
    for kind, inputs, output in (("QuantizeLinear", "sum", "sum_q"), ("DequantizeLinear", "sum_q", "sum_dq")):
        name = f"planted_{kind.removesuffix('Linear').lower()}"
        model.graph.node.append(helper.make_node(kind, [inputs, "mid_scale", "mid_zero"], [output], name))
    node(model, "relu").input[0] = "sum_dq"


@planted("concat-scales", "planted")
def concat_of_different_scales(model: onnx.ModelProto) -> None:
    add(model, "Concat", ["in_dq", "mid_dq"], ["unused"], axis=1)


@planted(STORED, "conv_dequantize", OLD)
def weights_are_stored_as_integers(model: onnx.ModelProto) -> None:
    pass


def findings_but_of_stored_integers(model: onnx.ModelProto, version: Version) -> list[Finding]:
    """What is found beside what is true of every graph here for old versions."""
    return [finding for finding in lint(model, PROFILE, version) if finding.rule != STORED]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[2].__name__)
def test_a_fault_is_found_by_its_rule_alone(case: tuple[str, str, Fault, Version]) -> None:
    rule, name, fault, version = case
    model = quantized_graph()
    fault(model)
    (finding,) = findings_but_of_stored_integers(model, version) if rule != STORED else lint(model, PROFILE, version)
    assert (finding.rule, finding.node) == (rule, name)
    assert finding.remedy.endswith(".")
    assert str(finding) == f"{finding.severity}: {name}: {finding.what}. {finding.remedy} [{rule}]"


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ({}, r"its axes 0, 1 vary, and it has no profile"),
        ({"feats": Shapes((1, 8), (1, 8), (1, 8))}, r"it has 3 axes; shapes of the profile have 2"),
        ({"feats": Shapes((1, 50, 80), (1, 300, 80), (1, 3000, 80))}, r"axis 2 is 8 in the graph, and 80, 80 and 80"),
        ({"feats": Shapes((1, 400, 8), (1, 300, 8), (1, 3000, 8))}, r"axis 1 is 400, 300 and 3000 in the profile"),
        ({"feats": Shapes((0, 50, 8), (1, 300, 8), (1, 3000, 8))}, r"axis 0 is 0, 1 and 1 in the profile; 1 <= min"),
        ({**PROFILE, "speech": PROFILE["feats"]}, r"the profile has it, the graph has no such input"),
    ],
)
def test_a_profile_that_does_not_fit_is_found(shapes: dict[str, Shapes], what: str) -> None:
    (finding,) = lint(quantized_graph(), shapes)
    assert (finding.rule, finding.severity) == ("profile", "error")
    assert finding.node == ("speech" if "speech" in shapes else "feats")
    assert re.match(what, finding.what)


def test_an_input_without_a_name_is_found() -> None:
    model = quantized_graph()
    model.graph.input[0].name = ""
    assert [(finding.rule, finding.node) for finding in lint(model)] == [("input", "input 0")]


@pytest.mark.parametrize("version", [(8, 5), OLD, (10, 0), (10, 15)])
def test_a_graph_as_it_should_be_is_clean(version: Version) -> None:
    model = quantized_graph()
    onnx.checker.check_model(model, full_check=True)
    open_session(model.SerializeToString(), 1)
    assert lint(model if version >= DEFAULT_VERSION else float_weights(model), PROFILE, version) == []


def test_ends_of_a_slice_may_be_beyond_any_axis() -> None:
    model = quantized_graph()
    put(model, "end", np.array([np.iinfo(np.int64).max]))
    add(model, "Slice", ["channels", "row", "end"], ["unused"])
    assert findings_but_of_stored_integers(model, OLD) == []


def test_a_node_without_a_name_is_called_by_its_output() -> None:
    model = quantized_graph()
    model.graph.node.append(helper.make_node("ConvInteger", ["in_q", "conv.weight"], ["unused"]))
    assert [finding.node for finding in lint(model, PROFILE)] == ["unused"]


def test_a_typed_graph_may_hold_large_fp32_weights() -> None:
    model = quantized_graph()
    model.opset_import[0].version = 19
    put(model, "mid_scale", np.float16(0.02))
    large_weights(model)
    assert lint(model, PROFILE) == []


def test_every_rule_is_planted_and_described() -> None:
    described = set(
        re.findall(r"`([a-z0-9-]+)`", " ".join(re.findall(r"^\| (`.+?) \| ", PAGE.read_text("utf-8"), re.M)))
    )
    described = {name for name in described if not name.startswith("-")}
    assert described == {rule for rule, *_ in CASES} | {"profile"}


def test_severities_are_those_of_the_page() -> None:
    hard, soft = PAGE.read_text("utf-8").split("Warnings: ")
    for rule, _, fault, version in CASES:
        model = quantized_graph()
        fault(model)
        found = findings_but_of_stored_integers(model, version) if rule != STORED else lint(model, PROFILE, version)
        (finding,) = found
        assert f"`{rule}`" in (hard if finding.severity == "error" else soft)
        assert errors([finding]) == ([finding] if finding.severity == "error" else [])


def test_graphs_of_this_package_are_clean(tiny_onnx: Artifact, tiny_int8: Artifact, tiny_context: Context) -> None:
    symmetric = PTQ(utterances=20, target="tensorrt").run(tiny_onnx, tiny_context)
    profile = TRT().profile("feats", 16)
    for artifact in (tiny_onnx, symmetric):
        assert lint(onnx.load_from_string(artifact.onnx), profile) == []
    assert lint(forms(onnx.load_from_string(tiny_int8.onnx)).portable, profile) == []


def test_what_ptq_makes_for_onnx_runtime_is_not_for_tensorrt(tiny_int8: Artifact) -> None:
    found = lint(onnx.load_from_string(tiny_int8.onnx), TRT().profile("feats", 16))
    assert {"unsigned-activation", "quantized-bias"} <= {finding.rule for finding in found}


NETWORKS: dict[str, dict[str, Any]] = {
    "campplus": {"growth_rate": 8, "bn_size": 2, "init_channels": 16},
    "ecapa_tdnn": {"channels": [16, 16, 16, 16, 24], "attention_channels": 8, "se_channels": 8},
    "eres2net": {"m_channels": 8},
    "eres2netv2": {"m_channels": 8},
    "fsmn_vad": {"input_affine_dim": 24, "linear_dim": 32, "proj_dim": 24, "output_affine_dim": 24},
    "resnet34": {"m_channels": 4},
    "tdnn_blstm": {"channels": 16, "hidden_size": 12, "attention_channels": 8},
}


def test_every_registered_network_is_tried() -> None:
    assert set(NETWORKS) == set(ARCHITECTURES)


def quantized(model: onnx.ModelProto, utterances: list[np.ndarray]) -> onnx.ModelProto:
    """Q/DQ for TensorRT, as the pass ptq places it."""
    scheme = SCHEMES["tensorrt"]
    planned = plan(model, scheme, ("Conv", "Gemm", "MatMul"))
    ranges = collect_ranges(model, tensors(model, planned, scheme), utterances, symmetric=True).ranges
    return quantize(model, planned, ranges, scheme)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_both_forms_of_every_registered_network_are_clean(name: str, noise: Callable[..., list[np.ndarray]]) -> None:
    torch.manual_seed(0)
    module = ARCHITECTURES[name].build(**NETWORKS[name])
    num_mel_bins = 400 if name == "fsmn_vad" else 80
    for norm in module.modules():  # as they are made, they change nothing, and activations vanish or grow beyond bounds
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = 1.0
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, 0, 0.3)
    module.train()(torch.randn(4, 120, num_mel_bins))
    plain = conv1d_as_conv2d(export(module.eval(), num_mel_bins, 18))
    utterances, profile = noise(8, num_mel_bins), TRT().profile("feats", num_mel_bins)
    assert lint(plain, profile) == []
    for model in (plain, quantized(plain, utterances)):
        made = forms(model, [utterance[None] for utterance in utterances[:2]])
        for version in ((8, 5), OLD, (10, 0)):
            assert lint(made.portable, profile, version) == []
        for version in ((10, 12), (11, 0), (11, 4)):
            assert lint(made.typed, profile, version) == []
        for graph in (made.portable, made.typed):
            onnx.checker.check_model(graph, full_check=True)
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
            assert np.isfinite(session.run(None, {"feats": utterances[0][None]})[0]).all()


@pytest.mark.parametrize(
    ("text", "version"), [("8.6", (8, 6)), ("8.6.1", (8, 6)), ("10", (10, 0)), ("11.4", (11, 4)), ("8.5.3.1", (8, 5))]
)
def test_versions_are_read(text: str, version: Version) -> None:
    assert read_version(text) == version


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("new", "'new' is no version of TensorRT"),
        ("", "'' is no version"),
        ("7.2", "is not known"),
        ("12", "not known"),
    ],
)
def test_other_versions_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_version(text)
