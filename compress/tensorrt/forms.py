"""One graph in the two forms that TensorRT's versions ask for: with precision as build flags, and with types."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from compress.errors import ModelError
from compress.lint.graph import DEFAULT_VERSION, Graph
from compress.lint.tensors import is_typed
from compress.tensorrt.islands import islands
from compress.tensorrt.opset import PORTABLE_OPSET, at_opset
from compress.tensorrt.qdq import (
    constants_to_initializers,
    drop_unread,
    float_weights,
    for_tensorrt,
    inputs_of_layers_only,
    stored_weights,
)
from compress.tensorrt.typed import typed

if TYPE_CHECKING:
    import onnx

Array: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Forms:
    """Two graphs that compute the same.

    Attributes:
        portable: FP32 with Q/DQ, weights too, at opset 17: for TensorRT 8.5 to 10 with precision flags. Every node has
            a name of its own.
        typed: The same in FP16, quantized weights in INT8, FP32 where it has to be, with Casts between: for strong
            typing, 10.12 and later. Inputs and outputs are FP32.
        float_nodes: Names of the nodes of ``portable`` that have to run in FP32 -> why.
    """

    portable: "onnx.ModelProto"
    typed: "onnx.ModelProto"
    float_nodes: Mapping[str, str]


def forms(model: "onnx.ModelProto", features: Sequence[Array] = ()) -> Forms:
    """Make both forms of a graph.

    Args:
        model: Float or with Q/DQ, of any scheme; it is not changed.
        features: Inputs, (batch, frames, num_mel_bins) each, on which values are compared with the range of FP16.

    Raises:
        ModelError: If the graph cannot be converted, or has types of 16 bits already.
    """
    if is_typed(Graph(model, {}, DEFAULT_VERSION)):
        raise ModelError("the graph has FP16 or BF16 in it already; both forms are made of one in FP32.")
    made = portable(inputs_of_layers_only(for_tensorrt(stored_weights(model))))
    float_nodes = islands(made, features)
    return Forms(float_weights(made), typed(made, float_nodes), float_nodes)


def portable(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Bring a graph to opset 17, whatever it had, and name its nodes."""
    result = at_opset(model, PORTABLE_OPSET)
    constants_to_initializers(result.graph, {name for node in result.graph.node for name in node.input})
    drop_unread(result.graph)
    del result.graph.value_info[:]
    name_nodes(result.graph)
    return result


def name_nodes(graph: "onnx.GraphProto") -> None:
    """Give every node a name of its own, in place."""
    taken: set[str] = set()
    for node in graph.node:
        name = node.name or f"{node.op_type}_{next(iter(node.output), '')}"
        node.name = name if name not in taken else f"{name}_{len(taken)}"
        taken.add(node.name)
