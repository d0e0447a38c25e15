"""Explicit quantization (Q/DQ) in ONNX graphs: placing it, and rewriting it for TensorRT."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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
    """
    import onnx
    from onnx import numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    floats: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero_point = tensors[node.input[2]] if len(node.input) > 2 else None
        source = tensors.get(node.input[0])
        if source is not None and source.data_type == onnx.TensorProto.INT32:
            values = numpy_helper.to_array(source) * numpy_helper.to_array(tensors[node.input[1]])
            source.CopyFrom(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
            floats.append(node)
        elif zero_point is not None and zero_point.data_type == onnx.TensorProto.UINT8:
            scale = tensors[node.input[1]]
            zeros = numpy_helper.to_array(zero_point)
            magnitude = largest_magnitude(numpy_helper.to_array(scale), zeros)
            scale.CopyFrom(numpy_helper.from_array(magnitude / np.float32(127), scale.name))
            zero_point.CopyFrom(numpy_helper.from_array(np.zeros(zeros.shape, np.int8), zero_point.name))
    for node in floats:
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    return result


def largest_magnitude(scale: NDArray[np.float32], zero_point: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Largest magnitude that an unsigned 8-bit grid represents, at either end."""
    zero = zero_point.astype(np.float32)
    return (np.maximum(zero, 255 - zero) * scale).astype(np.float32)
