"""Making the file of a graph small without changing what it computes."""

import itertools
import string

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    DeduplicateInitializersPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

LETTERS = string.ascii_letters


def slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """Share equal constants, drop what nothing uses, and shorten the names of values inside the graph.

    The names of inputs, outputs and of operators other than Q and DQ stay, and so does the metadata of the file.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)  # renaming reaches through to the given graph otherwise
    result = ir.from_proto(copied)
    for each in (DeduplicateInitializersPass(size_limit=2**20), RemoveUnusedNodesPass(), RemoveUnusedOpsetsPass()):
        each(result)
    properties = dict(result.metadata_props)
    ClearMetadataAndDocStringPass()(result)
    result.metadata_props.update(properties)
    if not any(node.attributes and _has_graph(node) for node in result.graph):
        _shorten_names(result.graph)
    slimmed = ir.to_proto(result)
    del slimmed.graph.value_info[:]
    return slimmed


def _shorten_names(graph: ir.Graph) -> None:
    ends = {value.name for value in (*graph.inputs, *graph.outputs)}
    values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    inner = [value for value in values if value.name and value.name not in ends]
    for number, value in enumerate(inner):
        value.name = f"renamed {number}"  # so that no new name meets an old one
    fresh = (name for number in itertools.count() if (name := short_name(number)) not in ends)
    for value in inner:
        value.name = next(fresh)
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.name = None


def _has_graph(node: ir.Node) -> bool:
    """Whether a node holds a graph, whose values may have any names."""
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def short_name(number: int) -> str:
    """The name of that number, counting in letters: a, b, ..., z, ba, bb, ..."""
    number, last = divmod(number, len(LETTERS))
    return (short_name(number) if number else "") + LETTERS[last]
