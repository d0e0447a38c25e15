"""What the rules share: making one for an operator, and reading constants, ranks and lengths."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxscript.rewriter.pattern import RewriteRule

Builder: TypeAlias = Any  # onnxscript's tape, which is untyped: op.Relu(x) adds a node and gives its output
Replacement: TypeAlias = Any  # what the tape gave, to stand in a node's place; None where a rule does not apply
Rewrite: TypeAlias = "Callable[[Builder, ir.Node], Replacement]"

POINTWISE = ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "HardSigmoid", "HardSwish", "Softplus", "Sqrt", "Exp")
BROADCASTING = ("Add", "Sub", "Mul", "Div", "Max", "Min")


def at(kinds: Iterable[str], rewrite: Rewrite) -> "list[RewriteRule]":
    """Make rules that offer every operator of these kinds to ``rewrite``, which gives a value in its place or None.

    What it gives must not match again, for new nodes are offered as well. What a replacement leaves without use is
    removed after the sweep, so that a node with other users stays.
    """
    from onnxscript.rewriter.pattern import RewriteRule

    def rule(kind: str) -> RewriteRule:
        def pattern(op: Builder) -> Any:
            return getattr(op, kind)(_allow_other_inputs=True, _outputs=["found"])

        def replace(op: Builder, found: "ir.Value") -> Replacement:
            node = found.producer()
            assert node is not None, "a pattern's output is computed"
            return rewrite(op, node)

        return RewriteRule(pattern, replace, name=rewrite.__name__, remove_nodes=False)

    return [rule(kind) for kind in kinds]


def maker(value: "ir.Value | None", *kinds: str) -> "ir.Node | None":
    """Node that computes a value, if it is of one of these kinds."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in kinds else None


def constant(value: "ir.Value | None") -> NDArray[Any] | None:
    """Content of a value that is known when the graph is loaded."""
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    node = maker(value, "Constant")
    if tensor is None and node is not None and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
    return None if tensor is None else tensor.numpy()


def constants(values: "Iterable[ir.Value | None]") -> list[NDArray[Any]] | None:
    """Contents of all these values, or None if one is not known."""
    found = [constant(value) for value in values]
    return None if any(one is None for one in found) else [one for one in found if one is not None]


def integers(value: "ir.Value | None") -> list[int] | None:
    """Content of a constant list of integers."""
    known = constant(value)
    return None if known is None else [int(number) for number in known.ravel()]


def rank(value: "ir.Value | None") -> int | None:
    """Number of axes, where it is known."""
    known = constant(value)
    if known is not None:
        return known.ndim
    return None if value is None or value.shape is None else value.shape.rank()


def attribute(node: "ir.Node", name: str, default: Any) -> Any:
    """Value of a node's attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def tensor(op: Builder, value: NDArray[Any]) -> "ir.Value":
    """Add a constant."""
    import onnx_ir as ir

    made: ir.Value = op.Constant(value=ir.tensor(np.ascontiguousarray(value)))
    return made


def is_single_frame_conv(conv: "ir.Node") -> bool:
    """Whether a convolution computes each place from the same place alone: kernel 1, stride 1, no padding."""
    sizes = [size for name in ("kernel_shape", "strides") for size in attribute(conv, name, [1])]
    if "kernel_shape" not in conv.attributes:
        weight = constant(conv.inputs[1])
        sizes += [0] if weight is None else weight.shape[2:]
    return all(size == 1 for size in sizes) and not has_padding(conv)


def has_padding(conv: "ir.Node") -> bool:
    """Whether a convolution sees zeros beyond the edges."""
    automatic = attribute(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return automatic or any(attribute(conv, "pads", []))


def keeps_length(conv: "ir.Node") -> bool:
    """Whether a convolution gives as many frames, on the last axis, as it takes."""
    kernel, pads = attribute(conv, "kernel_shape", []), attribute(conv, "pads", [])
    dilation, stride = attribute(conv, "dilations", [1])[-1], attribute(conv, "strides", [1])[-1]
    if not kernel or stride != 1 or attribute(conv, "auto_pad", "NOTSET") != "NOTSET":
        return False
    added = pads[len(pads) // 2 - 1] + pads[-1] if pads else 0
    return bool(added == (kernel[-1] - 1) * dilation)


def same_length(value: "ir.Value | None") -> "ir.Value | None":
    """Earliest value known to have as many frames, on the last axis, so that layers share what is computed of it."""
    node = maker(value, *POINTWISE, "BatchNormalization", "Concat", "Conv")
    if node is None or node.inputs[0] is None:
        return value
    if node.op_type == "Concat" and attribute(node, "axis", None) != 1:
        return value
    if node.op_type == "Conv" and not keeps_length(node):
        return value
    return same_length(node.inputs[0])
