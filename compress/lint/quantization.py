"""Rules on Q/DQ: what the parser refuses, and what builds but is no gain."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compress.lint.graph import Finding, Graph, Rule, Version, attribute, name_of, type_name
from compress.lint.operators import RECURRENT
from compress.lint.tensors import is_typed

if TYPE_CHECKING:
    import onnx

# In FP16 a scale below this is off by up to half a step at the end of its 127 steps.
LEAST_FP16_SCALE = 127 * 2.0**-24
ZERO_IN_FP16 = 2.0**-25  # half of the smallest number above 0: what is not above it becomes 0
TYPES: Mapping[str, Version] = {"INT8": (8, 5), "FLOAT8E4M3FN": (9, 0), "INT4": (10, 0), "FLOAT4E2M1": (10, 15)}
STORED: Version = (10, 0)  # the first that is documented to take weights stored as integers
OPTIONAL_ZERO_POINT: Version = (10, 0)
OPTIONAL_AXIS: Version = (10, 0)  # before, scales without an axis were on axis 0
PARTING = ("Cast", "Unsqueeze", "Squeeze", "Reshape", "Identity")
BIASED = ("Conv", "ConvTranspose", "Gemm")


def told_type(graph: Graph, node: "onnx.NodeProto") -> str | None:
    """The type of a quantizer's integers, where the graph tells it."""
    is_dequantizer = node.op_type == "DequantizeLinear"
    for name in (*node.input[2:3], *(node.input[:1] if is_dequantizer else ())):
        if name in graph.tensors:
            return type_name(graph.tensors[name].data_type)
    before = graph.maker(node.input[0], "QuantizeLinear") if is_dequantizer else None
    if before is not None:
        return told_type(graph, before)
    told = 0 if is_dequantizer else attribute(node, "output_dtype", 0)
    return type_name(told) if told else None


def is_bias(graph: Graph, node: "onnx.NodeProto") -> bool:
    """Whether a quantizer is one of a bias; all that is wrong with it is that it is there."""
    return any(place == 2 and layer.op_type in BIASED for layer, place in graph.layers_after(node))


def quantized_types(graph: Graph) -> Iterator[Finding]:
    """Numbers are quantized to S8."""
    for node in graph.quantizers():
        kind = told_type(graph, node)
        if kind is None or is_bias(graph, node):
            continue
        if kind == "UINT8" and graph.is_constant(node.input[0]):
            what = "weights quantized to U8; TensorRT has S8 only"
            yield Finding("unsigned-weight", name_of(node), what, "Quantize weights to S8 with zero point 0: ptq does.")
        elif kind == "UINT8":
            what = "activations quantized to U8; TensorRT has S8 only"
            remedy = "Quantize with ptq.target=tensorrt, or run the pass trt, which rewrites them."
            yield Finding("unsigned-activation", name_of(node), what, remedy)
        elif kind not in TYPES or graph.version < TYPES[kind]:
            what = f"quantized to {kind}, which {graph.reader} does not have"
            yield Finding("quantized-type", name_of(node), what, "Quantize to S8 with zero point 0.")


def stored_integers(graph: Graph) -> Iterator[Finding]:
    """Weights are FP32 with Q and DQ for versions that may not have constants of INT8. Told once."""
    dequantizers = (
        [node for node in graph.nodes if node.op_type == "DequantizeLinear"] if graph.version < STORED else []
    )
    stored = [node for node in dequantizers if told_type(graph, node) == "INT8" and node.input[0] in graph.tensors]
    if stored:
        what = f"INT8 constants ({len(stored)} of them), which {graph.reader} may refuse, as 8.4 does"
        remedy = "Store FP32 with Q and DQ: the portable form of the pass trt does."
        yield Finding("stored-integers", name_of(stored[0]), what, remedy, "warning")


