"""One graph in the two forms that TensorRT's versions ask for: with precision as build flags, and with types."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from compress.tensorrt.qdq import for_tensorrt

if TYPE_CHECKING:
    import onnx

Array: TypeAlias = NDArray[np.float32]

PORTABLE_OPSET = 17  # the newest that TensorRT 8.5 and 8.6 read


@dataclass(frozen=True, eq=False)
class Forms:
    """Two graphs that compute the same.

    Attributes:
        portable: FP32 with Q/DQ, at opset 17: for TensorRT 8.5 to 10 with precision flags. Every node has a name of
            its own.
        typed: The same in FP16, FP32 where it has to be, with Casts between: for strong typing, 10.12 and later.
            Inputs and outputs are FP32.
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
        ModelError: If the graph cannot be converted.
    """
    made = portable(for_tensorrt(model))
    return Forms(made, made, {})


def portable(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Bring a graph to opset 17, whatever it had, and name its nodes."""
    import onnx
    from onnx import version_converter

    result: onnx.ModelProto = version_converter.convert_version(model, PORTABLE_OPSET)
    result.ir_version = onnx.helper.find_min_ir_version_for(result.opset_import, ignore_unknown=True)
    for node in result.graph.node:  # the converter leaves it on operators that do not have it at that opset
        for attribute in [entry for entry in node.attribute if entry.name == "noop_with_empty_axes" and not entry.i]:
            node.attribute.remove(attribute)
    name_nodes(result.graph)
    return result


def name_nodes(graph: "onnx.GraphProto") -> None:
    """Give every node a name of its own, in place."""
    taken: set[str] = set()
    for node in graph.node:
        name = node.name or f"{node.op_type}_{next(iter(node.output), '')}"
        node.name = name if name not in taken else f"{name}_{len(taken)}"
        taken.add(node.name)
