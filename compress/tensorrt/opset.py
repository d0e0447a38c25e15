"""Bringing graphs to opset 17, the newest that TensorRT 8.5 and 8.6 read."""

from typing import TYPE_CHECKING

from compress.errors import ModelError
from compress.lint.graph import DEFAULT_VERSION, Graph, attribute, name_of

if TYPE_CHECKING:
    import onnx

PORTABLE_OPSET = 17
NEW_IN_18 = ("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad", "Col2Im", "GroupNormalization")
AXES_IN_18 = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"),
    "ReduceSumSquare",
)


def at_opset(model: "onnx.ModelProto", version: int) -> "onnx.ModelProto":
    """Convert a graph, which is not changed, to another opset.

    Raises:
        ModelError: If an operator has no form at that opset that computes the same.
    """
    import onnx
    from onnx import version_converter

    own = Graph(model, {}, DEFAULT_VERSION).opset
    result = onnx.ModelProto()
    result.CopyFrom(model)
    # The converter has no way down for Pad and Split of opset 18, and of reductions it leaves attributes behind.
    stops = [PORTABLE_OPSET + 1, PORTABLE_OPSET] if own > PORTABLE_OPSET >= version else [version]
    for stop in stops:
        if stop == PORTABLE_OPSET and len(stops) == 2:
            below_18(result)
        elif stop != own:
            try:
                result = version_converter.convert_version(result, stop)
            except Exception as error:  # an assertion of its native code, or a check of the result
                reason = str(error).splitlines()[0].rpartition("failed: ")[2]
                raise ModelError(f"the graph cannot be converted from opset {own} to {stop}: {reason}.") from error
    result.ir_version = onnx.helper.find_min_ir_version_for(result.opset_import, ignore_unknown=True)
    return result


def below_18(model: "onnx.ModelProto") -> None:
    """Write the operators of opset 18 as opset 17 has them, in place."""
    from onnx import helper

    graph = Graph(model, {}, DEFAULT_VERSION)
    for node in graph.nodes:
        kind = node.op_type
        if kind in NEW_IN_18:
            raise refusal(node, "it is new in opset 18")
        if kind in AXES_IN_18:
            axes = graph.value(node.input[1]) if len(node.input) > 1 and node.input[1] else None
            if (axes is None and len(node.input) > 1 and node.input[1]) or attribute(node, "noop_with_empty_axes", 0):
                raise refusal(node, "its axes are computed, or it may do nothing")
            drop(node, "noop_with_empty_axes")
            if axes is not None:
                node.attribute.append(helper.make_attribute("axes", [int(axis) for axis in axes.ravel()]))
            del node.input[1:]
        elif kind == "Split":
            drop(node, "num_outputs")  # without it, the parts are equal too, or the size does not divide
        elif kind == "Pad" and len(node.input) > 3 and node.input[3]:
            raise refusal(node, "it pads named axes")
        elif kind in ("ScatterElements", "ScatterND") and attribute(node, "reduction", b"none") in (b"max", b"min"):
            raise refusal(node, "its reduction is new in opset 18")
        elif kind == "Resize" and {entry.name for entry in node.attribute} & {
            "antialias",
            "axes",
            "keep_aspect_ratio_policy",
        }:
            raise refusal(node, "it has attributes of opset 18")
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = PORTABLE_OPSET


def drop(node: "onnx.NodeProto", name: str) -> None:
    """Remove an attribute."""
    for entry in [entry for entry in node.attribute if entry.name == name]:
        node.attribute.remove(entry)


def refusal(node: "onnx.NodeProto", why: str) -> ModelError:
    """An error that names a node."""
    return ModelError(f"{name_of(node)} ({node.op_type}) has no form at opset {PORTABLE_OPSET}: {why}.")
