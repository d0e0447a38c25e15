"""Ranges of tensors, collected utterance by utterance: memory grows neither with their number nor with their length."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError, ModelError
from compress.onnx_file import open_session

if TYPE_CHECKING:
    import onnx
    import onnxruntime

Array = NDArray[np.float32]
Method = Literal["minmax", "percentile", "entropy", "mse"]

MAX_FRAMES = 1000  # longer utterances are run in equal pieces, since all wanted tensors of a run are held at once


@dataclass(frozen=True)
class Range:
    """What a tensor held, and what 8 bits should cover of it.

    Attributes:
        low: Lower end of the chosen range, at most 0: an 8-bit grid has to hold 0 exactly.
        high: Upper end, at least 0. Both ends are 0 for a tensor that is always 0.
        seen_low: Least value seen, exactly.
        seen_high: Greatest value seen, exactly.
        clipped: Fraction of the values that lie outside low..high.
    """

    low: float
    high: float
    seen_low: float
    seen_high: float
    clipped: float


@dataclass(frozen=True)
class Ranges:
    """Ranges by tensor, and on how much they rest.

    Attributes:
        ranges: By name of the tensor.
        utterances: How many were used.
        frames: How many they had together.
    """

    ranges: Mapping[str, Range]
    utterances: int
    frames: int


def collect_ranges(
    model: "onnx.ModelProto",
    tensors: Sequence[str],
    utterances: Iterable[Array],
    method: Method = "minmax",
    *,
    symmetric: bool = False,
    threads: int = 1,
) -> Ranges:
    """Run a graph on utterances and choose a range for each tensor.

    Args:
        model: Graph with one input (batch, frames, num_mel_bins). It is not changed.
        tensors: Names of float tensors in it: its input, or results of nodes.
        utterances: Features (frames, num_mel_bins) of any length, taken one at a time. One of more than
            ``MAX_FRAMES`` frames is run in equal pieces.
        method: ``minmax`` covers all that was seen.
        symmetric: Whether the ranges are to be -x..x, as TensorRT wants them.
        threads: For the runtime.

    Raises:
        InputError: If there are no utterances, one has the wrong shape or cannot be run, or a tensor holds NaN or
            infinite values (named, with the node that makes it).
        ModelError: If a tensor is not in the graph.
    """
    session = _open(model, tensors, threads)
    wanted = list(dict.fromkeys(tensors))
    extremes = {name: (math.inf, -math.inf) for name in wanted}
    count = frames = 0
    for utterance in utterances:
        count, frames = count + 1, frames + len(utterance)
        for piece in np.array_split(utterance, max(1, math.ceil(len(utterance) / MAX_FRAMES))):
            for name, values in zip(wanted, _run(session, piece, count), strict=True):
                low, high = float(values.min()), float(values.max())
                if not (math.isfinite(low) and math.isfinite(high)):
                    raise InputError(f"calibration utterance {count}: {_maker(model, name)} gives NaN or infinity.")
                extremes[name] = min(low, extremes[name][0]), max(high, extremes[name][1])
    if not count:
        raise InputError("there are no calibration utterances; at least one is needed.")
    ranges = {name: _covering(low, high, symmetric) for name, (low, high) in extremes.items()}
    return Ranges(ranges, count, frames)


def _covering(seen_low: float, seen_high: float, symmetric: bool) -> Range:
    low, high = min(seen_low, 0.0), max(seen_high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    return Range(low, high, seen_low, seen_high, 0.0)


def _open(model: "onnx.ModelProto", tensors: Sequence[str], threads: int) -> "onnxruntime.InferenceSession":
    """Open a session whose outputs are the wanted tensors."""
    import onnx

    known = {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}
    for name in tensors:
        if name not in known:
            raise ModelError(f"the graph has no tensor '{name}'.")
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    del probed.graph.output[:]
    for name in dict.fromkeys(tensors):
        probed.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return open_session(probed.SerializeToString(), threads)


def _run(session: "onnxruntime.InferenceSession", piece: Array, number: int) -> list[Array]:
    given = session.get_inputs()[0]
    bins = given.shape[2]
    if piece.ndim != 2 or (isinstance(bins, int) and piece.shape[1] != bins):
        raise InputError(
            f"calibration utterance {number} has features of shape {piece.shape}; (frames, {bins}) are needed."
        )
    try:
        outputs: list[Array] = session.run(None, {given.name: piece[None]})
    except Exception as error:  # its exceptions are private classes of the native module
        raise InputError(
            f"the network does not run on calibration utterance {number}, of {len(piece)} frames: {error}"
        ) from error
    return outputs


def _maker(model: "onnx.ModelProto", tensor: str) -> str:
    node = next((node for node in model.graph.node if tensor in node.output), None)
    return f"tensor '{tensor}' of {node.op_type} '{node.name}'" if node is not None else f"the input '{tensor}'"
