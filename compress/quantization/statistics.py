"""What the channels of activations hold on calibration audio, seen by the layers that read them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from compress.onnx_file import open_session
from compress.quantization.graph import Array, read, weight_of
from compress.quantization.planning import Plan

MAX_FRAMES = 300  # of an utterance: all inputs of all layers are held at once, 0.5 MB per frame in CAM++


@dataclass(frozen=True)
class Channels:
    """Of the input of a layer.

    Attributes:
        mean: Of each channel, over utterances and frames.
        largest: Magnitude of each channel.
    """

    mean: NDArray[np.float64]
    largest: NDArray[np.float64]


def channels_of_inputs(
    model: onnx.ModelProto, planned: Plan, utterances: Iterable[Array], threads: int = 1
) -> dict[str, Channels]:
    """Run the float graph and look at the channels that each planned layer reads.

    Args:
        model: With one input, (batch, frames, num_mel_bins).
        planned: Layers of it.
        utterances: Features (frames, num_mel_bins), of which the first ``MAX_FRAMES`` frames are taken.
        threads: For the runtime.
    """
    graph = read(model).graph
    chosen = {str(node.name): node for node in graph if node.name in planned.layers}
    inputs = {name: node.inputs[0] for name, node in chosen.items()}
    wanted = list(dict.fromkeys(str(value.name) for value in inputs.values() if value is not None))
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    del probed.graph.output[:]
    probed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted
    )
    session = open_session(probed.SerializeToString(), threads)
    axes = {str(value.name): 1 if chosen[name].op_type == "Conv" else -1 for name, value in inputs.items() if value}
    sums: dict[str, NDArray[np.float64]] = {}
    largest: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    for utterance in utterances:
        for name, values in zip(
            wanted, session.run(None, {session.get_inputs()[0].name: utterance[None, :MAX_FRAMES]}), strict=True
        ):
            by_channel = np.moveaxis(values, axes[name], 0).reshape(values.shape[axes[name]], -1)
            sums[name] = sums.get(name, 0.0) + by_channel.sum(axis=1, dtype=np.float64)
            largest[name] = np.maximum(largest.get(name, 0.0), np.abs(by_channel).max(axis=1))
            counts[name] = counts.get(name, 0) + by_channel.shape[1]
    assert all(weight_of(node) is not None for node in chosen.values()), "planned layers have weights"
    return {
        layer: Channels(sums[str(value.name)] / counts[str(value.name)], largest[str(value.name)])
        for layer, value in inputs.items()
        if value is not None
    }
