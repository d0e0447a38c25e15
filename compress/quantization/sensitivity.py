"""How much each layer's rounding turns the embedding: one graph in which layers are rounded at will."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from compress.calibration import Range
from compress.onnx_file import open_session
from compress.progress import Progress
from compress.quantization.graph import Array, add_initializer, read, source, weight_of
from compress.quantization.placement import along, grid_of, round_weight
from compress.quantization.planning import Plan
from compress.quantization.scheme import Scheme
from compress.vectors import cosine

MAX_FRAMES = 200  # of an utterance: a graph with hundreds of layers is run once for each of them
SWITCHES = "_rounded"


def sensitivity(
    model: onnx.ModelProto,
    planned: Plan,
    ranges: Mapping[str, Range],
    scheme: Scheme,
    utterances: Sequence[Array],
    progress: Progress,
    bits: int = 8,
    threads: int = 1,
) -> dict[str, float]:
    """Measure what rounding each layer alone costs.

    Args:
        model: Float graph with one input (batch, frames, num_mel_bins) and one output (batch, embedding_size).
        planned: Layers to look at.
        ranges: Of the activations that they read.
        scheme: Of the target.
        utterances: Features (frames, num_mel_bins), of which the first ``MAX_FRAMES`` frames are taken.
        progress: Shows how far the work is.
        bits: Of weights, 8 or 7.
        threads: For the runtime.

    Returns:
        1 - the mean cosine to the float embedding, when only that layer's input and weight are rounded.
    """
    session = open_session(with_switches(model, planned, ranges, scheme, bits).SerializeToString(), threads)
    given = next(value.name for value in session.get_inputs() if value.name != SWITCHES)
    pieces = [utterance[None, :MAX_FRAMES] for utterance in utterances]

    def embed(switches: np.ndarray) -> list[Array]:
        return [session.run(None, {given: piece, SWITCHES: switches})[0][0] for piece in pieces]

    off = np.zeros(len(planned.layers), np.bool_)
    expected = embed(off)
    drops = {}
    for number, layer in enumerate(progress.track(planned.layers, "sensitivity of layers")):
        on = off.copy()
        on[number] = True
        drops[layer] = 1 - float(np.mean([cosine(a, b) for a, b in zip(embed(on), expected, strict=True)]))
    return drops


def with_switches(
    model: onnx.ModelProto, planned: Plan, ranges: Mapping[str, Range], scheme: Scheme, bits: int
) -> onnx.ModelProto:
    """Give a graph a second input, (layers,) booleans, that tell of which layers input and weight are rounded."""
    result = read(model)
    graph = result.graph
    switches = ir.val(SWITCHES, dtype=ir.DataType.BOOL, shape=ir.Shape([len(planned.layers)]))
    graph.inputs.append(switches)
    names = iter(range(10**9))

    def before(node: ir.Node, kind: str, inputs: list[ir.Value]) -> ir.Value:
        made = ir.node(kind, inputs, name=f"_switch{next(names)}")
        made.outputs[0].name = f"_switched{next(names)}"
        graph.insert_before(node, made)
        return made.outputs[0]

    by_name = {str(node.name): node for node in graph}
    for number, layer in enumerate(planned.layers):
        node = by_name[layer]
        value, original = node.inputs[0], node.inputs[1]
        found = weight_of(node)
        assert found is not None
        assert value is not None
        assert original is not None
        (weight, axis), seen = found, ranges[str(source(value).name)]
        place = add_initializer(graph, f"_place{number}", np.array(number, np.int64))
        switch = before(node, "Gather", [switches, place])
        grid = [
            add_initializer(graph, f"_grid{number}_{i}", np.asarray(part))
            for i, part in enumerate(grid_of(seen.low, seen.high, scheme.symmetric))
        ]
        rounded = before(node, "DequantizeLinear", [before(node, "QuantizeLinear", [value, *grid]), *grid])
        node.replace_input_with(0, before(node, "Where", [switch, rounded, value]))
        integers, step = round_weight(weight, axis, bits)
        near = add_initializer(graph, f"_near{number}", integers * along(step, weight.ndim, axis))
        node.replace_input_with(1, before(node, "Where", [switch, near, original]))
    return ir.to_proto(result)
