"""Two forms of one graph: both valid, near and clean, whatever made the graph."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from compress.artifact import Artifact
from compress.errors import ModelError
from compress.lint import Shapes, lint
from compress.passes import PTQ, TRT, Context
from compress.tensorrt.forms import Forms, forms
from compress.tensorrt.qdq import stored_weights

OLD, NEW = ((8, 5), (8, 6), (10, 0)), ((10, 12), (11, 0))


@pytest.fixture(scope="module")
def tiny_symmetric(tiny_onnx: Artifact, tiny_context: Context) -> Artifact:
    """Quantized for TensorRT."""
    return PTQ(utterances=20, target="tensorrt").run(tiny_onnx, tiny_context)


@pytest.fixture(scope="module")
def tiny_batches(noise) -> list[np.ndarray]:
    return [features[None] for features in noise(4, 16, seed=5)]


def graph_of(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load_from_string(artifact.onnx)


def check(made: Forms, num_mel_bins: int = 16) -> None:
    """What holds for the forms of any graph."""
    profile = TRT().profile("feats", num_mel_bins)
    for model, opset, versions in ((made.portable, 17, OLD), (made.typed, 19, NEW)):
        onnx.checker.check_model(model, full_check=True)
        assert model.opset_import[0].version == opset
        names = [node.name for node in model.graph.node]
        assert all(names)
        assert len(set(names)) == len(names)
        ends = (*model.graph.input, *model.graph.output)
        assert {value.type.tensor_type.elem_type for value in ends} == {TensorProto.FLOAT}
        for version in versions:
            assert lint(model, profile, version) == []
    assert made.float_nodes.keys() <= {node.name for node in made.portable.graph.node}


@pytest.mark.parametrize("name", ["tiny_onnx", "tiny_int8", "tiny_symmetric"])
def test_forms_are_clean_and_near_the_float_graph(request, name: str, tiny_onnx, tiny_batches, least_cosine) -> None:
    given = graph_of(request.getfixturevalue(name))
    made = forms(given, tiny_batches)
    check(made)
    least = 0.99999 if name == "tiny_onnx" else 0.995  # 13 thousand random weights; the trained network's bar is higher
    for model in (made.portable, made.typed):
        assert least_cosine(graph_of(tiny_onnx), model, tiny_batches) >= least
    assert given == graph_of(request.getfixturevalue(name)), "the given graph is left alone"


def test_the_typed_form_is_the_portable_one_but_for_rounding(tiny_symmetric, tiny_batches, least_cosine) -> None:
    made = forms(graph_of(tiny_symmetric))
    assert least_cosine(made.portable, made.typed, tiny_batches) >= 0.999
    kinds = [[node.op_type for node in model.graph.node] for model in (made.portable, made.typed)]
    for kind in ("DequantizeLinear", "Conv", "Gemm", "MatMul", "Sqrt"):
        assert kinds[0].count(kind) == kinds[1].count(kind)


def test_weights_are_fp32_before_q_in_the_portable_form_and_int8_in_the_typed(tiny_symmetric) -> None:
    given, made = graph_of(tiny_symmetric), forms(graph_of(tiny_symmetric))
    for model, wanted in ((made.portable, TensorProto.FLOAT), (made.typed, TensorProto.INT8)):
        stored = [tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4]
        assert stored == [wanted] * 2
    integers = {t.raw_data for t in given.graph.initializer if len(t.dims) == 4}
    assert {t.raw_data for t in made.typed.graph.initializer if len(t.dims) == 4} == integers
    again = stored_weights(made.portable)
    assert {t.raw_data for t in again.graph.initializer if len(t.dims) == 4} == integers, "Q gives them again"


def test_forms_of_forms_change_nothing_more(tiny_symmetric) -> None:
    once = forms(graph_of(tiny_symmetric)).portable
    assert forms(once).portable == once


def test_a_graph_in_fp16_is_refused(tiny_onnx) -> None:
    with pytest.raises(
        ModelError, match=r"the graph has FP16 or BF16 in it already; both forms are made of one in FP32"
    ):
        forms(forms(graph_of(tiny_onnx)).typed)


def test_metadata_goes_along(tiny_onnx) -> None:
    made = forms(graph_of(tiny_onnx))
    for model in (made.portable, made.typed):
        assert {entry.key: entry.value for entry in model.metadata_props}["num_mel_bins"] == "16"


Fault = Callable[[onnx.ModelProto], None]


def quantizer(model: onnx.ModelProto) -> onnx.NodeProto:
    """The first Q of an activation."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] not in constants)


def weights_quantizer(model: onnx.ModelProto) -> onnx.NodeProto:
    """The Q of the first convolution's weight, or its DQ if that is all there is."""
    makers = {output: node for node in model.graph.node for output in node.output}
    dequantizer = makers[next(node for node in model.graph.node if node.op_type == "Conv").input[1]]
    return makers.get(dequantizer.input[0], dequantizer)


