"""A graph in FP16 with FP32 islands, every type written down: what strongly typed builds of TensorRT read."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from compress.lint.graph import attribute
from compress.tensorrt.islands import SIZES, float_values
from compress.tensorrt.opset import at_opset
from compress.tensorrt.qdq import constants_to_initializers

if TYPE_CHECKING:
    import onnx

TYPED_OPSET = 19  # the first with scales in FP16
FP16, FP32 = "FLOAT16", "FLOAT"
# Of ONNX Runtime 1.31.1: it divides biases by scales and rounds the quotients to FP16, in which they become infinite.
FP16_UNSAFE_OPTIMIZERS = ["WeightBiasQuantization"]
SUFFIX = {FP16: "_fp16", FP32: "_fp32"}


def typed(model: "onnx.ModelProto", float_nodes: Collection[str]) -> "onnx.ModelProto":
    """Write an FP32 graph in FP16.

    Casts stand where a node reads a value of the other type, one for each value; none between two FP32 nodes. A
    quantized weight, and an activation that layers of both types read, is dequantized to the type of its layer, for a
    Cast between DQ and layer would part them. Inputs and outputs stay FP32.

    Args:
        model: In FP32, with Q/DQ or without; every node has a name of its own.
        float_nodes: Names of those that stay in FP32.
    """
    result = at_opset(model, TYPED_OPSET)
    constants_to_initializers(result.graph, {name for node in result.graph.node for name in node.input})
    fold_batch_norms(result.graph)
    writer = _Writer(result, float_nodes)
    for node in result.graph.node:
        writer.write(node)
    writer.finish(result.graph)
    return result


def fold_batch_norms(graph: "onnx.GraphProto") -> None:
    """Compute scale and offset of batch norms before they are rounded, in place.

    What is left has mean 0, variance 1 and no epsilon. A variance in FP16 would lose digits or be 0.
    """
    from onnx import helper, numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "BatchNormalization" or not tensors.keys() >= set(node.input[1:5]):
            continue
        values = [numpy_helper.to_array(tensors[name]).astype(np.float64) for name in node.input[1:5]]
        gamma, beta, mean, variance = values
        scale = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        folded = {
            "scale": scale,
            "offset": beta - mean * scale,
            "mean": np.zeros(len(scale)),
            "variance": np.ones(len(scale)),
        }
        for place, (part, value) in enumerate(folded.items(), 1):
            name = f"{node.name}_{part}"
            graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
            node.input[place] = name
        for entry in [entry for entry in node.attribute if entry.name == "epsilon"]:
            node.attribute.remove(entry)
        node.attribute.append(helper.make_attribute("epsilon", 0.0))


class _Writer:
    """Copies nodes one by one, and gives each what it reads in its type."""

    def __init__(self, model: "onnx.ModelProto", float_nodes: Collection[str]) -> None:
        import onnx

        graph = model.graph
        self.float_nodes = float_nodes
        self.floats = float_values(model)
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.weights = {name for name, tensor in self.tensors.items() if tensor.data_type == onnx.TensorProto.FLOAT}
        self.types = {value.name: FP32 for value in graph.input if value.name in self.floats}
        self.scale_types: dict[str, str] = {}  # of what a Q gives
        self.dequantizers: dict[str, onnx.NodeProto] = {}
        self.made: dict[tuple[str, str], str] = {}  # value and type -> the name under which it is there
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def write(self, node: "onnx.NodeProto") -> None:
        """Copy a node; DQ wait until it is known in which type they are read."""
        import onnx

        if node.op_type == "DequantizeLinear":
            self.dequantizers[node.output[0]] = node
            return
        kind = FP32 if node.name in self.float_nodes or not any(map(self.is_float, node.input)) else FP16
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        for place, name in enumerate(node.input):
            if self.is_float(name):  # a size is that of either type
                copied.input[place] = self.wanted(name, self.types.get(name, FP16) if node.op_type in SIZES else kind)
        for entry in copied.attribute:
            if node.op_type == "Cast" and entry.name == "to" and entry.i == onnx.TensorProto.FLOAT:
                entry.i = onnx.TensorProto.DataType.Value(kind)
        if node.op_type == "QuantizeLinear":
            self.scale_types[node.output[0]] = kind
        self.types |= {name: kind for name in node.output if name in self.floats}
        self.nodes.append(copied)

    def is_float(self, name: str) -> bool:
        """Whether a value, or a weight, is a float."""
        return name in self.floats or name in self.weights

    def wanted(self, name: str, kind: str) -> str:
        """Name of a float value in this type; made at the first use."""
        if (name, kind) not in self.made:
            self.made[name, kind] = self.make(name, kind)
        return self.made[name, kind]

    def make(self, name: str, kind: str) -> str:
        """Bring a value to a type: round a weight, dequantize, or cast."""
        import onnx
        from onnx import helper, numpy_helper

        if name in self.dequantizers:
            return self.dequantize(self.dequantizers[name], kind)
        if name not in self.weights and self.types[name] == kind:
            return name
        other = name + SUFFIX[kind]
        if name not in self.weights:
            to = onnx.TensorProto.DataType.Value(kind)
            self.nodes.append(helper.make_node("Cast", [name], [other], f"{name}_to{SUFFIX[kind]}", to=to))
            return other
        if kind == FP32:
            return name
        value = numpy_helper.to_array(self.tensors[name]).astype(np.float16)
        self.constants.append(numpy_helper.from_array(value, other))
        return other

    def dequantize(self, node: "onnx.NodeProto", kind: str) -> str:
        """A DQ that gives this type, with the scale that its Q has."""
        import onnx
        from onnx import numpy_helper

        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        scale = node.input[1]
        if kind == FP32 and self.scale_types.get(node.input[0]) == FP16:
            value = numpy_helper.to_array(self.tensors[scale]).astype(np.float16).astype(np.float32)
            copied.input[1] = f"{scale}_rounded"
            if (scale, "rounded") not in self.made:
                self.made[scale, "rounded"] = copied.input[1]
                self.constants.append(numpy_helper.from_array(value, copied.input[1]))
        else:
            copied.input[1] = self.wanted(scale, kind)
        copied.name, copied.output[0] = (name + SUFFIX[kind] for name in (node.name, node.output[0]))
        self.nodes.append(copied)
        return str(copied.output[0])

    def finish(self, graph: "onnx.GraphProto") -> None:
        """Cast the outputs to FP32 under their own names, and put everything into the graph."""
        import onnx
        from onnx import helper

        for value in graph.output:
            if value.name not in self.floats:
                continue
            if value.name in self.dequantizers:
                made = self.wanted(value.name, FP32)
                self.nodes.append(helper.make_node("Identity", [made], [value.name], f"{value.name}_out"))
            elif self.types[value.name] == FP16:
                inner = value.name + SUFFIX[FP16]
                for node in self.nodes:
                    for names in (node.input, node.output):
                        names[:] = [inner if name == value.name else name for name in names]
                to = onnx.TensorProto.FLOAT
                self.nodes.append(helper.make_node("Cast", [inner], [value.name], f"{value.name}_out", to=to))
        read = {name for node in self.nodes for name in node.input} | {value.name for value in graph.output}
        kept = [tensor for tensor in (*graph.initializer, *self.constants) if tensor.name in read]
        nodes = list(self.nodes)
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(nodes)
        graph.initializer.extend(kept)
