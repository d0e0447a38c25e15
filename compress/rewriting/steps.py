"""Applying the rules step by step, each step compared with the graph before it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from compress.errors import ModelError
from compress.onnx_file import open_session
from compress.rewriting.batch_norm import batch_norm_rules, gemm_rules
from compress.rewriting.conv2d import conv2d_rules
from compress.rewriting.float_form import block_rules, max_rules
from compress.rewriting.segments import PROBES, context_rules, find_matrices, matrix_rules, pooling_rules

if TYPE_CHECKING:
    import onnx
    from onnxscript.rewriter.pattern import RewriteRule

Array: TypeAlias = NDArray[np.float32]
Runtime: TypeAlias = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[str, ...] = get_args(Runtime)

TOLERANCE = 1e-5  # of the largest output value
SHAPES = ((1, 200), (3, 345), (1, 97), (2, 100), (1, 7), (2, 1001))  # batch, frames that are compared
ANY_SIZE = 2**40  # constants are folded whatever their size: they are weights


@dataclass(frozen=True)
class Rewriting:
    """A rewritten graph and what was done.

    Attributes:
        applied: How often each step's rules applied, in order; steps that found nothing are left out.
        nodes_before, nodes_after: How many nodes the graph had and has.
        error: Largest difference from the graph as it was given, relative to the largest output value.
        compared: The (batch, frames) at which it was run.
    """

    model: "onnx.ModelProto"
    applied: Mapping[str, int]
    nodes_before: int
    nodes_after: int
    error: float
    compared: tuple[tuple[int, int], ...]


def optimize(model: "onnx.ModelProto", runtime: Runtime, float_form: bool = False) -> "onnx.ModelProto":
    """Rewrite a float graph for a runtime without changing what it computes.

    Args:
        model: Takes (batch, frames, num_mel_bins); it is not changed.
        runtime: Whose kernels the form is for; the result is right in every runtime.
        float_form: Also take the forms that pay only while the graph stays in floating point.

    Raises:
        ModelError: If the result differs by more than 1e-5 of the largest output value; the step is named.
    """
    return rewrite(model, runtime, float_form).model


def rewrite(model: "onnx.ModelProto", runtime: Runtime, float_form: bool = False) -> Rewriting:
    """Do what :func:`optimize` does, and tell what was done."""
    return apply(model, steps(runtime, float_form))


def conv1d_as_conv2d(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Rewrite convolutions over one axis alone, and compare.

    Raises:
        ModelError: As :func:`optimize`.
    """
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    if not any(node.op_type == "Conv" and ranks.get(node.input[1]) == 3 for node in model.graph.node):
        return model
    return apply(model, [CONV2D]).model


def apply(model: "onnx.ModelProto", chosen: "Iterable[tuple[str, Step]]") -> Rewriting:
    """Apply steps one after the other, and compare the result with the graph as it was given."""
    reference = outputs_of(model)
    if not reference:
        raise ModelError("optimize: ONNX Runtime runs the graph at none of the sizes that are compared.")
    applied: dict[str, int] = {}
    stages = [(model, "")]
    for name, step in chosen:
        before = stages[-1][0]
        graph, count = step(before)
        if count:
            applied[name] = count
            stages.append((graph, name))
    error = relative_error(outputs_of(stages[-1][0]), reference)
    if not error <= TOLERANCE:
        guilty = next(
            name for graph, name in stages[1:] if not relative_error(outputs_of(graph), reference) <= TOLERANCE
        )
        raise ModelError(
            f"optimize: after '{guilty}' the output differs by {error:.1e} of its largest value (allowed"
            f" {TOLERANCE:.0e}). The graph was left as it is. Export with onnx.optimize=false, and report it with the"
            " file."
        )
    result = stages[-1][0]
    return Rewriting(result, applied, len(model.graph.node), len(result.graph.node), error, tuple(reference))


Step: TypeAlias = "Callable[[onnx.ModelProto], tuple[onnx.ModelProto, int]]"
CONV2D: "tuple[str, Step]" = ("Conv1d as Conv2d", lambda model: sweep(model, conv2d_rules()))


