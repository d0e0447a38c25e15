"""What is left in float, and that the reason is told."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.errors import SettingError
from compress.quantization import OPERATORS, SCHEMES, plan, tensors

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