def zero_points(graph: Graph) -> Iterator[Finding]:
    """Zero points are there, as many as scales, and 0."""
    for node in graph.quantizers():
        kind = told_type(graph, node)
        if kind == "UINT8" or is_bias(graph, node):
            continue  # found already
        name = node.input[2] if len(node.input) > 2 else ""
        value = graph.value(name) if name else None
        if value is not None and value.astype(np.float32).any():
            first = value.ravel()[value.ravel().astype(np.float32) != 0][0]
            what = f"zero point {first}; TensorRT takes 0 only"
            yield Finding("zero-point", name_of(node), what, "Quantize symmetrically: ptq.target=tensorrt.")
        elif value is not None and (scale := graph.value(node.input[1])) is not None and value.size != scale.size:
            what = f"{value.size} zero points for {scale.size} scales"
            yield Finding("zero-point", name_of(node), what, "Give as many zero points as scales, all 0.")
        elif not name and (kind is None or graph.version < OPTIONAL_ZERO_POINT):
            what = "no zero point: that means U8 in ONNX, and S8 in TensorRT"
            if kind is not None:
                what = f"no zero point, which {graph.reader} asks for"
            yield Finding("zero-point-missing", name_of(node), what, "Give it an INT8 zero point of 0.")


def scales(graph: Graph) -> Iterator[Finding]:
    """Scales are above 0, and would be in FP16; in a typed graph, FP32 scales are meant to be FP32."""
    for node in graph.quantizers():
        value = graph.value(node.input[1])
        if value is None or not value.size or is_bias(graph, node):
            continue
        numbers = value.astype(np.float64).ravel()
        wrong = numbers[~((numbers > 0) & np.isfinite(numbers))]
        least = numbers.min()
        if wrong.size:
            what = f"scale {wrong[0]:g}; scales have to be finite and above 0"
            yield Finding("scale", name_of(node), what, "Calibrate again; for a channel of zeros, any scale will do.")
        elif least < LEAST_FP16_SCALE and (value.dtype == np.float16 or not is_typed(graph)):
            what = f"scale {least:.3g} {'becomes 0' if least <= ZERO_IN_FP16 else 'loses digits'} in FP16"
            remedy = "Keep the layer in float, or give a channel of zeros a larger scale."
            yield Finding("scale-fp16", name_of(node), what, remedy, "warning")


def scale_axes(graph: Graph) -> Iterator[Finding]:
    """Scales per channel are those of the output channels of a weight, one each."""
    for node in graph.quantizers():
        scale = graph.value(node.input[1])
        if scale is None or scale.size == 1 or is_bias(graph, node):
            continue
        if not graph.is_constant(node.input[0]):
            what = f"{scale.size} scales for an activation, which may have one"
            yield Finding("per-channel-activation", name_of(node), what, "Quantize activations per tensor.")
            continue
        what = wrong_axis(graph, node, scale.size)
        if what:
            yield Finding("scale-axis", name_of(node), what, "Quantize weights per output channel: ptq does.")


def wrong_axis(graph: Graph, node: "onnx.NodeProto", count: int) -> str:
    """What is wrong with the axis of a weight's scales, or nothing."""
    weight = graph.value(node.input[0])
    axis = int(attribute(node, "axis", 1))
    if weight is not None and weight.ndim:
        axis %= weight.ndim
        if weight.shape[axis] != count:
            return f"{count} scales on axis {axis}, which has {weight.shape[axis]} channels"
    for layer, place in graph.layers_after(node):
        expected = output_axis(layer, None if weight is None else weight.ndim) if place == 1 else None
        if expected is not None and axis != expected:
            return f"scales on axis {axis}; the output channels of {name_of(layer)} are on axis {expected}"
    if axis and graph.version < OPTIONAL_AXIS and all(entry.name != "axis" for entry in node.attribute):
        return f"scales without an axis: axis 0 to {graph.reader}, axis 1 in ONNX"
    return ""


