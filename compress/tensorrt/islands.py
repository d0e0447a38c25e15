"""Which nodes have to run in FP32 when the rest of a graph runs in FP16, and why.

Sums over time, squares and roots leave the range of FP16 or lose digits in it: NVIDIA/TensorRT#1954, #3101 and
microsoft/onnxruntime#13639.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from compress.errors import ModelError
from compress.lint.graph import DEFAULT_VERSION, QUANTIZERS, Graph, graphs_in
from compress.lint.quantization import LEAST_FP16_SCALE
from compress.lint.tensors import LARGEST_FP16
from compress.onnx_file import open_session

if TYPE_CHECKING:
    import onnx

Array: TypeAlias = NDArray[np.float32]

MAX_FRAMES = 300  # of an input: all values are held at once, 0.35 MB a frame in CAM++
MARGIN = 4.0  # other audio may give larger values than those that were seen
_STATISTICS = """
    CumSum Exp GlobalAveragePool GlobalLpPool GroupNormalization InstanceNormalization LayerNormalization Log LogSoftmax
    LpNormalization LpPool MeanVarianceNormalization Pow RMSNormalization Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMean ReduceProd ReduceSum ReduceSumSquare Softmax Sqrt
"""
_BETWEEN = """
    Abs Add Cast Clip Concat Div Expand Flatten Identity Max Min Mul Neg Relu Reshape Slice Squeeze Sub Transpose
    Unsqueeze Where
"""
STATISTICS = frozenset(_STATISTICS.split())
BETWEEN = frozenset(_BETWEEN.split())  # what may stand between two of them; not what multiplies by weights
SIZES = ("Shape", "Size")  # they read no number
ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Clip", "Pow", "Where")

STATISTIC = "sums, squares and roots lose digits in FP16"
LENGTH = "computed from the number of frames, and FP16 has not all numbers beyond 2048"
RESIZE = "its sizes are FP32"


def islands(model: "onnx.ModelProto", features: Sequence[Array] = ()) -> dict[str, str]:
    """Find what has to stay in FP32.

    Args:
        model: In FP32, with Q/DQ or without; every node has a name of its own.
        features: Inputs, (batch, frames, num_mel_bins) each, on whose first frames it is run to see how large values
            become.

    Returns:
        Names of nodes -> why, in the order of the graph.

    Raises:
        ModelError: If the graph has branches or loops, or values of an unknown type.
    """
    graph = Graph(model, {}, DEFAULT_VERSION)
    for node in graph.nodes:
        if graphs_in(node):
            raise ModelError(
                f"{node.name or node.op_type} holds a graph; branches and loops are not supported in FP16."
            )
    floats = float_values(model)
    ranges = ranges_of(model, sorted(floats), features) if features else {}
    rules = (statistics(graph), lengths(graph), constants(graph), small_scales(graph), large_values(graph, ranges))
    found: dict[str, str] = {}
    for name, why in (pair for rule in rules for pair in rule):
        found.setdefault(name, why)
    return {
        node.name: found[node.name]
        for node in graph.nodes
        if node.name in found
        and node.op_type not in SIZES
        and any(name in floats for name in (*node.input, *node.output))
    }


def float_values(model: "onnx.ModelProto") -> set[str]:
    """Names of the FP32 values that are computed or given, not of weights.

    Raises:
        ModelError: If the type of a value is not known.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    for node in model.graph.node:
        for name in node.output:
            if name and not kinds.get(name):
                raise ModelError(f"the type of '{name}', made by {node.name or node.op_type}, is not known.")
    weights = {tensor.name for tensor in model.graph.initializer}
    kinds |= {v.name: v.type.tensor_type.elem_type for v in model.graph.input if v.name not in weights}
    return {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT}


