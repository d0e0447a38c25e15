"""Batch norms folded into the weights before or after them.

Before a batch norm stand a convolution or a Gemm; those are onnxscript's own rules. After it may stand a convolution
without padding or a Gemm: with padding the fold would be wrong at the edges, where zeros would get the offset too.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.rewriting.matching import (
    Builder,
    Replacement,
    at,
    attribute,
    constants,
    has_padding,
    integers,
    maker,
    rank,
    tensor,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxscript.rewriter.pattern import RewriteRule


def batch_norm_rules() -> "list[RewriteRule]":
    """Rules that remove batch norms."""
    from onnxscript.rewriter.rules.common import fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_gemm_rule

    return [
        fuse_batchnorm_into_conv_rule,
        fuse_batchnorm_into_gemm_rule,
        *at(["Conv"], into_next_conv),
        *at(["Gemm"], into_next_gemm),
    ]


def gemm_rules() -> "list[RewriteRule]":
    """Rules that write a convolution of one frame as what it is."""
    return at(["Squeeze"], conv_as_gemm)


def affine(batch_norm: "ir.Node") -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Scale and offset per channel of a batch norm with constant statistics."""
    known = constants(batch_norm.inputs[1:])
    if known is None or len(known) != 4 or attribute(batch_norm, "training_mode", 0):
        return None
    gamma, beta, mean, variance = (values.astype(np.float64) for values in known)
    scale = gamma / np.sqrt(variance + attribute(batch_norm, "epsilon", 1e-5))
    return scale, beta - mean * scale


def conv_as_gemm(op: Builder, squeeze: "ir.Node") -> Replacement:
    """Squeeze(Conv(Unsqueeze(x))) of one frame -> Gemm(x), which a batch norm can be folded into."""
    conv = maker(squeeze.inputs[0], "Conv")
    unsqueeze = maker(conv.inputs[0], "Unsqueeze") if conv is not None else None
    if conv is None or unsqueeze is None or rank(unsqueeze.inputs[0]) != 2:
        return None
    axes = [integers(node.inputs[1]) if len(node.inputs) > 1 else None for node in (squeeze, unsqueeze)]
    known = constants(conv.inputs[1:])
    if any(axis not in ([2], [-1]) for axis in axes) or known is None or attribute(conv, "group", 1) != 1:
        return None
    if known[0].shape[2:] != (1,) or has_padding(conv):
        return None
    return op.Gemm(unsqueeze.inputs[0], tensor(op, known[0][:, :, 0]), *map_tensors(op, known[1:]), transB=1)


def into_next_conv(op: Builder, conv: "ir.Node") -> Replacement:
    """Conv(BatchNormalization(x)) -> Conv(x), without padding."""
    folded = _folded(conv) if not has_padding(conv) and attribute(conv, "group", 1) == 1 else None
    if folded is None:
        return None
    batch_norm, (scale, offset), (weight, bias) = folded
    channels = (1, -1, *[1] * (weight.ndim - 2))
    shift = (weight * offset.reshape(channels)).sum(axis=tuple(range(1, weight.ndim)))
    arrays = [(weight * scale.reshape(channels)), bias + shift]
    return op.Conv(batch_norm.inputs[0], *map_tensors(op, arrays), **conv.attributes)


def into_next_gemm(op: Builder, gemm: "ir.Node") -> Replacement:
    """Gemm(BatchNormalization(x)) -> Gemm(x)."""
    plain = all(attribute(gemm, name, default) == default for name, default in (("alpha", 1.0), ("beta", 1.0)))
    folded = _folded(gemm) if plain and not attribute(gemm, "transA", 0) else None
    if folded is None:
        return None
    batch_norm, (scale, offset), (weight, bias) = folded
    inward = weight if attribute(gemm, "transB", 0) else weight.T  # (outputs, inputs)
    arrays = [inward * scale, bias + inward @ offset]
    return op.Gemm(batch_norm.inputs[0], *map_tensors(op, arrays), transB=1)


def _folded(node: "ir.Node") -> Any:
    """Batch norm before a node, its scale and offset, and the node's weight and bias, all in float64."""
    batch_norm = maker(node.inputs[0], "BatchNormalization")
    known = constants(node.inputs[1:])
    if batch_norm is None or known is None or (parameters := affine(batch_norm)) is None:
        return None
    weight, *bias = (array.astype(np.float64) for array in known)
    return batch_norm, parameters, (weight, bias[0] if bias else 0.0)


def map_tensors(op: Builder, arrays: list[NDArray[Any]]) -> "list[ir.Value]":
    """Add constants in float32."""
    return [tensor(op, array.astype(np.float32)) for array in arrays]
