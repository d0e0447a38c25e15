"""Cross-layer equalisation: channels that share one scale are brought to like ranges, without changing the function.

Source: M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, "Data-Free Quantization Through Weight Equalization and
Bias Correction", ICCV 2019, section 4.1. There both ranges are those of weights; here the weights have a scale per
output channel, so what is brought in line is the range of the activation, which has one scale, and that of the
weights that read it.
"""

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from compress.quantization.graph import constant, integer, read, result_of
from compress.quantization.placement import along
from compress.quantization.planning import Plan
from compress.quantization.statistics import Channels

LARGEST_FACTOR = 100.0  # beyond it a channel is all but unused


def equalize(model: onnx.ModelProto, planned: Plan, channels: Mapping[str, Channels]) -> tuple[onnx.ModelProto, int]:
    """Scale channels between a convolution or batch norm, a ReLU if there is one, and the convolutions that read it.

    Args:
        model: Float graph.
        planned: Layers to be quantized.
        channels: Of the inputs of these layers.

    Returns:
        A graph of the same function, and how many activations were equalised.
    """
    result = read(model)
    done = 0
    for node in list(result.graph):
        parameters = _parameters(node)
        if parameters is None:
            continue
        readers = _readers(result_of(node))
        seen = [channels[str(reader.name)].largest for reader in readers or () if reader.name in planned.layers]
        if not readers or not seen:
            continue
        columns = [np.abs(_weight(reader)).max(axis=(0, *range(2, _weight(reader).ndim))) for reader in readers]
        factors = _factors(seen[0], np.max(columns, axis=0))
        for parameter in parameters:
            _scale(parameter, 1 / factors, 0)
        for reader in readers:
            assert reader.inputs[1] is not None, "a convolution has a weight"
            _scale(reader.inputs[1], factors, 1)
        done += 1
    return ir.to_proto(result), done


def _factors(activation: NDArray[np.float64], weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """What to divide each channel by: both ranges become their geometric mean. Channels without a range stay."""
    used = (activation > 0) & (weight > 0)
    factors = np.ones(len(activation))
    factors[used] = np.sqrt(activation[used] / weight[used])
    factors[used] /= np.exp(np.log(factors[used]).mean()) if used.any() else 1.0
    return factors.clip(1 / LARGEST_FACTOR, LARGEST_FACTOR)


def _parameters(node: ir.Node) -> list[ir.Value] | None:
    """The constants that scale the channels of what a node gives, if they belong to it alone."""
    if node.op_type not in ("Conv", "BatchNormalization"):
        return None
    values = [value for value in node.inputs[1:3] if value is not None]
    alone = all(constant(value) is not None and len(value.uses()) == 1 for value in values)
    return values if alone and not node.outputs[0].is_graph_output() else None


def _readers(value: ir.Value) -> list[ir.Node] | None:
    """The convolutions that read a value (batch, channels, ...), also through a mean over time; None if others do."""
    if value.is_graph_output() or not value.uses():
        return None
    found: list[ir.Node] = []
    for use in value.uses():
        node = use.node
        if node.op_type == "Conv" and use.idx == 0 and integer(node, "group", 1) == 1:
            if constant(node.inputs[1]) is None or len(node.inputs[1].uses()) != 1:  # type: ignore[union-attr]
                return None
            found.append(node)
        elif node.op_type == "MatMul" and use.idx == 0:  # of the last axis: channels stay apart
            further = _readers(node.outputs[0])
            if further is None:
                return None
            found += further
        else:
            return None
    return found


def _weight(node: ir.Node) -> NDArray[np.float32]:
    weight = constant(node.inputs[1])
    assert weight is not None, "readers have constant weights"
    return weight


def _scale(value: ir.Value, factors: NDArray[np.float64], axis: int) -> None:
    """Multiply a constant along one axis."""
    old = constant(value)
    assert old is not None, "only constants are scaled"
    new = old * along(factors.astype(np.float32), old.ndim, axis)
    value.const_value = ir.tensor(new, name=value.name)
