"""Which operators of a graph become INT8, and why the others do not."""

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from compress.errors import SettingError
from compress.quantization.graph import WEIGHTED, Array, constant, integer, layers, read, result_of, source, weight_of
from compress.quantization.scheme import Scheme

LSTM = "LSTM"
RECURRENT = (LSTM, "GRU", "RNN")
JOINING = ("Add", "Concat", "Mul", "AveragePool")  # operators without weights; each moves the embeddings
OPERATORS = ("Conv", "Gemm", "MatMul", LSTM, *JOINING)
STATISTICS = ("ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare", "GlobalAveragePool", "Sqrt", "Pow", "Softmax")
GATES = ("Sigmoid", "HardSigmoid", "Softmax", "Tanh")


@dataclass(frozen=True)
class Plan:
    """What is to be quantized.

    Attributes:
        layers: Names of Conv, Gemm and MatMul with constant weights.
        joining: Names of operators without weights, where they were asked for.
        recurrent: Names of LSTMs, whose weights become INT8 and whose activations are scaled as they come.
        kept: Operators left in float that one could have thought of -> why.
    """

    layers: tuple[str, ...]
    joining: tuple[str, ...]
    recurrent: tuple[str, ...]
    kept: Mapping[str, str]

    def without(self, names: Collection[str], why: str) -> "Plan":
        """Leave further operators in float."""
        return Plan(
            tuple(name for name in self.layers if name not in names),
            tuple(name for name in self.joining if name not in names),
            tuple(name for name in self.recurrent if name not in names),
            {**self.kept, **dict.fromkeys(names, why)},
        )


def plan(
    model: onnx.ModelProto,
    scheme: Scheme,
    operators: Collection[str],
    keep: Collection[str] = (),
    setting: str = "keep",
) -> Plan:
    """Choose what becomes INT8, by type, by name and by rules.

    Args:
        model: Float graph.
        scheme: Of the target.
        operators: Types to quantize, of ``OPERATORS``.
        keep: Names of nodes, weights or operator types to leave in float, with ``*`` and ``?``.
        setting: Named where one of ``keep`` fits nothing.

    Raises:
        SettingError: If a pattern of ``keep`` fits nothing.
        ModelError: If the opset is too old.
    """
    graph = read(model).graph
    kept: dict[str, str] = {}
    chosen: dict[str, list[str]] = {"layers": [], "joining": [], "recurrent": []}
    unused = set(keep)
    for node in graph:
        name = str(node.name)
        kind = _kind(node)
        if kind is None:
            continue
        fitting = {pattern for pattern in keep if any(fnmatch.fnmatchcase(n, pattern) for n in _names(node))}
        unused -= fitting
        why = _why_not(node, kind, scheme, operators)
        if fitting:
            kept[name] = f"{setting}={min(fitting)}"
        elif why:
            kept[name] = why
        elif node.op_type in operators:
            chosen[kind].append(name)
    if unused:
        known = ", ".join(sorted({str(node.name) for node in layers(graph)})[:5])
        raise SettingError(f"{setting}: '{min(unused)}' fits no operator of the graph. Some there are: {known}.")
    return Plan(tuple(chosen["layers"]), tuple(chosen["joining"]), tuple(chosen["recurrent"]), kept)


def tensors(model: onnx.ModelProto, planned: Plan, scheme: Scheme) -> list[str]:
    """Names of the activations whose ranges a plan needs."""
    graph = read(model).graph
    names: dict[str, None] = {}
    skips = residual_inputs(graph, planned.layers) if scheme.skips else {}
    for node in graph:
        if node in skips:
            given = node.inputs[skips[node]]
            assert given is not None, "an addition has two inputs"
            names[str(source(given).name)] = None
        if node.name in planned.layers:
            assert node.inputs[0] is not None, "a layer has an input"
            found = [source(node.inputs[0])]
            if node.op_type in scheme.quantized_results:
                found.append(source(result_of(node)))
        elif node.name in planned.joining:
            found = [source(value) for value in activations(node)] + [source(result_of(node))]
        else:
            continue
        names.update(dict.fromkeys(str(value.name) for value in found))
    return list(names)


def activations(node: ir.Node) -> list[ir.Value]:
    """Inputs of a node that are no constants."""
    return [value for value in node.inputs if value is not None and value.const_value is None]


def residual_inputs(graph: Iterable[ir.Node], layers: Collection[str]) -> dict[ir.Node, int]:
    """Residual additions, and which of their inputs is the skip.

    The other is the result of a convolution that alone it serves, for then both are one kernel, if the skip is
    INT8 as well. Where both are, the skip is the smaller convolution, which brings the input of a block to its width.

    Args:
        graph: Its nodes.
        layers: Names of those that are quantized.
    """
    found = {}
    for node in graph:
        if node.op_type == "Add" and len(activations(node)) == 2:
            weights = [_weights_of_conv(value, layers) for value in node.inputs]
            if max(weights) > 0:
                found[node] = 0 if weights[0] < weights[1] else 1
    return found


