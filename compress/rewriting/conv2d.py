"""Conv1d as Conv2d over an axis of one row, which ONNX Runtime computes with its blocked kernels.

A convolution of (batch, channels, frames) becomes one of (batch, channels, 1, frames) between an Unsqueeze and a
Squeeze. The Squeeze then moves behind whatever follows, where it meets the next Unsqueeze and both go. So a chain of
layers is entered once and left once.
"""

from typing import TYPE_CHECKING, Any

from compress.rewriting.matching import (
    BROADCASTING,
    POINTWISE,
    Builder,
    Replacement,
    at,
    attribute,
    integers,
    maker,
    rank,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxscript.rewriter.pattern import RewriteRule

ROW = 2  # the axis of one row


def conv2d_rules() -> "list[RewriteRule]":
    """Rules for one sweep from the input to the output."""
    moved = (*POINTWISE, *BROADCASTING, "BatchNormalization", "Concat", "MatMul")
    return [*at(["Conv"], conv_over_a_row), *at(["Unsqueeze"], cancel), *at(moved, squeeze_later)]


def conv_over_a_row(op: Builder, conv: "ir.Node") -> Replacement:
    """Conv1d(x) -> Squeeze(Conv2d(Unsqueeze(x)))."""
    x, weight, *bias = conv.inputs
    if rank(weight) != 3:
        return None
    attributes: dict[str, Any] = dict(conv.attributes)
    for name in ("kernel_shape", "strides", "dilations"):
        if name in conv.attributes:
            attributes[name] = [1, *attribute(conv, name, [])]
    if "pads" in conv.attributes:
        before, after = attribute(conv, "pads", [])
        attributes["pads"] = [0, before, 0, after]
    row = op.Constant(value_ints=[ROW])
    return op.Squeeze(op.Conv(op.Unsqueeze(x, row), op.Unsqueeze(weight, row), *bias, **attributes), row)


def cancel(op: Builder, unsqueeze: "ir.Node") -> Replacement:
    """Unsqueeze(Squeeze(x)) -> x."""
    row = before_squeeze(unsqueeze.inputs[0])
    return op.Identity(row) if row is not None and is_of_the_row(unsqueeze) else None


def squeeze_later(op: Builder, node: "ir.Node") -> Replacement:
    """f(Squeeze(x), y) -> Squeeze(f(x, Unsqueeze(y)))."""
    rows = [before_squeeze(value) for value in node.inputs]
    if all(row is None for row in rows):
        return None
    if node.op_type == "Concat" and attribute(node, "axis", None) not in (1, -2):
        return None
    inputs: list[ir.Value | None]
    if node.op_type in (*BROADCASTING, "Concat"):
        if any(row is None and rank(value) not in (0, 1, 2, 3) for value, row in zip(node.inputs, rows, strict=True)):
            return None
        inputs = [with_row(op, value) if row is None else row for value, row in zip(node.inputs, rows, strict=True)]
    else:
        if rows[0] is None or (node.op_type == "MatMul" and rank(node.inputs[1]) != 2):
            return None
        inputs = [rows[0], *node.inputs[1:]]
    attributes = {**node.attributes, "axis": 1} if node.op_type == "Concat" else node.attributes
    return op.Squeeze(getattr(op, node.op_type)(*inputs, **attributes), op.Constant(value_ints=[ROW]))


def with_row(op: Builder, value: "ir.Value | None") -> Replacement:
    """Give a value of at most three axes that of the row; axes align from the last, so one axis or none stays."""
    axes = rank(value) or 0
    return op.Unsqueeze(value, op.Constant(value_ints=[axes - 1])) if axes > 1 else value


def before_squeeze(value: "ir.Value | None") -> "ir.Value | None":
    """Input of the Squeeze of the row that makes a value."""
    node = maker(value, "Squeeze")
    return node.inputs[0] if node is not None and rank(value) == 3 and is_of_the_row(node) else None


def is_of_the_row(node: "ir.Node") -> bool:
    """Whether the axis that a Squeeze removes, or an Unsqueeze adds, is the third of four."""
    return len(node.inputs) > 1 and integers(node.inputs[1]) in ([ROW], [-2])