def ranges_of(model: "onnx.ModelProto", names: Sequence[str], features: Sequence[Array]) -> Mapping[str, float]:
    """Run a graph and see how large values become: name -> largest magnitude, infinite where one is NaN."""
    import onnx

    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    given = {value.name for value in model.graph.input}
    wanted = [name for name in names if name not in given]
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in wanted)
    session = open_session(probed.SerializeToString(), 1)
    input_name = session.get_inputs()[0].name
    largest = dict.fromkeys([input_name, *wanted], 0.0)
    for utterance in features:
        batch = utterance[:, :MAX_FRAMES]
        values = [batch, *session.run(None, {input_name: batch})]
        for name, value in zip(largest, values, strict=True):
            peak = float(np.abs(value).max(initial=0.0))
            largest[name] = max(largest[name], peak if np.isfinite(peak) else float("inf"))
    return largest


def statistics(graph: Graph) -> Iterator[tuple[str, str]]:
    """Means, squares, roots and softmax, what lies between two of them, and divisions by what they give."""
    seeds = {node.name for node in graph.nodes if node.op_type in STATISTICS or is_square(node)}
    after: set[str] = set()  # cheap nodes that come from a seed through such nodes only
    divided: list[onnx.NodeProto] = []
    for node in graph.nodes:
        sources = [graph.makers[name] for name in node.input if name in graph.makers]
        if node.op_type in BETWEEN and any(s.name in seeds or s.name in after for s in sources):
            after.add(node.name)
            divisor = graph.makers.get(node.input[-1])
            if node.op_type == "Div" and divisor is not None and (divisor.name in seeds or divisor.name in after):
                divided.append(node)
    joined = set(seeds) | {node.name for node in divided}
    for node in reversed(graph.nodes):  # back from what is joined, so far as it comes from a seed
        readers = {reader.name for name in node.output for reader, _ in graph.users.get(name, [])}
        if node.name in after and readers & joined:
            joined.add(node.name)
    yield from ((node.name, STATISTIC) for node in graph.nodes if node.name in joined)


def is_square(node: "onnx.NodeProto") -> bool:
    """Whether a node multiplies a value by itself."""
    return node.op_type == "Mul" and node.input[0] == node.input[1]


def lengths(graph: Graph) -> Iterator[tuple[str, str]]:
    """What is computed from sizes alone, and resizing, whose sizes are FP32."""
    of_sizes = set(graph.tensors)
    for node in graph.nodes:
        if node.op_type in (*SIZES, "Constant") or all(name in of_sizes for name in node.input if name):
            of_sizes.update(node.output)
            if node.op_type not in (*QUANTIZERS, "Constant"):
                yield node.name, LENGTH
        elif node.op_type in ("Resize", "Upsample"):
            yield node.name, RESIZE


def constants(graph: Graph) -> Iterator[tuple[str, str]]:
    """Constants that FP16 does not have: what it has no exponent for, and what would become 0 where it is added."""
    for node in graph.nodes:
        for name in node.input:
            value = graph.value(name) if name in graph.tensors else None
            if value is None or value.dtype != np.float32:
                continue
            beyond = value[np.abs(value) > LARGEST_FP16]
            if beyond.size:
                yield node.name, f"its constant {beyond.flat[0]:g} is beyond FP16"
            elif node.op_type in ELEMENTWISE:
                lost = value[(value != 0) & (value.astype(np.float16) == 0)]
                if lost.size:
                    yield node.name, f"its constant {lost.flat[0]:g} is 0 in FP16"


def small_scales(graph: Graph) -> Iterator[tuple[str, str]]:
    """Q/DQ with scales that lose digits in FP16, and the layers that read it."""
    for node in graph.quantizers():
        scale = graph.value(node.input[1])
        if scale is not None and scale.size and scale.min() < LEAST_FP16_SCALE:
            why = f"a scale of {scale.min():.2g} loses digits in FP16"
            yield node.name, why
            yield from ((layer.name, why) for layer, _ in graph.layers_after(node))


def large_values(graph: Graph, ranges: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Nodes that read or make values near the end of FP16 or beyond."""
    for node in graph.nodes:
        peak = max((ranges.get(name, 0.0) for name in (*node.input, *node.output)), default=0.0)
        if peak * MARGIN > LARGEST_FP16:
            yield (
                node.name,
                f"values up to {peak:.3g}; FP16 ends at {LARGEST_FP16:g}, and {MARGIN:g} times is kept free",
            )