def _weights_of_conv(value: ir.Value | None, layers: Collection[str]) -> int:
    """Weights per output channel of the quantized convolution whose result serves one node alone; 0 of all else."""
    conv = value.producer() if value is not None else None
    if value is None or conv is None or conv.op_type != "Conv" or conv.name not in layers:
        return 0
    if value.is_graph_output() or sum(is_read(use.node) for use in value.uses()) > 1:
        return 0
    weight = conv.inputs[1]
    dequantizer = weight.producer() if weight is not None else None
    stored = weight if dequantizer is None else dequantizer.inputs[0]
    assert stored is not None, "a quantized convolution has a weight"
    return 0 if stored.shape is None else int(np.prod(stored.shape.numpy()[1:]))


def is_read(node: ir.Node) -> bool:
    """Whether what a node gives is used, and not by Q/DQ alone that leads nowhere."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return True
    return any(value.is_graph_output() or any(is_read(use.node) for use in value.uses()) for value in node.outputs)


def _kind(node: ir.Node) -> str | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == LSTM:
        return "recurrent"
    if node.op_type in JOINING:
        return "joining"
    return "layers" if node.op_type in ("Conv", "Gemm", "MatMul") else None


def _names(node: ir.Node) -> list[str]:
    """What a user may call a node by: its name, its type, or its weight without the suffix."""
    weights = [value.name or "" for value in node.inputs[1:] if value is not None and value.const_value is not None]
    return [str(node.name), node.op_type, *(name.removesuffix(".weight") for name in weights), *weights]


def _why_not(node: ir.Node, kind: str, scheme: Scheme, operators: Collection[str]) -> str | None:
    """The rule by which an operator stays in float; None if there is none."""
    if kind == "recurrent":
        return None if scheme.dynamic_lstm else "the target has no INT8 LSTM"
    if kind == "joining":
        return _why_not_joined(node) if node.op_type in operators else None
    found = weight_of(node)
    if found is None:
        return "no constant weight: a product of two activations, as pooling over segments and attention are"
    weight, _ = found
    if node.op_type == "MatMul" and is_pooling(weight):
        return "segment pooling"
    if node.op_type == "Conv" and weight.shape[1] == 1 and integer(node, "group", 1) == 1:
        return "one input channel: as fast in float, and closer"
    return no_gain_on_tensor_cores(node, weight.shape) if scheme.tensor_cores else None


def no_gain_on_tensor_cores(node: ir.Node, weight_shape: Sequence[int]) -> str | None:
    """Why a layer gains nothing by INT8 where dense products alone do; None if it may gain."""
    if node.op_type == "Conv" and weight_shape[1] == 1:
        return "depthwise: INT8 is seldom faster there"
    if not _leads_to_a_layer(node):
        return "the last layer: small, and closer in float"
    return None


def _leads_to_a_layer(node: ir.Node) -> bool:
    """Whether a layer comes behind a node."""
    ahead, seen = [node], {node}
    while ahead:
        for user in {use.node for value in ahead.pop().outputs for use in value.uses()} - seen:
            if user.op_type in (*WEIGHTED, "ConvTranspose", *RECURRENT):
                return True
            ahead.append(user)
            seen.add(user)
    return False


def _why_not_joined(node: ir.Node) -> str | None:
    values = activations(node)
    makers = {maker.op_type for value in values if (maker := source(value).producer()) is not None}
    takers = {use.node.op_type for use in node.outputs[0].uses()}
    if node.op_type == "AveragePool":
        # ONNX Runtime 1.31.1 divides a short last window of the quantized form by the whole kernel.
        return "segment pooling with ceil_mode" if integer(node, "ceil_mode", 0) else None
    if node.op_type == "Mul" and (makers & set(GATES) or len(set(values)) < len(values)):
        return "a gate" if makers & set(GATES) else "statistics pooling"
    if (makers | takers) & set(STATISTICS):
        return "statistics pooling"
    # Also integers: lengths are added and concatenated too.
    return None if all(_is_float(value) for value in values) and values else "not known to be float"


def _is_float(value: ir.Value) -> bool:
    """Whether a value is known to be float: by its type, or by the operator that makes it."""
    origin = source(value)
    if origin.dtype is not None:
        return origin.dtype == ir.DataType.FLOAT
    maker = origin.producer()
    if maker is None:
        return False
    if maker.op_type in JOINING:
        return any(constant(v) is not None for v in maker.inputs) or all(map(_is_float, activations(maker)))
    return maker.op_type in ("Conv", "Gemm", "Relu", "BatchNormalization", "Sigmoid", "AveragePool") or (
        weight_of(maker) is not None
    )


def is_pooling(weight: Array) -> bool:
    """Whether a matrix takes means over its input: no negative entry, and columns that sum to 1."""
    return bool((weight >= 0).all() and np.allclose(weight.sum(axis=-2), 1, atol=1e-4))