def replace(model: onnx.ModelProto, node: onnx.NodeProto, place: int, value: np.ndarray) -> None:
    """Give a quantizer, and the DQ behind it, another scale or zero point."""
    model.graph.initializer.append(numpy_helper.from_array(value, f"planted{place}"))
    behind = [user for user in model.graph.node if node.output[0] in user.input and user.op_type == "DequantizeLinear"]
    for changed in (node, *behind):
        changed.input[place] = f"planted{place}"


def like(model: onnx.ModelProto, name: str, number: float, shape: tuple[int, ...] = ()) -> np.ndarray:
    """A constant of the type of another."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return np.full(shape, number, numpy_helper.to_array(tensor).dtype)


def zero_point(model: onnx.ModelProto) -> str:
    replace(model, quantizer(model), 2, np.int8(3))
    return quantizer(model).name


def unsigned(model: onnx.ModelProto) -> str:
    replace(model, quantizer(model), 2, np.uint8(0))
    return quantizer(model).name


def zero_scale(model: onnx.ModelProto) -> str:
    replace(model, quantizer(model), 1, like(model, quantizer(model).input[1], 0))
    return quantizer(model).name


def underflowing_scale(model: onnx.ModelProto) -> str:
    replace(model, quantizer(model), 1, like(model, quantizer(model).input[1], 2e-7))
    return quantizer(model).name


def number_of_scales(model: onnx.ModelProto) -> str:
    node = weights_quantizer(model)
    replace(model, node, 1, like(model, node.input[1], 0.01, (5,)))
    replace(model, node, 2, np.zeros(5, np.int8))
    return node.name


def quantized_bias(model: onnx.ModelProto) -> str:
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and len(node.input) > 2)
    steps = weights_quantizer(model).input[1]
    count = next(tensor for tensor in model.graph.initializer if tensor.name == steps).dims[0]
    for name in ("planted", "planted_zeros"):
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(count, np.int32), name))
    inputs = ["planted", steps, "planted_zeros"]
    made = onnx.helper.make_node("DequantizeLinear", inputs, ["planted_bias"], "planted_dequantize", axis=0)
    model.graph.node.insert(0, made)
    conv.input[2] = "planted_bias"
    return conv.name


def unknown_operator(model: onnx.ModelProto) -> str:
    model.graph.node.append(onnx.helper.make_node("Det", ["feats"], ["unused"], "planted"))
    return "planted"


def quantized_lstm(model: onnx.ModelProto) -> str:
    makers = {output: node for node in model.graph.node for output in node.output}
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and node.input[0] in makers)
    inputs = [conv.input[0], conv.input[1], conv.input[1]]
    model.graph.node.append(onnx.helper.make_node("LSTM", inputs, ["unused"], "planted", hidden_size=4))
    return "planted"


def opset_too_new(model: onnx.ModelProto) -> str:
    model.opset_import[0].version = 25
    return str(model.graph.name)


def external_data(model: onnx.ModelProto) -> str:
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    onnx.external_data_helper.set_external_data(tensor, "weights.bin")
    tensor.ClearField("raw_data")
    return str(tensor.name)


def rank_not_told(model: onnx.ModelProto) -> str:
    model.graph.input[0].type.tensor_type.ClearField("shape")
    return "feats"


FAULTS: dict[str, tuple[Fault, str]] = {
    "zero-point": (zero_point, "Quantize symmetrically"),
    "unsigned-activation": (unsigned, "ptq.target=tensorrt"),
    "scale": (zero_scale, "Calibrate again"),
    "scale-fp16": (underflowing_scale, "Keep the layer in float"),
    "scale-axis": (number_of_scales, "per output channel"),
    "quantized-bias": (quantized_bias, "the pass trt"),
    "operator": (unknown_operator, "Write it with other operators"),
    "quantized-recurrent": (quantized_lstm, "Leave it in float"),
    "opset": (opset_too_new, "Convert it to opset 24"),
    "external-data": (external_data, "Copy that file along"),
    "input": (rank_not_told, "Write its shape"),
}


@pytest.mark.parametrize("form", ["portable", "typed"])
@pytest.mark.parametrize("rule", FAULTS)
def test_a_fault_in_either_form_is_found_by_node_with_remedy(tiny_symmetric: Artifact, form: str, rule: str) -> None:
    model = getattr(forms(graph_of(tiny_symmetric)), form)
    plant, remedy = FAULTS[rule]
    name = plant(model)
    found = lint(model, TRT().profile("feats", 16), (10, 0))
    assert (rule, name) in {(finding.rule, finding.node) for finding in found}
    assert remedy in next(finding.remedy for finding in found if finding.rule == rule)


@pytest.mark.parametrize("form", ["portable", "typed"])
def test_axes_that_vary_need_a_profile_in_either_form(tiny_symmetric: Artifact, form: str) -> None:
    model = getattr(forms(graph_of(tiny_symmetric)), form)
    assert [(finding.rule, finding.node) for finding in lint(model)] == [("profile", "feats")]
    profile = {"feats": Shapes((1, 50, 16), (1, 40, 16), (1, 60, 16))}
    assert [finding.rule for finding in lint(model, profile)] == ["profile"]
