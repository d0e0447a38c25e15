"""The front end as an ONNX graph, joined to a network or taken off it: waveform in, embedding out.

Plain operators only, which every runtime has: what is linear in the samples of a frame (removal of its mean,
pre-emphasis, window, Fourier transform) is one convolution whose stride is the frame shift.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.artifact import FrontEnd
from compress.features import LOG_FLOOR, PREEMPHASIS, fft_size, mel_matrix, povey_window, window_and_shift
from compress.onnx_file import FEATURES, FRONT_END, WAVEFORM, has_front_end

if TYPE_CHECKING:
    import onnx

Array = NDArray[np.float32]

# The Nyquist bin has no weight in any mel filter, so it is not computed: `bins` is half the size of the transform.
GRAPH = """
<ir_version: 8, opset_import: ["" : {opset}]>
front_end (float[batch, samples] {waveform}) => (float[batch, frames, {num_mel_bins}] {features}) {{
    channel = Unsqueeze(waveform, channel_axis)
    spectrum = Conv<strides = [{shift}]>(channel, transform)
    squares = Mul(spectrum, spectrum)
    real, imaginary = Split<axis = 1, num_outputs = 2>(squares)
    power = Add(real, imaginary)
    energies = MatMul(filters, power)
    floored = Max(energies, floor)
    {normalise}
    {features} = Transpose<perm = [0, 2, 1]>(logarithms)
}}
"""
PLAIN = "logarithms = Log(floored)"
MINUS_MEAN = "raw = Log(floored) mean = ReduceMean(raw, frames_axis) logarithms = Sub(raw, mean)"


def front_end_graph(front_end: FrontEnd, opset: int) -> "onnx.ModelProto":
    """Build the graph that computes features as ``compress.features`` does.

    Args:
        front_end: What to compute.
        opset: 18 or later, that of the network to join.

    Returns:
        A graph from ``waveform`` (batch, samples) in [-1, 1) to ``feats`` (batch, frames, num_mel_bins). All
        waveforms of a batch are equally long.
    """
    import onnx
    from onnx import numpy_helper

    _, shift = window_and_shift(front_end.sample_rate)
    text = GRAPH.format(
        opset=opset,
        waveform=WAVEFORM,
        features=FEATURES,
        num_mel_bins=front_end.num_mel_bins,
        shift=shift,
        normalise=MINUS_MEAN if front_end.cmn else PLAIN,
    )
    model = onnx.parser.parse_model(text)
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    filters = mel_matrix(front_end.sample_rate, front_end.num_mel_bins)[:-1].T
    constants = {
        "transform": frame_transform(front_end.sample_rate)[:, None],
        "filters": np.ascontiguousarray(filters),
        "floor": np.float32(LOG_FLOOR),
        "channel_axis": np.array([1]),
        **({"frames_axis": np.array([2])} if front_end.cmn else {}),
    }
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
    return onnx.compose.add_prefix(model, FRONT_END, rename_inputs=False, rename_outputs=False)


def frame_transform(sample_rate: int) -> Array:
    """All that is linear between the samples of a frame and its spectrum, (2 * bins, window): first the real parts.

    Multiplied in float64 and rounded once: mean off, pre-emphasis (the first sample is its own predecessor), Povey
    window, Fourier transform of the frame padded with zeros.
    """
    window, _ = window_and_shift(sample_rate)
    size = fft_size(window)
    remove_mean = np.eye(window) - 1 / window
    emphasize = np.eye(window) - PREEMPHASIS * np.eye(window, k=-1)
    emphasize[0, 0] = 1 - PREEMPHASIS
    angles = -2 * np.pi * np.outer(np.arange(size // 2), np.arange(window)) / size
    fourier = np.vstack([np.cos(angles), np.sin(angles)])
    return (fourier * povey_window(window).astype(np.float64) @ emphasize @ remove_mean).astype(np.float32)


def join_front_end(front: "onnx.ModelProto", network: "onnx.ModelProto") -> "onnx.ModelProto":
    """Put a front end before a network whose input is called ``feats``; metadata is the network's.

    Raises:
        ValueError: If their opsets differ, or the network's input has another name.
    """
    import onnx

    opset = {entry.domain: entry.version for entry in network.opset_import}
    if any(opset.get(entry.domain) != entry.version for entry in front.opset_import):
        raise ValueError(f"opsets differ: front end {list(front.opset_import)}, network {list(network.opset_import)}")
    if [value.name for value in network.graph.input] != [FEATURES]:
        raise ValueError(f"the network takes {[value.name for value in network.graph.input]}, not {FEATURES} alone")
    joined = onnx.ModelProto()
    joined.CopyFrom(network)
    joined.ir_version = max(front.ir_version, network.ir_version)
    _replace(joined.graph.node, [*front.graph.node, *network.graph.node])
    joined.graph.initializer.extend(front.graph.initializer)
    _replace(joined.graph.input, front.graph.input)
    return joined


def split_front_end(model: "onnx.ModelProto") -> "tuple[onnx.ModelProto | None, onnx.ModelProto]":
    """Take the front end off a graph: (front end, network), which :func:`join_front_end` puts together again.

    A graph that takes features comes back as it is, with None.
    """
    import onnx

    if not has_front_end(model):
        return None, model
    network = onnx.ModelProto()
    network.CopyFrom(model)
    before, after = _nodes_before(model.graph, FEATURES)
    used, shared = ({name for node in nodes for name in node.input} for nodes in (before, after))
    output = onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, None)
    constants = [tensor for tensor in model.graph.initializer if tensor.name in used]
    front = onnx.helper.make_model(
        onnx.helper.make_graph(before, "front_end", model.graph.input, [output], constants),
        opset_imports=[entry for entry in model.opset_import if entry.domain == ""],
        ir_version=model.ir_version,
    )
    _replace(network.graph.node, after)
    weights = [t for t in model.graph.initializer if t.name not in used or t.name in shared]
    _replace(network.graph.initializer, weights)
    num_mel_bins = onnx.shape_inference.infer_shapes(front).graph.output[0].type.tensor_type.shape.dim[2].dim_value
    axes = ["batch", "frames", num_mel_bins]
    for values in (front.graph.output, network.graph.input):
        _replace(values, [onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, axes)])
    return front, network


def _nodes_before(graph: "onnx.GraphProto", name: str) -> "tuple[list[onnx.NodeProto], list[onnx.NodeProto]]":
    """Part the nodes of a graph, which are in order, into those that a tensor is made by and the others."""
    wanted, before, after = {name}, [], []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            before.append(node)
        else:
            after.append(node)
    return before[::-1], after[::-1]


def _replace(field: Any, values: Iterable[Any]) -> None:
    """Give a repeated field of a protobuf message other values."""
    values = list(values)
    del field[:]
    field.extend(values)
