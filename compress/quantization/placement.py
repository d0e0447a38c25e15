"""Explicit quantization: Q/DQ around the operators of a plan, with given ranges, and weights in INT8."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from compress.calibration import Range
from compress.quantization.graph import (
    Array,
    add_initializer,
    constant,
    leaves_the_graph,
    read,
    result_of,
    source,
    weight_of,
)
from compress.quantization.planning import Plan, activations, residual_inputs
from compress.quantization.scheme import Scheme

LARGEST_BIAS = 2**30  # in steps, half of what S32 holds
SMALLEST_STEP = 1e-12
STEP_OF_ZEROS = 2.0**-14  # of a channel whose weights are all zero: any will do, and FP16 has this one


class Grid(NamedTuple):
    """The 8-bit grid of an activation: value = (integer - zero point) * step."""

    step: np.float32
    zero_point: np.uint8 | np.int8


def grid_of(low: float, high: float, symmetric: bool) -> Grid:
    """Lay 256 levels over a range that is widened to hold 0, or 255 symmetric ones.

    Args:
        low: Lower end.
        high: Upper end.
        symmetric: S8 with zero point 0, otherwise U8.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return Grid(np.float32(max(-low, high) / 127 or 1.0), np.int8(0))
    step = np.float32((high - low) / 255 or 1.0)
    return Grid(step, np.uint8(np.clip(np.rint(-low / step), 0, 255)))


def round_weight(
    weight: Array, axis: int, bits: int = 8, least_step: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.int8], Array]:
    """Round a weight to signed integers, with one step for each output channel.

    Args:
        weight: Of a layer.
        axis: Of its output channels.
        bits: 8, or 7 against saturation on CPUs without VNNI.
        least_step: For each output channel, where a bias needs one.

    Returns:
        Integers of the weight's shape, and the step of each output channel.
    """
    levels = {8: 127, 7: 64}[bits]
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others)
    step = np.maximum(np.where(largest > 0, largest / levels, STEP_OF_ZEROS), SMALLEST_STEP)
    step = np.maximum(step, 0 if least_step is None else least_step).astype(np.float32)
    integers = np.rint(weight / along(step, weight.ndim, axis)).clip(-levels, levels)
    return integers.astype(np.int8), step


def along(vector: Array, ndim: int, axis: int) -> Array:
    """Shape a vector so that it is broadcast over all axes but one."""
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])


def quantize(
    model: onnx.ModelProto, planned: Plan, ranges: Mapping[str, Range], scheme: Scheme, bits: int = 8
) -> onnx.ModelProto:
    """Put Q/DQ around the operators of a plan.

    Args:
        model: Float graph.
        planned: What to quantize; LSTMs are left to :mod:`compress.quantization.recurrent`.
        ranges: Of every tensor that :func:`compress.quantization.planning.tensors` names.
        scheme: Of the target.
        bits: Of weights, 8 or 7.
    """
    result = read(model)
    writer = _Writer(result.graph, ranges, scheme, bits)
    chosen = [node for node in result.graph if node.name in planned.layers]
    joining = [node for node in result.graph if node.name in planned.joining]
    skips = residual_inputs(result.graph, planned.layers) if scheme.skips else {}
    results = [result_of(node) for node in chosen if node.op_type in scheme.quantized_results]
    for value in (*results, *(result_of(node) for node in joining)):
        writer.quantize_result(value)
    for node in chosen:
        writer.quantize_input(node, 0)
        writer.quantize_weight(node)
    for node in joining:
        for index, given in enumerate(node.inputs):
            if given in activations(node):
                writer.quantize_input(node, index)
    for node, index in skips.items():
        writer.quantize_input(node, index)
    RemoveUnusedNodesPass()(result)
    return ir.to_proto(result)


