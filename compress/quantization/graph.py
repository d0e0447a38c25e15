"""Looking at ONNX graphs: weights of layers, names, and what lies between them."""

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from compress.errors import ModelError

Array = NDArray[np.float32]

WEIGHTED = ("Conv", "Gemm", "MatMul")
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # the values stay as they are
FIRST_OPSET = 13  # of per-channel Q/DQ


def read(model: onnx.ModelProto) -> ir.Model:
    """Take a graph to be changed; constants become initializers, and every node gets a name of its own.

    Raises:
        ModelError: If its opset is too old for per-channel Q/DQ.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < FIRST_OPSET:
        raise ModelError(
            f"the graph has opset {opset}; per-channel Q/DQ needs {FIRST_OPSET} or later. Export again with opset 18."
        )
    found = ir.from_proto(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(found)
    taken: set[str] = set()
    for node in found.graph:
        name = node.name or node.outputs[0].name or node.op_type
        node.name = name if name not in taken else f"{name}_{len(taken)}"
        taken.add(node.name)
    return found


def constant(value: ir.Value | None) -> Array | None:
    """The values of a float constant; None of anything else."""
    if value is None or value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
        return None
    return value.const_value.numpy()


def weight_of(node: ir.Node) -> tuple[Array, int] | None:
    """The weight of a layer, and its axis of output channels; None of a node without a constant weight."""
    if node.op_type not in WEIGHTED or node.domain not in ("", "ai.onnx"):
        return None
    weight = constant(node.inputs[1])
    if weight is None or weight.ndim < 2 or constant(node.inputs[0]) is not None:
        return None
    if node.op_type == "Gemm":
        return weight, 0 if integer(node, "transB", 0) else 1
    return weight, 0 if node.op_type == "Conv" else weight.ndim - 1


def layers(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes with a constant weight, in order."""
    return (node for node in graph if weight_of(node) is not None)


def count_weighted(model: onnx.ModelProto) -> int:
    """Count the operators with a constant weight: convolutions, matrix products and Gemms."""
    return sum(1 for _ in layers(ir.from_proto(model).graph))


def source(value: ir.Value) -> ir.Value:
    """Where the numbers of a value come from, back through operators that only move them, and through Q/DQ."""
    while (producer := value.producer()) is not None and producer.op_type in (
        *MOVES,
        "QuantizeLinear",
        "DequantizeLinear",
    ):
        assert producer.inputs[0] is not None, "none of these has an optional first input"
        value = producer.inputs[0]
    return value


def result_of(node: ir.Node) -> ir.Value:
    """What an operator gives, with a ReLU that alone takes it: a runtime does both at once."""
    value = node.outputs[0]
    uses = list(value.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Relu" and not value.is_graph_output():
        return uses[0].node.outputs[0]
    return value


def leaves_the_graph(value: ir.Value) -> bool:
    """Whether a value is an output of the graph, moved at most."""
    if value.is_graph_output():
        return True
    return any(use.node.op_type in MOVES and leaves_the_graph(use.node.outputs[0]) for use in value.uses())


def integer(node: ir.Node, name: str, default: int) -> int:
    """An attribute of a node."""
    return node.attributes[name].as_int() if name in node.attributes else default


def add_initializer(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    """Put a constant into the graph."""
    value = ir.val(name, const_value=ir.tensor(values, name=name))
    graph.register_initializer(value)
    return value
