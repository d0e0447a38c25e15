"""Explicit quantization (Q/DQ) in ONNX graphs: of the types and at the places that TensorRT wants.

Sources: NVIDIA, "Working with Quantized Types" (zero points, recommended placement); NVIDIA/TensorRT#2383 (inputs of
layers, not results) and #1992 (the skip of a residual addition).
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import ModelError
from compress.lint.graph import all_nodes

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


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


def stored_weights(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Store as integers the constants that Q rounds, so that DQ alone is left of weights; scales stay."""
    import onnx
    from onnx import numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    constants_to_initializers(graph, {name for node in quantizers for name in node.input})
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in quantizers:
        if not tensors.keys() >= set(node.input) or len(node.input) < 3:
            continue
        values, scale, zero = (numpy_helper.to_array(tensors[name]) for name in node.input)
        limits = np.iinfo(zero.dtype)
        integers = np.rint(values / along(node, scale, values.ndim)) + along(node, zero, values.ndim).astype(np.float32)
        stored = integers.clip(limits.min, limits.max).astype(zero.dtype)
        graph.initializer.append(numpy_helper.from_array(stored, node.output[0]))
        graph.node.remove(node)
    drop_unread(graph)
    return result


def float_weights(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Store quantized weights as FP32 with Q and DQ: old parsers refuse constants of INT8.

    Source: microsoft/onnxruntime#11535 and NVIDIA/TensorRT#2163 (TensorRT 8.4); which version takes them first was not
    found. Q gives the same integers again.
    """
    import onnx
    from onnx import helper, numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    replaced: list[str] = []
    for node in graph.node:
        stored = tensors.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if stored is not None and stored.data_type == onnx.TensorProto.INT8 and len(node.input) > 2:
            # The first Q gives what was stored, under its name.
            rounded = stored.name if stored.name not in replaced else f"{stored.name}_{len(replaced)}"
            integers, scale = (numpy_helper.to_array(tensors[name]) for name in node.input[:2])
            value = integers.astype(np.float32) * along(node, scale, integers.ndim)
            graph.initializer.append(numpy_helper.from_array(value, f"{rounded}_float"))
            inputs = [f"{rounded}_float", *node.input[1:]]
            nodes.append(helper.make_node("QuantizeLinear", inputs, [rounded], f"{node.name}_quantize"))
            nodes[-1].attribute.extend(node.attribute)
            node.input[0] = rounded
            replaced.append(stored.name)
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    for name in set(replaced):
        graph.initializer.remove(tensors[name])
    drop_unread(graph)
    return result


def along(node: "onnx.NodeProto", values: NDArray[Any], ndim: int) -> NDArray[Any]:
    """Shape scales or zero points so that they are broadcast over the other axes than a quantizer's."""
    axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1) % max(ndim, 1)
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)]) if values.size > 1 else values.reshape(())


def drop_unread(graph: "onnx.GraphProto") -> None:
    """Remove constants that no node reads, in place."""
    read = {name for node in all_nodes(graph.node) for name in node.input} | {value.name for value in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def inputs_of_layers_only(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Leave Q/DQ where it makes a layer run in INT8, and take it away elsewhere.

    It stays at both inputs of convolutions and matrix products, and at the skip of a residual addition behind one of
    them. Depthwise convolutions, the last layer, recurrent layers and whatever has no weights read what was there
    before Q. A graph without Q/DQ comes back as it is.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from compress.quantization.graph import read
    from compress.quantization.planning import residual_inputs

    if not any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        return model
    result = read(model)
    graph = result.graph
    layers = {node for node in graph if is_int8_layer(node)}
    dequantized: dict[ir.Value, ir.Value] = {}  # value before Q -> after DQ
    for node in list(graph):
        for place, value in enumerate(node.inputs):
            before = before_quantizer(value)
            if value is None or before is None or node.op_type == "DequantizeLinear":
                continue
            dequantized.setdefault(before, value)
            if node not in layers or place > 1:
                node.replace_input_with(place, before)
        if node.op_type in LAYERS and node not in layers:
            to_float_weight(graph, node)
    for node, place in residual_inputs(graph, {str(layer.name) for layer in layers}).items():
        skip = node.inputs[place]
        if skip in dequantized:
            node.replace_input_with(place, dequantized[skip])
    RemoveUnusedNodesPass()(result)
    return ir.to_proto(result)


def is_int8_layer(node: "ir.Node") -> bool:
    """Whether a layer has Q/DQ at both inputs, and gains by INT8 on tensor cores."""
    from compress.quantization.planning import no_gain_on_tensor_cores

    if node.op_type not in LAYERS or node.domain not in ("", "ai.onnx") or before_quantizer(node.inputs[0]) is None:
        return False
    weight = node.inputs[1]
    dequantizer = weight.producer() if weight is not None else None
    if dequantizer is None or dequantizer.op_type != "DequantizeLinear":
        return False
    stored = dequantizer.inputs[0]
    if stored is None or stored.const_value is None:
        return before_quantizer(weight) is not None
    return no_gain_on_tensor_cores(node, stored.const_value.numpy().shape) is None


def before_quantizer(value: "ir.Value | None") -> "ir.Value | None":
    """What a value was before Q and DQ; None if it does not come from such a pair, or is a constant."""
    dequantizer = value.producer() if value is not None else None
    if dequantizer is None or dequantizer.op_type != "DequantizeLinear" or dequantizer.inputs[0] is None:
        return None
    quantizer = dequantizer.inputs[0].producer()
    if quantizer is None or quantizer.op_type != "QuantizeLinear":
        return None
    before = quantizer.inputs[0]
    return before if before is not None and before.const_value is None else None


def to_float_weight(graph: "ir.Graph", node: "ir.Node") -> None:
    """Give a layer the numbers that its quantized weight stands for, in place."""
    from compress.quantization.graph import add_initializer, integer

    weight = node.inputs[1]
    dequantizer = weight.producer() if weight is not None else None
    if dequantizer is None or dequantizer.op_type != "DequantizeLinear":
        return
    known = [
        value.const_value for value in dequantizer.inputs[:2] if value is not None and value.const_value is not None
    ]
    if len(known) < 2:
        return
    stored, scale = (tensor.numpy() for tensor in known)
    axis = integer(dequantizer, "axis", 1) % max(stored.ndim, 1)
    shape = [-1 if i == axis and scale.size > 1 else 1 for i in range(stored.ndim)]
    made = add_initializer(graph, f"{node.name}_float_weight", stored.astype(np.float32) * scale.reshape(shape))
    node.replace_input_with(1, made)


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