class _Writer:
    """Adds quantizers to a graph; equal ones are made once."""

    def __init__(self, graph: ir.Graph, ranges: Mapping[str, Range], scheme: Scheme, bits: int) -> None:
        self.graph, self.ranges, self.scheme, self.bits = graph, ranges, scheme, bits
        self.constants: dict[tuple[str, bytes], ir.Value] = {}
        self.quantized: dict[ir.Value, ir.Value] = {}
        self.weights: dict[tuple[ir.Value, int], tuple[ir.Value, Array]] = {}
        self.made = 0

    def quantize_result(self, value: ir.Value) -> None:
        """Give every user of a layer's result the quantized one: the runtime then never makes the float one."""
        if leaves_the_graph(value):  # an embedding of 8 bits would be a worse one
            return
        uses = list(value.uses())
        replacement = self.quantize_value(value)
        for use in uses:
            use.node.replace_input_with(use.idx, replacement)

    def quantize_input(self, node: ir.Node, index: int) -> None:
        """Give one input of a node Q/DQ, unless it has."""
        value = node.inputs[index]
        assert value is not None, "activations are no omitted inputs"
        producer = value.producer()
        if producer is None or producer.op_type != "DequantizeLinear":
            node.replace_input_with(index, self.quantize_value(value))

    def quantize_value(self, value: ir.Value) -> ir.Value:
        """Put Q and DQ behind a value."""
        if value not in self.quantized:
            grid = self.grid(value)
            parameters = [self.constant(np.asarray(number)) for number in grid]
            quantize = self.node("QuantizeLinear", [value, *parameters])
            dequantize = self.node("DequantizeLinear", [quantize.outputs[0], *parameters])
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], [quantize, dequantize])
            else:
                self.graph.insert_after(producer, [quantize, dequantize])
            self.quantized[value] = dequantize.outputs[0]
        return self.quantized[value]

    def grid(self, value: ir.Value) -> Grid:
        """The grid of a value; one that is moved only keeps the grid it has."""
        found = self.ranges[str(source(value).name)]
        return grid_of(found.low, found.high, self.scheme.symmetric)

    def quantize_weight(self, node: ir.Node) -> None:
        """Store the weight of a layer as S8, and its bias as S32 if the target wants that."""
        found = weight_of(node)
        assert found is not None, "planned layers have weights"
        (weight, axis), original = found, node.inputs[1]
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 and self.scheme.int_bias else None
        assert original is not None
        assert node.inputs[0] is not None
        input_step = np.float64(self.grid(node.inputs[0]).step)
        if bias is None:
            dequantized, _ = self.weight(original, weight, axis, None)
            node.replace_input_with(1, dequantized)
            return
        factor = node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0
        gain = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0
        if bias.ndim != 1 or factor != 1.0 or gain != 1.0:  # a Gemm that is not plainly weight times input plus bias
            dequantized, _ = self.weight(original, weight, axis, None)
            node.replace_input_with(1, dequantized)
            return
        dequantized, step = self.weight(original, weight, axis, np.abs(bias) / (input_step * LARGEST_BIAS))
        node.replace_input_with(1, dequantized)
        bias_step = (step * input_step).astype(np.float32)
        integers = np.rint(bias / bias_step.astype(np.float64)).astype(np.int32)
        made = self.node(
            "DequantizeLinear", [self.constant(integers), self.constant(bias_step)], attributes={"axis": 0}
        )
        self.graph.insert_before(node, made)
        node.replace_input_with(2, made.outputs[0])

    def weight(
        self, original: ir.Value, weight: Array, axis: int, least_step: NDArray[np.float64] | None
    ) -> tuple[ir.Value, Array]:
        """The DQ of a weight; layers that share a weight without bias share it."""
        key = (original, axis)
        if key in self.weights and least_step is None:
            return self.weights[key]
        integers, step = round_weight(weight, axis, self.bits, least_step)
        inputs = [self.constant(integers), self.constant(step)]
        if self.scheme.weight_zero_points:
            inputs.append(self.constant(np.zeros(len(step), np.int8)))
        made = self.node("DequantizeLinear", inputs, attributes={"axis": axis})
        self.graph.insert_before(self.graph[0], made)
        self.weights[key] = made.outputs[0], step
        return self.weights[key]

    def constant(self, values: np.ndarray) -> ir.Value:
        """An initializer with these values; equal ones are one."""
        key = (f"{values.dtype}{values.shape}", values.tobytes())
        if key not in self.constants:
            self.constants[key] = add_initializer(self.graph, self.name("c"), values)
        return self.constants[key]

    def node(self, kind: str, inputs: list[ir.Value], attributes: Mapping[str, int] | None = None) -> ir.Node:
        """A node with one result."""
        made = ir.node(kind, inputs, attributes=dict(attributes or {}), name=self.name("n"))
        made.outputs[0].name = self.name("v")
        return made

    def name(self, prefix: str) -> str:
        """A short name that nothing else has."""
        self.made += 1
        return f"_{prefix}{self.made:x}"
