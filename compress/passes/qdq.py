"""Explicit quantization (Q/DQ) in ONNX graphs: placing it, and rewriting it for TensorRT."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compress.errors import ModelError
from compress.passes.base import Array

if TYPE_CHECKING:
    import onnx

WEIGHTED = ("Conv", "Gemm", "MatMul")  # quantizing more is faster but costs accuracy: cosine 0.979 against 0.9994


class Reader:
    """Feeds calibration features to ONNX Runtime's calibrators, one utterance at a time, of any length."""

    def __init__(self, input_name: str, utterances: Iterator[Array]) -> None:
        self.input_name, self.utterances = input_name, utterances

    def get_next(self) -> dict[str, Array] | None:
        """Give {input: (1, frames, num_mel_bins)}, or None at the end."""
        utterance = next(self.utterances, None)
        return None if utterance is None else {self.input_name: utterance[None]}


def insert_qdq(model: "onnx.ModelProto", utterances: Iterator[Array], reduce_range: bool) -> "onnx.ModelProto":
    """Quantize the inputs and weights of weighted operators: U8 activations, S8 weights per output channel.

    U8 activations are what x86 kernels are fast with; S8 ones leave many convolutions in float. Matrix products
    of two activations (segment pooling) stay in float: an average over time has nothing to gain and much to lose.

    Args:
        model: FP32 graph.
        utterances: Calibration features (frames, num_mel_bins); their extremes give the ranges.
        reduce_range: Use 7-bit weights, against saturation on CPUs without VNNI.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    weights = {tensor.name for tensor in model.graph.initializer}
    unweighted = [n.name for n in model.graph.node if n.op_type == "MatMul" and not weights & set(n.input)]
    with tempfile.TemporaryDirectory() as folder, _no_advice():
        path = Path(folder) / "quantized.onnx"
        quantize_static(
            model,
            str(path),
            Reader(model.graph.input[0].name, utterances),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(WEIGHTED),
            nodes_to_exclude=unweighted,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        quantized = onnx.load(str(path))
    onnx.helper.set_model_props(quantized, {p.key: p.value for p in model.metadata_props})
    del quantized.graph.value_info[:]
    return quantized


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """Silence ONNX Runtime's advice, on the root logger, to fold batch norms first; the export has done it."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def count_quantized(model: "onnx.ModelProto") -> tuple[int, int]:
    """Count the weighted operators whose weight comes from a DequantizeLinear, and all weighted operators."""
    weights = {tensor.name for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}

    def is_weight(name: str) -> bool:
        maker = made_by.get(name)
        return name in weights or (
            maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in weights
        )

    weighted = [n for n in model.graph.node if n.op_type in WEIGHTED and is_weight(n.input[1])]
    return sum(node.input[1] in made_by for node in weighted), len(weighted)


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
