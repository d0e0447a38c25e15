"""Making OpenVINO's IR of an ONNX graph: two files, no larger than they must be."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compress import openvino_file
from compress.openvino_file import GRAPH, INFO, WEIGHTS

if TYPE_CHECKING:
    import onnx
    import openvino

Array = NDArray[np.float32]


def convert(data: bytes, told: Mapping[str, str], half: bool) -> tuple[bytes, bytes]:
    """Convert a serialized ONNX graph; the result depends on nothing else.

    Args:
        data: With its metadata, which the IR takes over.
        told: Notes for the runner, put beside the metadata.
        half: Store weights as FP16, which is finer than the BF16 they are computed in.

    Returns:
        Graph and weights of the IR.

    Raises:
        ModelError: If OpenVINO has no equivalent for an operator.
    """
    import onnx
    import openvino

    model = onnx.load_from_string(data)
    metadata = {entry.key: entry.value for entry in model.metadata_props} | dict(told)
    metadata.pop("threshold", None)  # it was fitted on the ONNX graph's scores
    biases_as_additions(model)
    network = openvino_file.read_network(model.SerializeToString(), b"")
    join_quantizers(network)
    shape_constants(network)
    for key, value in sorted(metadata.items()):
        network.set_rt_info(value, [INFO, key])
    number_names(network)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / GRAPH
        openvino.save_model(network, path, compress_to_fp16=half)
        return without_spaces(path.read_bytes()), path.with_name(WEIGHTS).read_bytes()


def biases_as_additions(model: "onnx.ModelProto") -> None:
    """Make the bias of every convolution an addition after it, in place.

    OpenVINO reads a bias as a small graph that shapes it at run time. That doubles the network, and in quantized
    networks with a dynamic number of frames OpenVINO 2026.4.1 then computes wrongly (cosine 0.4 on CAM++).
    """
    import onnx
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}

    def value(name: str) -> Array | None:
        """A float constant, or a quantized one in float."""
        if name in tensors:
            return numpy_helper.to_array(tensors[name])
        maker = made_by.get(name)
        if maker is None or maker.op_type != "DequantizeLinear" or not tensors.keys() >= set(maker.input):
            return None
        numbers, scale, *zero = (numpy_helper.to_array(tensors[part]).astype(np.float32) for part in maker.input)
        return (numbers - (zero[0] if zero else 0)) * scale if scale.size in (1, numbers.size) else None

    def rank(name: str) -> int | None:
        """Of a weight, which may be quantized."""
        maker = made_by.get(name)
        source = maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else name
        return len(tensors[source].dims) if source in tensors else None

    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "Conv" or len(node.input) < 3 or not node.input[2]:
            continue
        bias, axes = value(node.input[2]), rank(node.input[1])
        if bias is None or axes is None:
            continue
        result, name = node.output[0], f"{node.output[0]}_bias"
        model.graph.initializer.append(numpy_helper.from_array(bias.reshape(-1, *[1] * (axes - 2)), name))
        del node.input[2]
        node.output[0] = f"{result}_without_bias"
        nodes.append(onnx.helper.make_node("Add", [node.output[0], name], [result], f"{node.name}_bias"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def number_names(network: "openvino.Model") -> None:
    """Name anew what OpenVINO named by a counter of the process, so that the same graph gives the same file."""
    for number, operator in enumerate(network.get_ordered_ops()):
        kind = operator.get_type_name()
        name = operator.get_friendly_name()
        if name.startswith(f"{kind}_") and name.removeprefix(f"{kind}_").isdecimal():
            operator.set_friendly_name(f"{kind}_{number}")


def join_quantizers(network: "openvino.Model") -> None:
    """Make one FakeQuantize of what ONNX's QuantizeLinear and DequantizeLinear become, in place.

    OpenVINO reads the pair as FakeQuantize to whole numbers, two conversions, a subtraction and a multiplication. One
    FakeQuantize to the values themselves is the same network, computed by the same kernels, in half the operators.
    """
    from openvino import opset13

    constants: dict[bytes, openvino.Node] = {}

    def constant(value: Array) -> "openvino.Node":
        """One for all of the same value."""
        return constants.setdefault(value.tobytes(), opset13.constant(value))

    for quantizer in network.get_ordered_ops():
        if quantizer.get_type_name() != "FakeQuantize":
            continue
        levels = [constant_of(quantizer.input_value(port)) for port in (3, 4)]
        for whole in consumers(quantizer, "Convert"):
            for values in consumers(whole, "Convert"):
                (step, *others) = consumers(values)
                zero: Array | None = np.zeros((), np.float32)
                if step.get_type_name() == "Subtract" and not others:
                    zero = constant_of(step.input_value(1))
                    (step, *others) = consumers(step)
                scale = constant_of(step.input_value(1)) if step.get_type_name() == "Multiply" else None
                found = [value for value in (*levels, zero, scale) if value is not None and value.size == 1]
                if others or len(found) < 4:
                    continue
                low, high, offset, factor = (value.reshape(()) for value in found)
                ends = [constant(np.asarray((end - offset) * factor, np.float32)) for end in (low, high)]
                inputs = [quantizer.input_value(port) for port in range(3)]
                joined = opset13.fake_quantize(*inputs, *ends, quantizer.get_attributes()["levels"])
                for target in list(step.output(0).get_target_inputs()):
                    target.replace_source_output(joined.output(0))


def consumers(node: "openvino.Node", kind: str | None = None) -> "list[openvino.Node]":
    """The operators that take the first output of one, of one type only if that is given."""
    found = [target.get_node() for target in node.output(0).get_target_inputs()]
    return [node for node in found if kind is None or node.get_type_name() == kind]


def constant_of(output: "openvino.Output") -> Array | None:
    """The value of a constant, which may be converted or shaped on its way; None if it is no constant."""
    node = output.get_node()
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return np.asarray(node.get_data(), np.float32) if node.get_type_name() == "Constant" else None


def shape_constants(network: "openvino.Model") -> None:
    """Store constants in the shape that they are brought to, such as the scales of weights, in place."""
    from openvino import opset13

    for reshape in network.get_ordered_ops():
        source = reshape.input_value(0).get_node() if reshape.get_type_name() == "Reshape" else None
        if source is None or source.get_type_name() != "Constant" or reshape.get_output_partial_shape(0).is_dynamic:
            continue
        shaped = opset13.constant(source.get_data().reshape(tuple(reshape.get_output_shape(0))))
        for target in list(reshape.output(0).get_target_inputs()):
            target.replace_source_output(shaped.output(0))


def without_spaces(graph: bytes) -> bytes:
    """An IR's XML without indentation, which is a fifth of it."""
    return re.sub(rb">\s+<", b"><", graph)
