"""What is left in float, and that the reason is told."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.calibration import collect_ranges
from compress.errors import SettingError
from compress.quantization import OPERATORS, SCHEMES, plan, quantize, tensors
from compress.quantization.graph import read
from compress.quantization.planning import residual_inputs

ORT = SCHEMES["onnxruntime"]


def reasons(model: onnx.ModelProto, operators=OPERATORS, keep=(), target: str = "onnxruntime") -> dict[str, str]:
    return dict(plan(model, SCHEMES[target], operators, keep).kept)


def test_statistics_gates_and_segment_pooling_stay_in_float(random_graph) -> None:
    model = random_graph(gate=True, concat=True, lstm=True, pooling=True)
    planned = plan(model, ORT, OPERATORS)
    kinds = {node.name: node.op_type for node in model.graph.node}
    by_reason: dict[str, set[str]] = {}
    for name, why in planned.kept.items():
        by_reason.setdefault(why, set()).add(kinds[name])
    assert by_reason == {
        "a gate": {"Mul"},
        "statistics pooling": {"Mul", "Add", "Concat"},
        "segment pooling with ceil_mode": {"AveragePool"},
    }
    assert [kinds[name] for name in planned.joining] == ["Concat"]
    assert [kinds[name] for name in planned.recurrent] == ["LSTM"]
    assert len(planned.layers) == 6


def test_means_by_a_matrix_stay_in_float(tiny_graph) -> None:
    model = onnx.load(tiny_graph)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w2")
    member = np.zeros((48, 32), np.float32)
    member[np.arange(48), np.arange(48) % 32] = 1
    weight.CopyFrom(numpy_helper.from_array(member / member.sum(0), "w2"))
    assert reasons(model) == {"second": "segment pooling"}


def test_products_of_two_activations_stay_in_float(tiny_onnx) -> None:
    model = onnx.load_from_string(tiny_onnx.onnx)
    products = [n.name for n in model.graph.node if n.op_type == "MatMul"]
    assert products
    assert {name: why for name, why in reasons(model).items() if name in products} == dict.fromkeys(
        products, "no constant weight: a product of two activations, as pooling over segments and attention are"
    )


def test_a_target_without_an_int8_lstm_is_told(random_graph) -> None:
    for target in ("openvino", "tensorrt"):
        assert set(reasons(random_graph(lstm=True), target=target).values()) >= {"the target has no INT8 LSTM"}


@pytest.mark.parametrize(("pattern", "left"), [("Conv_1", 4), ("Conv*", 0), ("weight_0", 4), ("Conv_?", 1)])
def test_operators_are_kept_by_name_weight_or_type(random_graph, pattern: str, left: int) -> None:
    model = random_graph(gate=True, concat=True)
    convolutions = {node.name for node in model.graph.node if node.op_type == "Conv"}
    planned = plan(model, ORT, OPERATORS, [pattern])
    assert len(convolutions & set(planned.layers)) == left
    assert {planned.kept[name] for name in convolutions & set(planned.kept)} <= {f"keep={pattern}"}


def test_a_pattern_that_fits_nothing_is_refused(random_graph) -> None:
    with pytest.raises(
        SettingError, match=r"ptq\.keep: 'linear\*' fits no operator of the graph\. Some there are: Conv_1"
    ):
        plan(random_graph(), ORT, OPERATORS, ["linear*"], "ptq.keep")


def test_only_the_types_asked_for_are_planned(random_graph) -> None:
    model = random_graph(lstm=True, concat=True)
    planned = plan(model, ORT, ["Gemm"])
    kinds = {node.name: node.op_type for node in model.graph.node}
    assert {kinds[name] for name in (*planned.layers, *planned.joining, *planned.recurrent)} == {"Gemm"}
    assert len(tensors(model, planned, ORT)) == 1


def test_nodes_without_names_are_told_apart(random_graph) -> None:
    model = random_graph(concat=True)
    count = len(plan(model, ORT, OPERATORS).layers)
    for node in model.graph.node:
        node.name = ""
    assert len(set(plan(model, ORT, OPERATORS).layers)) == count


RESIDUAL = """
    a = Conv <pads = [1, 1]> (x, w_first)
    b = Relu (a)
    c = Conv <pads = [1, 1]> (b, w_second)
    d = Conv (b, w_short)
    sum = Add (c, {skip})
    e = Relu (sum)
    f = Conv <pads = [1, 1], group = 8> (e, w_depthwise)
    g = Conv (f, w_last_but_one)
    y = Conv (g, w_last)
"""
SHAPES = {
    **dict.fromkeys(("w_first", "w_second"), (8, 8, 3)),
    **dict.fromkeys(("w_short", "w_last_but_one", "w_last"), (8, 8, 1)),
    "w_depthwise": (8, 1, 3),
}


@pytest.mark.parametrize("target", SCHEMES)
@pytest.mark.parametrize(("skip", "maker"), [("b", "Relu"), ("d", "Conv")])
def test_the_skip_of_a_residual_addition_is_quantized_for_tensorrt(graph_of, speechlike, target, skip, maker) -> None:
    model, scheme = graph_of(RESIDUAL.format(skip=skip), SHAPES), SCHEMES[target]
    planned = plan(model, scheme, ("Conv",))
    ranges = collect_ranges(model, tensors(model, planned, scheme), speechlike, symmetric=scheme.symmetric).ranges
    made = quantize(model, planned, ranges, scheme)
    makers = {output: node for node in made.graph.node for output in node.output}
    addition = next(node for node in made.graph.node if node.op_type == "Add")
    kinds = [makers[name].op_type for name in addition.input]
    if target == "tensorrt":
        assert kinds == ["Conv", "DequantizeLinear"]
        assert makers[makers[makers[addition.input[1]].input[0]].input[0]].op_type == maker
    elif target == "openvino" and maker == "Conv":
        assert kinds == ["Conv", "Conv"]


def test_a_result_that_others_read_too_is_no_residual_branch(graph_of) -> None:
    model = graph_of(RESIDUAL.format(skip="b").replace("(e, w_dep", "(c, w_dep"), SHAPES)
    layers = plan(model, SCHEMES["tensorrt"], ("Conv",)).layers
    assert residual_inputs(read(model).graph, layers) == {}


def test_depthwise_and_last_layers_stay_in_float_for_tensorrt(graph_of) -> None:
    model = graph_of(RESIDUAL.format(skip="d"), SHAPES)
    weights = {node.output[0]: node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    assert {weights[name]: why for name, why in reasons(model, ("Conv",), target="tensorrt").items()} == {
        "w_depthwise": "depthwise: INT8 is seldom faster there",
        "w_last": "the last layer: small, and closer in float",
    }
    assert reasons(model, ("Conv",)) == {}