def steps(runtime: Runtime, float_form: bool) -> "Iterator[tuple[str, Step]]":
    """Names of the steps for a runtime, in order, and what they do."""
    yield "segment pooling in one form", lambda model: sweep(model, pooling_rules(matrices_of(model)))
    yield "context once per segment", lambda model: sweep(model, context_rules())
    if runtime == "onnxruntime" or float_form:  # OpenVINO gains by it where it is not to be quantized
        yield "segment pooling as matrix product", lambda model: sweep(model, matrix_rules())
    yield "convolution of one frame as Gemm", lambda model: sweep(model, gemm_rules())
    yield "batch norm into weights", lambda model: sweep(model, batch_norm_rules())
    if runtime == "onnxruntime":
        yield CONV2D
    if float_form and runtime == "onnxruntime":
        yield "blocked layout", lambda model: sweep(model, block_rules())
    elif float_form:
        yield "batch norm and ReLU as Max", lambda model: sweep(model, max_rules())


def sweep(model: "onnx.ModelProto", rules: "list[RewriteRule]") -> "tuple[onnx.ModelProto, int]":
    """Apply rules once from the input to the output, and tidy up: constants folded, equal nodes merged."""
    import onnx_ir as ir
    import onnx_ir.passes.common as common
    from onnxscript import optimizer
    from onnxscript.rewriter.pattern import RewriteRuleSet

    graph = common.ShapeInferencePass()(ir.serde.deserialize_model(model)).model
    count = RewriteRuleSet(rules).apply_to_model(graph)
    if not count:
        return model, 0
    common.IdentityEliminationPass()(graph)
    optimizer.fold_constants(graph, input_size_limit=ANY_SIZE, output_size_limit=ANY_SIZE)
    common.CommonSubexpressionEliminationPass()(graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    common.RemoveUnusedNodesPass()(graph)
    for node in graph.graph:
        node.metadata_props.clear()
    result: onnx.ModelProto = ir.serde.serialize_model(graph)
    del result.graph.value_info[:]
    return result, count


def matrices_of(model: "onnx.ModelProto") -> Mapping[str, Any]:
    """Recognise the segment matrices that a graph computes from the number of frames, by running it."""
    import onnx

    of_shapes = {tensor.name for tensor in model.graph.initializer}
    weights = frozenset(of_shapes)
    for node in model.graph.node:
        if node.op_type in ("Shape", "Constant") or (node.input and of_shapes.issuperset(filter(None, node.input))):
            of_shapes.update(node.output)
    wanted = sorted({n.input[1] for n in model.graph.node if n.op_type == "MatMul"} & (of_shapes - weights))
    if not wanted:
        return {}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in wanted)
    found = outputs_of(probe, tuple((1, frames) for frames in PROBES))
    return find_matrices({name: [values[i] for values in found.values()] for i, name in enumerate(wanted)})


def outputs_of(
    model: "onnx.ModelProto", shapes: tuple[tuple[int, int], ...] = SHAPES
) -> dict[tuple[int, int], list[Array]]:
    """Run a graph in ONNX Runtime on seeded noise; sizes that it does not take are left out."""
    session = open_session(model.SerializeToString(), 1)
    (entry,) = session.get_inputs()
    fixed = [size if isinstance(size, int) else None for size in entry.shape]
    found = {}
    for shape in shapes:
        sizes = [size or wanted for size, wanted in zip(fixed, (*shape, 1), strict=True)]  # features take three axes
        noise = np.random.default_rng(sum(sizes)).standard_normal(sizes, dtype=np.float32)
        try:
            found[(sizes[0], sizes[1])] = session.run(None, {entry.name: noise})
        except Exception:  # private classes of the native module: the graph does not take this size
            continue
    return found


def relative_error(
    actual: Mapping[tuple[int, int], list[Array]], expected: Mapping[tuple[int, int], list[Array]]
) -> float:
    """Largest difference relative to the largest value, over all expected sizes; infinite if one is missing."""
    worst = 0.0
    for size, arrays in expected.items():
        if size not in actual:
            return float("inf")
        for one, other in zip(actual[size], arrays, strict=True):
            if one.shape != other.shape:
                return float("inf")
            worst = max(worst, float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-30)))
    return worst