def output_axis(layer: "onnx.NodeProto", rank: int | None) -> int | None:
    """Axis of the output channels in the weight of a layer, where that is known."""
    if layer.op_type == "Gemm":
        return 0 if attribute(layer, "transB", 0) else 1
    if layer.op_type == "MatMul":
        return None if rank is None else rank - 1
    return {"Conv": 0, "ConvTranspose": 1}.get(layer.op_type)


def quantized_biases(graph: Graph) -> Iterator[Finding]:
    """Biases are float."""
    for node in graph.nodes:
        if node.op_type in BIASED and len(node.input) > 2 and graph.quantizers_before(node.input[2]):
            what = "its bias is quantized; the parser takes float biases only"
            remedy = "Quantize with ptq.target=tensorrt, or run the pass trt, which rewrites it."
            yield Finding("quantized-bias", name_of(node), what, remedy)


def quantized_conv1d(graph: Graph) -> Iterator[Finding]:
    """Quantized convolutions are over two axes: over one, the parser parts them from their weight's DQ."""
    for node in graph.nodes:
        quantizers = graph.quantizers_before(node.input[1]) if node.op_type == "Conv" else ()
        weight = graph.tensors.get(quantizers[0].input[0]) if quantizers else None
        if weight is not None and len(weight.dims) == 3:
            what = "a quantized convolution over one axis, which may run in float"
            remedy = "Make it a Conv2d before Q/DQ: the pass optimize does."
            yield Finding("conv1d", name_of(node), what, remedy, "warning")


def parted_weights(graph: Graph) -> Iterator[Finding]:
    """The DQ of a weight stands right before its layer."""
    for node in graph.nodes:
        between = graph.maker(node.input[1], *PARTING) if node.op_type in (*BIASED, "MatMul") else None
        if between is not None and graph.quantizers_before(between.input[0]):
            what = f"{name_of(between)} ({between.op_type}) parts it from the DQ of its weight; it may run in float"
            remedy = f"Put {between.op_type} before Q, or into the stored weight."
            yield Finding("parted-weight", name_of(node), what, remedy, "warning")


def quantized_recurrent(graph: Graph) -> Iterator[Finding]:
    """Recurrent layers have no INT8 form."""
    for node in graph.nodes:
        if node.op_type in RECURRENT and any(graph.quantizers_before(name) for name in node.input[:3]):
            what = f"Q/DQ before {node.op_type}, which runs in FP16 or FP32"
            yield Finding("quantized-recurrent", name_of(node), what, "Leave it in float.", "warning")


def quantized_before_relu(graph: Graph) -> Iterator[Finding]:
    """Q/DQ does not part a layer from its activation, with which it would be one kernel."""
    for node in graph.nodes:
        quantizers = graph.quantizers_before(node.input[0]) if node.op_type == "Relu" else ()
        if len(quantizers) == 2:
            layer = graph.maker(quantizers[0].input[0], *BIASED, "MatMul", "BatchNormalization", "Add")
            if layer is not None:
                what = f"Q/DQ between {name_of(layer)} and {name_of(node)}"
                yield Finding("q-before-relu", name_of(quantizers[0]), what, "Quantize behind the ReLU.", "warning")


def quantized_concats(graph: Graph) -> Iterator[Finding]:
    """Quantized inputs of a concatenation share one scale."""
    for node in graph.nodes:
        before = [graph.quantizers_before(name) for name in node.input] if node.op_type == "Concat" else []
        values = [graph.value(quantizers[-1].input[1]) for quantizers in before if quantizers]
        if len({value.tobytes() for value in values if value is not None}) > 1:
            what = "its inputs are quantized with different scales"
            yield Finding("concat-scales", name_of(node), what, "Leave it in float, or share one scale.", "warning")


RULES: Sequence[Rule] = (
    quantized_types,
    stored_integers,
    zero_points,
    scales,
    scale_axes,
    quantized_biases,
    quantized_conv1d,
    parted_weights,
    quantized_recurrent,
    quantized_before_relu,
    quantized_concats,
)
