"""Explicit quantization (Q/DQ) in ONNX graphs: rewriting it for TensorRT."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compress.errors import ModelError

if TYPE_CHECKING:
    import onnx


def for_tensorrt(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Rewrite Q/DQ for TensorRT's parser: S8 activations with zero point 0, and biases in float.

    A U8 range [low, high] becomes the symmetric one of the same largest magnitude, so calibration is not
    repeated. A graph without Q/DQ comes back as it is.

    Raises:
        ModelError: If a scale or zero point is not a constant, or weights are stored as U8.
    """
    import onnx
    from onnx import numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    quantizers = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    constants_to_initializers(graph, {name for node in quantizers for name in node.input})
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    floats: list[onnx.NodeProto] = []
    symmetric: dict[tuple[str, ...], tuple[str, str]] = {}  # (scale, zero point) -> those that replace them
    for node in quantizers:
        if not tensors.keys() >= set(node.input[1:]):
            raise ModelError(f"trt: the scale or zero point of {node.name or node.output[0]} is not a constant.")
        zero_point = tensors[node.input[2]] if len(node.input) > 2 else None
        source = tensors.get(node.input[0])
        if source is not None and source.data_type == onnx.TensorProto.INT32:
            bias = numpy_helper.to_array(source) * numpy_helper.to_array(tensors[node.input[1]])
            source.CopyFrom(numpy_helper.from_array(bias.astype(np.float32), node.output[0]))
            floats.append(node)
        elif zero_point is not None and zero_point.data_type == onnx.TensorProto.UINT8:
            if source is not None:
                raise ModelError(f"trt: {source.name} is stored as U8; TensorRT takes S8 weights. Quantize with ptq.")
            zeros = numpy_helper.to_array(zero_point)
            magnitude = largest_magnitude(numpy_helper.to_array(tensors[node.input[1]]), zeros)
            # By pair: other tools let quantizers of different zero points share one scale.
            pair = tuple(node.input[1:])
            names = symmetric.setdefault(pair, (f"s8_scale_{len(symmetric)}", f"s8_zero_point_{len(symmetric)}"))
            if names[0] not in tensors:
                values = (magnitude / np.float32(127), np.zeros(zeros.shape, np.int8))
                made = {name: numpy_helper.from_array(value, name) for name, value in zip(names, values, strict=True)}
                tensors.update(made)
                graph.initializer.extend(made.values())
            node.input[1:] = names
    for node in floats:
        graph.node.remove(node)
    replaced = {name for node in floats for name in node.input}.union(*symmetric)
    replaced -= {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in replaced]:
        graph.initializer.remove(tensor)
    return result


def constants_to_initializers(graph: "onnx.GraphProto", names: set[str]) -> None:
    """Make initializers of the Constant nodes that give these names, in place."""
    found = [node for node in graph.node if node.op_type == "Constant" and node.output[0] in names]
    for node in found:
        value = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
        if value is not None:
            value.name = node.output[0]
            graph.initializer.append(value)
            graph.node.remove(node)


def largest_magnitude(scale: NDArray[np.float32], zero_point: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Largest magnitude that an unsigned 8-bit grid represents, at either end."""
    zero = zero_point.astype(np.float32)
    return (np.maximum(zero, 255 - zero) * scale).astype(np.float32)
