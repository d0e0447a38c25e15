"""Rules on the types and sizes of numbers."""

from collections.abc import Iterator, Sequence

import numpy as np

from compress.lint.graph import Finding, Graph, Rule, Version, attribute, name_of, type_name

LARGEST_FP16 = 65504.0
NATIVE_INT64: Version = (9, 0)
STRONG_TYPING: Version = (11, 0)  # from here on, always
TYPES = (
    *("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT32", "INT64", "INT8", "UINT8", "BOOL"),
    *("INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"),
)


def data_types(graph: Graph) -> Iterator[Finding]:
    """Tensors are of types that TensorRT has, and none is float64, which it takes for float32."""
    for name, kind in typed_values(graph):
        if kind == "DOUBLE":
            what = "it is float64, which is read as float32"
            yield Finding("float64", name, what, "Make it float32, and compare the results.", "warning")
        elif kind not in TYPES:
            what = f"it is {kind}, a type that TensorRT does not have"
            yield Finding("data-type", name, what, "Cast it to FLOAT, FLOAT16, INT32, INT64 or BOOL.")


def typed_values(graph: Graph) -> Iterator[tuple[str, str]]:
    """Inputs, constants and results of casts, with their types."""
    for value in graph.inputs:
        yield value.name, type_name(value.type.tensor_type.elem_type)
    for name, tensor in graph.tensors.items():
        yield name, type_name(tensor.data_type)
    for node in graph.nodes:
        if node.op_type == "Cast":
            yield name_of(node), type_name(attribute(node, "to", 1))


def int64_range(graph: Graph) -> Iterator[Finding]:
    """INT64 constants fit into INT32, to which they were cut before TensorRT 9."""
    limits = np.iinfo(np.int32)
    for name in graph.tensors if graph.version < NATIVE_INT64 else ():
        value = graph.value(name)
        if value is None or value.dtype != np.int64:
            continue
        beyond = value[(value < limits.min) | (value > limits.max)]
        if beyond.size and not is_slice_end(graph, name):
            what = f"it holds {beyond.flat[0]}; {graph.reader} cuts INT64 to the range of INT32"
            yield Finding("int64-range", name, what, "Keep its numbers within INT32.")


def is_slice_end(graph: Graph, name: str) -> bool:
    """Whether a constant only tells where a Slice starts or ends, which is cut to the axis anyway."""
    users = graph.users.get(name, [])
    return bool(users) and all(node.op_type == "Slice" and place in (1, 2) for node, place in users)


def fp16_range(graph: Graph) -> Iterator[Finding]:
    """Weights are within the range of FP16, to which the builder clips them."""
    if is_typed(graph):
        return  # it tells itself what is FP16
    for name in graph.tensors:
        value = graph.value(name)
        if value is None or value.dtype != np.float32:
            continue
        beyond = value[np.isfinite(value) & (np.abs(value) > LARGEST_FP16)]
        if beyond.size:
            readers = ", ".join(name_of(node) for node, _ in graph.users.get(name, []))
            what = f"it holds {beyond.flat[0]:g}, read by {readers or 'no node'}; FP16 ends at {LARGEST_FP16:g}"
            yield Finding("fp16-range", name, what, "Scale it down, or keep its layer in FP32.", "warning")


def is_typed(graph: Graph) -> bool:
    """Whether a graph tells itself what runs in FP16."""
    return bool({"FLOAT16", "BFLOAT16"} & {kind for _, kind in typed_values(graph)})


def fp32_only(graph: Graph) -> Iterator[Finding]:
    """A graph for strong typing tells what runs in FP16."""
    if graph.version >= STRONG_TYPING and not is_typed(graph):
        what = f"every number in it is FP32, and {graph.reader} computes in the types of the graph alone"
        yield Finding("fp32-only", graph.name, what, "Give it the typed form: the pass trt writes both.", "warning")


RULES: Sequence[Rule] = (data_types, int64_range, fp16_range, fp32_only)
