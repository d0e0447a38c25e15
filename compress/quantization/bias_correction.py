"""Bias correction: the mean error that rounded weights make is taken out of the bias.

Source: M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, "Data-Free Quantization Through Weight Equalization and
Bias Correction", ICCV 2019, section 4.2, with the means of the inputs from calibration audio.
"""

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from compress.quantization.graph import add_initializer, constant, integer, read, weight_of
from compress.quantization.placement import along, round_weight
from compress.quantization.planning import Plan
from compress.quantization.statistics import Channels


def correct_biases(
    model: onnx.ModelProto, planned: Plan, channels: Mapping[str, Channels], bits: int = 8
) -> onnx.ModelProto:
    """Shift the biases of convolutions and Gemms so that each output channel keeps its mean once weights are rounded.

    A product without a bias, and a layer whose channels are grouped, stay as they are.

    Args:
        model: Float graph.
        planned: Layers to be quantized.
        channels: Of the inputs of these layers.
        bits: Of their weights, 8 or 7.
    """
    result = read(model)
    for number, node in enumerate([node for node in result.graph if node.name in planned.layers]):
        found = weight_of(node)
        assert found is not None, "planned layers have weights"
        if node.op_type == "MatMul" or integer(node, "group", 1) != 1:
            continue
        if node.op_type == "Gemm" and {"alpha", "beta"} & set(node.attributes) and not _is_plain(node):
            continue
        weight, axis = found
        integers, step = round_weight(weight, axis, bits)
        error = weight - integers * along(step, weight.ndim, axis)
        error = np.moveaxis(error, axis, 0).reshape(weight.shape[axis], -1, *weight.shape[2:])
        error = error.reshape(*error.shape[:2], -1).sum(axis=-1, dtype=np.float64)  # over the taps of the kernel
        old = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(weight.shape[axis], np.float32)
        if old is None or old.ndim != 1:
            continue
        shifted = old + error @ channels[str(node.name)].mean
        value = add_initializer(result.graph, f"_corrected{number}", shifted.astype(np.float32))
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, value)
    return ir.to_proto(result)


def _is_plain(node: ir.Node) -> bool:
    return all(node.attributes[name].as_float() == 1.0 for name in ("alpha", "beta") if name in node.attributes)
