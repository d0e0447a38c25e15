"""Segment pooling: means over segments of frames, and their spreading over the frames of each segment.

Exporters write it in many ways. All are brought to one form first: an average pooling whose windows reach beyond the
end, and a Gather that repeats a segment's value. An average pooling with ceil_mode does not stay: ONNX Runtime's
quantized kernel divides a short last window by the whole kernel, and OpenVINO refuses fewer frames than a segment.
What follows per frame and is the same for all frames of a segment is then computed once per segment.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compress.rewriting.matching import (
    POINTWISE,
    Builder,
    Replacement,
    at,
    attribute,
    constant,
    integers,
    is_single_frame_conv,
    maker,
    rank,
    same_length,
    tensor,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxscript.rewriter.pattern import RewriteRule

PROBES = (1, 7, 99, 100, 101, 199, 200, 201, 345, 402, 1003)  # frames that tell which matrix a graph computes


@dataclass(frozen=True)
class PoolMatrix:
    """A (frames, segments) matrix of segment means, plus the mean over all frames if ``with_mean``."""

    segment_frames: int
    with_mean: bool


@dataclass(frozen=True)
class SpreadMatrix:
    """A (segments, frames) matrix of ones where a frame is of a segment."""

    segment_frames: int


def pooling_rules(matrices: Mapping[str, PoolMatrix | SpreadMatrix]) -> "list[RewriteRule]":
    """Rules that bring every form of segment pooling to AveragePool and Gather.

    Args:
        matrices: What the computed right-hand sides of matrix products are, by name; see :func:`find_matrices`.
    """
    pooled: list[ir.Value | None] = []  # inputs of the pooling: as many frames as a spread matrix has

    def pool_by_matrix(op: Builder, product: "ir.Node") -> Replacement:
        """MatMul(x, means) -> AveragePool(x) + ReduceMean(x)."""
        x, right = product.inputs
        matrix = matrices.get(name_of(right))
        if not isinstance(matrix, PoolMatrix) or rank(x) not in (3, 4):
            return None
        pooled.append(same_length(x))
        means = average_pool(op, x, matrix.segment_frames)
        if not matrix.with_mean:
            return means
        return op.Add(means, op.ReduceMean(x, op.Constant(value_ints=[-1]), keepdims=1))

    def spread_by_matrix(op: Builder, product: "ir.Node") -> Replacement:
        """MatMul(x, ones) -> Gather(x)."""
        x, right = product.inputs
        matrix = matrices.get(name_of(right))
        axes = rank(x)
        if not isinstance(matrix, SpreadMatrix) or not pooled or axes not in (3, 4):
            return None
        return op.Gather(x, segment_of_each(op, frames_of(op, pooled[0]), matrix.segment_frames), axis=axes - 1)

    return [
        *at(["MatMul"], pool_by_matrix),
        *at(["MatMul"], spread_by_matrix),
        *at(["AveragePool"], pool_beyond_the_end),
        *at(["Slice"], spread_by_expansion),
    ]


def pool_beyond_the_end(op: Builder, pool: "ir.Node") -> Replacement:
    """AveragePool with ceil_mode -> AveragePool with padding that is not counted."""
    kernel, stride = attribute(pool, "kernel_shape", []), attribute(pool, "strides", [1])
    if len(kernel) != 1 or list(kernel) != list(stride) or not attribute(pool, "ceil_mode", 0):
        return None
    if any(attribute(pool, "pads", [])) or attribute(pool, "auto_pad", "NOTSET") != "NOTSET":
        return None
    return average_pool(op, pool.inputs[0], kernel[0])


def spread_by_expansion(op: Builder, slice: "ir.Node") -> Replacement:
    """Slice(Reshape(Expand(Unsqueeze(x)))) -> Gather(x)."""
    if len(slice.inputs) < 4 or integers(slice.inputs[1]) != [0] or integers(slice.inputs[3]) not in ([2], [-1]):
        return None
    if len(slice.inputs) > 4 and integers(slice.inputs[4]) != [1]:
        return None
    reshape = maker(slice.inputs[0], "Reshape")
    expand = maker(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = maker(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if expand is None or unsqueeze is None or rank(unsqueeze.inputs[0]) != 3 or rank(slice.inputs[0]) != 3:
        return None
    repeats = last_of(expand.inputs[1])
    if integers(unsqueeze.inputs[1]) not in ([3], [-1]) or repeats is None:
        return None
    end = slice.inputs[2]
    if constant(end) is not None:
        return None
    return op.Gather(unsqueeze.inputs[0], segment_of_each(op, op.Squeeze(end), repeats), axis=2)


def last_of(shape: "ir.Value | None") -> int | None:
    """Last number of a shape, where it is constant and more than 1."""
    known = integers(shape)
    joined = maker(shape, "Concat")
    if known is None and joined is not None:
        known = integers(joined.inputs[-1])
    return known[-1] if known and known[-1] > 1 else None


def context_rules() -> "list[RewriteRule]":
    """Rules that move the Gather behind what can be computed once per segment."""
    return at((*POINTWISE, "Conv", "BatchNormalization", "Add", "Mul"), spread_later)


def spread_later(op: Builder, node: "ir.Node") -> Replacement:
    """f(Gather(x)) -> Gather(f(x)), where f treats every frame alike."""
    spreads = [spread_of(value) for value in node.inputs]
    found = next((spread for spread in spreads if spread is not None), None)
    if found is None or (node.op_type == "Conv" and not is_single_frame_conv(node)):
        return None
    inputs = list(node.inputs)
    for i, (value, spread) in enumerate(zip(node.inputs, spreads, strict=True)):
        if spread is not None:
            if spread.inputs[1] is not found.inputs[1]:
                return None
            inputs[i] = spread.inputs[0]
        elif node.op_type in ("Add", "Mul") and not is_one_frame(value):
            return None
    return op.Gather(getattr(op, node.op_type)(*inputs, **node.attributes), found.inputs[1], **found.attributes)


def spread_of(value: "ir.Value | None") -> "ir.Node | None":
    """Gather that repeats values along the frames, which are the last axis."""
    gather = maker(value, "Gather")
    if gather is None or attribute(gather, "axis", 0) not in (2, 3) or index_parts(gather.inputs[1]) is None:
        return None
    return gather


def is_one_frame(value: "ir.Value | None") -> bool:
    """Whether a value is the same for all frames: a last axis of 1."""
    known = constant(value)
    if known is not None:
        return known.ndim == 0 or known.shape[-1] == 1
    return value is not None and value.shape is not None and rank(value) in (2, 3, 4) and value.shape[-1] == 1


def matrix_rules() -> "list[RewriteRule]":
    """Rules that write pooling and spreading as matrix products, for which ONNX Runtime has the faster kernels."""
    return [*at(["Add"], mean_into_matrix), *at(["AveragePool"], pool_as_product), *at(["Gather"], spread_as_product)]


def mean_into_matrix(op: Builder, add: "ir.Node") -> Replacement:
    """AveragePool(x) + ReduceMean(x) -> MatMul(x, means)."""
    pool = pool_beside_mean(add)
    return None if pool is None else op.MatMul(pool.inputs[0], pool_matrix(op, pool, with_mean=True))


def pool_as_product(op: Builder, pool: "ir.Node") -> Replacement:
    """AveragePool(x) -> MatMul(x, means), unless the mean over all frames is to come along."""
    sums = [user for user, _ in pool.outputs[0].uses() if user.op_type == "Add"]
    if not is_segment_pool(pool) or any(pool_beside_mean(add) is not None for add in sums):
        return None
    return op.MatMul(pool.inputs[0], pool_matrix(op, pool, with_mean=False))


def pool_beside_mean(add: "ir.Node") -> "ir.Node | None":
    """Segment pooling of a sum of it and the mean over all frames of the same value."""
    for one, other in (add.inputs, add.inputs[::-1]):
        pool, mean = maker(one, "AveragePool"), maker(other, "ReduceMean")
        if pool is None or mean is None or pool.inputs[0] is not mean.inputs[0] or not is_segment_pool(pool):
            continue
        last = len(attribute(pool, "kernel_shape", [])) + 1
        if len(mean.inputs) > 1 and integers(mean.inputs[1]) in ([last], [-1]) and attribute(mean, "keepdims", 1):
            return pool
    return None


def spread_as_product(op: Builder, gather: "ir.Node") -> Replacement:
    """Gather(x) -> MatMul(x, ones)."""
    if spread_of(gather.outputs[0]) is None:
        return None
    parts = index_parts(gather.inputs[1])
    assert parts is not None, "spread_of has looked"
    return op.MatMul(gather.inputs[0], op.Transpose(membership(op, *parts), perm=[1, 0]))


def is_segment_pool(pool: "ir.Node") -> bool:
    """Whether an average pooling is one that :func:`average_pool` writes."""
    kernel, pads = list(attribute(pool, "kernel_shape", [])), list(attribute(pool, "pads", []))
    return (
        set(kernel[:-1]) <= {1}
        and list(attribute(pool, "strides", [])) == kernel
        and pads == [*[0] * (2 * len(kernel) - 1), kernel[-1] - 1]
        and not attribute(pool, "ceil_mode", 0)
        and not attribute(pool, "count_include_pad", 0)
    )


def name_of(value: "ir.Value | None") -> str:
    """Name of a value; none has an empty one."""
    return (value.name if value is not None else None) or ""


def average_pool(op: Builder, x: "ir.Value | None", segment_frames: int) -> Replacement:
    """Means over segments of (batch, channels, [1,] frames), the last one over the frames that it has."""
    kernel = (1, segment_frames) if rank(x) == 4 else (segment_frames,)
    pads = (*[0] * (2 * len(kernel) - 1), segment_frames - 1)
    return op.AveragePool(x, kernel_shape=kernel, strides=kernel, pads=pads)


def frames_of(op: Builder, x: "ir.Value | None") -> Replacement:
    """Length of the last axis, a scalar."""
    return op.Squeeze(op.Shape(x, start=-1))


def segment_of_each(op: Builder, frames: "ir.Value", segment_frames: int) -> Replacement:
    """Index of the segment of every frame."""
    zero, one = (tensor(op, np.array(value, np.int64)) for value in (0, 1))
    return op.Div(op.Range(zero, frames, one), tensor(op, np.array(segment_frames, np.int64)))


def index_parts(index: "ir.Value | None") -> "tuple[ir.Value, int] | None":
    """Number of frames and segment length that :func:`segment_of_each` was given."""
    divide = maker(index, "Div")
    steps = maker(divide.inputs[0], "Range") if divide is not None else None
    if divide is None or steps is None or steps.inputs[1] is None:
        return None
    length = integers(divide.inputs[1])
    simple = integers(steps.inputs[0]) == [0] and integers(steps.inputs[2]) == [1]
    return (steps.inputs[1], length[0]) if simple and length and len(length) == 1 and length[0] > 0 else None


def membership(op: Builder, frames: "ir.Value", segment_frames: int) -> Replacement:
    """Matrix (frames, segments) of ones where a frame is of a segment."""
    import onnx_ir as ir

    zero, one, last, length = (
        tensor(op, np.array(value, np.int64)) for value in (0, 1, segment_frames - 1, segment_frames)
    )
    segments = op.Range(zero, op.Div(op.Add(frames, last), length), one)
    rows = op.Unsqueeze(segment_of_each(op, frames, segment_frames), op.Constant(value_ints=[1]))
    return op.Cast(op.Equal(rows, segments), to=ir.DataType.FLOAT)


def pool_matrix(op: Builder, pool: "ir.Node", with_mean: bool) -> Replacement:
    """Matrix (frames, segments) by which the product gives the means of a pooling."""
    import onnx_ir as ir

    frames = frames_of(op, same_length(pool.inputs[0]))
    member = membership(op, frames, attribute(pool, "kernel_shape", [])[-1])
    made = op.Div(member, op.ReduceSum(member, op.Constant(value_ints=[0]), keepdims=1))
    if with_mean:
        made = op.Add(made, op.Reciprocal(op.Cast(frames, to=ir.DataType.FLOAT)))
    return made


def find_matrices(values: Mapping[str, list[NDArray[np.float32]]]) -> dict[str, PoolMatrix | SpreadMatrix]:
    """Recognise the matrices of segment pooling by what they are at several numbers of frames.

    Args:
        values: By name, the matrix at each number of frames that was tried.
    """
    found: dict[str, PoolMatrix | SpreadMatrix] = {}
    for name, matrices in values.items():
        longest = max(matrices, key=lambda matrix: matrix.size)
        for spread in (False, True):
            member = longest.T if spread else longest
            if member.ndim != 2 or member.shape[0] <= member.shape[1] or member.shape[1] < 3:
                continue
            length = int((member[:, 0] == member[0, 0]).sum())
            kinds = [SpreadMatrix(length)] if spread else [PoolMatrix(length, True), PoolMatrix(length, False)]
            for kind in kinds:
                if all(_equal(matrix, kind) for matrix in matrices):
                    found[name] = kind
    return found


def _equal(matrix: NDArray[np.float32], kind: PoolMatrix | SpreadMatrix) -> bool:
    """Whether a matrix is that of this kind for its number of frames."""
    frames = matrix.shape[1 if isinstance(kind, SpreadMatrix) else 0]
    segments = -(-frames // kind.segment_frames)
    member = (np.arange(frames)[:, None] // kind.segment_frames == np.arange(segments)).astype(np.float64)
    if isinstance(kind, SpreadMatrix):
        expected = member.T
    else:
        expected = member / member.sum(0) + (1 / frames if kind.with_mean else 0)
    return matrix.shape == expected.shape and np.allclose(matrix, expected, rtol=1e-5, atol=1e-9)
