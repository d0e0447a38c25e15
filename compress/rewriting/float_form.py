"""Forms that are faster where the graph stays in floating point, and of no use or harmful before INT8.

For INT8 a batch norm before an activation has to stay: it equalises the ranges of the channels that one activation
scale covers.
"""

from typing import TYPE_CHECKING

import numpy as np

from compress.rewriting.batch_norm import affine, map_tensors
from compress.rewriting.matching import (
    Builder,
    Replacement,
    at,
    attribute,
    constant,
    constants,
    has_padding,
    maker,
    rank,
    tensor,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxscript.rewriter.pattern import RewriteRule


def block_rules() -> "list[RewriteRule]":
    """Rules that keep a chain of Conv2d in ONNX Runtime's blocked layout."""
    return [*at(["BatchNormalization"], batch_norm_as_conv), *at(["Concat"], enter_blocks_before_concat)]


def max_rules() -> "list[RewriteRule]":
    """Rules that fold a batch norm around its ReLU."""
    return at(["Conv"], batch_norm_as_max)


def batch_norm_as_conv(op: Builder, batch_norm: "ir.Node") -> Replacement:
    """BatchNormalization(x) -> Conv(x) per channel, which takes the ReLU with it and reads the blocked layout."""
    parameters = affine(batch_norm)
    convs = [user for relu in users(batch_norm) if relu.op_type == "Relu" for user in users(relu)]
    if parameters is None or not any(is_conv2d(conv) for conv in convs):
        return None
    scale, offset = parameters
    weights = map_tensors(op, [scale.reshape(-1, 1, 1, 1), offset])
    return op.Conv(batch_norm.inputs[0], *weights, group=len(scale), kernel_shape=(1, 1))


def enter_blocks_before_concat(op: Builder, concat: "ir.Node") -> Replacement:
    """Concat(x, Mul(Conv(y), z)) -> Concat(x, Conv(Mul(Conv(y), z))) with weights of 1.

    ONNX Runtime has no blocked product of two shapes, so its result, and with it the concatenation, would be in the
    plain layout and be brought to blocks again by each layer that reads it.
    """
    if attribute(concat, "axis", None) != 1:
        return None
    inputs = list(concat.inputs)
    for i, value in enumerate(inputs):
        product = maker(value, "Mul")
        conv = next((c for v in product.inputs if (c := maker(v, "Conv")) is not None), None) if product else None
        weight = constant(conv.inputs[1]) if conv is not None and is_conv2d(conv) else None
        if weight is not None:
            ones = tensor(op, np.ones((weight.shape[0], 1, 1, 1), np.float32))
            inputs[i] = op.Conv(value, ones, group=weight.shape[0], kernel_shape=(1, 1))
    return op.Concat(*inputs, axis=1) if inputs != list(concat.inputs) else None


def is_conv2d(node: "ir.Node") -> bool:
    """Whether a node is a convolution over two axes."""
    return node.op_type == "Conv" and rank(node.inputs[1]) == 4


def users(node: "ir.Node") -> "list[ir.Node]":
    """Nodes that read the output of a node."""
    return [user for user, _ in node.outputs[0].uses()]


def batch_norm_as_max(op: Builder, conv: "ir.Node") -> Replacement:
    """Conv(Relu(BatchNormalization(x))) -> Conv(Max(x, t)), for positive scales s and no padding.

    relu(s x + b) = s (max(x, t) - t) with t = -b / s; s and t go into the weights.
    """
    relu = maker(conv.inputs[0], "Relu")
    batch_norm = maker(relu.inputs[0], "BatchNormalization") if relu is not None else None
    parameters = affine(batch_norm) if batch_norm is not None else None
    known = constants(conv.inputs[1:])
    if batch_norm is None or parameters is None or known is None:
        return None
    scale, offset = parameters
    if has_padding(conv) or attribute(conv, "group", 1) != 1 or scale.min() <= 0:
        return None
    weight, *bias = (array.astype(np.float64) for array in known)
    threshold = -offset / scale
    channels = (-1, *[1] * (weight.ndim - 2))
    scaled = weight * scale.reshape(channels)
    shift = (scaled * threshold.reshape(channels)).sum(axis=tuple(range(1, weight.ndim)))
    thresholds, *weights = map_tensors(op, [threshold.reshape(channels), scaled, (bias[0] if bias else 0.0) - shift])
    return op.Conv(op.Max(batch_norm.inputs[0], thresholds), *weights, **conv.attributes)
