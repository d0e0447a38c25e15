"""Transposes of four axes of which one is 1, written as transposes of three, for which ONNX Runtime is fast.

FSMN-VAD in float took 4.06 ms with the former and 2.99 ms with the latter (version 1.31.1, 300 frames, one thread).
"""

from typing import Any

import onnx
import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet

from compress.quantization.graph import read

SWAP = [0, 3, 2, 1]  # of (batch, 1, frames, channels)


def plain_transposes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Take the axis of length 1 out of transposes between (batch, frames, channels) and (batch, channels, frames, 1).

    Both ways; the function stays the same.
    """
    result = read(model)
    rules = [
        RewriteRule(_add_and_swap, _swap_and_add, _axis_is_first),
        RewriteRule(_swap_and_drop, _drop_and_swap, _axis_is_first),
    ]
    RewriteRuleSet(rules).apply_to_model(result)
    return ir.to_proto(result)


def _add_and_swap(op: Any, x: Any, axes: Any) -> Any:
    return op.Transpose(op.Unsqueeze(x, axes), perm=SWAP)


def _swap_and_add(op: Any, x: ir.Value, axes: ir.Value) -> Any:
    return op.Unsqueeze(op.Transpose(x, perm=[0, 2, 1]), op.Constant(value_ints=[3]))


def _swap_and_drop(op: Any, x: Any, axes: Any) -> Any:
    return op.Squeeze(op.Transpose(x, perm=SWAP), axes)


def _drop_and_swap(op: Any, x: ir.Value, axes: ir.Value) -> Any:
    return op.Transpose(op.Squeeze(x, op.Constant(value_ints=[3])), perm=[0, 2, 1])


def _axis_is_first(context: Any, axes: ir.Value, **_: Any) -> bool:
    """Whether the axis of length 1 is the one behind the batch."""
    return axes.const_value is not None and axes.const_value.numpy().ravel().tolist() == [1]
