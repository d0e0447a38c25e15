"""Ranges of tensors, collected utterance by utterance: memory grows neither with their number nor with their length."""

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from compress.calibration import methods
from compress.calibration.histogram import HALF, Histogram, thinned
from compress.errors import InputError, ModelError, SettingError, unknown_name
from compress.onnx_file import open_session

if TYPE_CHECKING:
    import onnx
    import onnxruntime

Array = NDArray[np.float32]
Method = Literal["minmax", "percentile", "entropy", "mse"]

MAX_FRAMES = 300  # longer utterances are run in equal pieces, since all wanted tensors of a run are held at once
MAX_RUNS = 4  # at once, each with tensors of its own; further threads work within a run
COUNTED = 1 << 14  # values of a tensor in a run that enter its histogram, of more; its extremes are always exact


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

    @property
    def covered(self) -> float:
        """Fraction of the way between the extremes, and 0, that lies within low..high."""
        seen_low, seen_high = min(self.seen_low, 0.0), max(self.seen_high, 0.0)
        if seen_low == seen_high:
            return 1.0
        return (min(self.high, seen_high) - max(self.low, seen_low)) / (seen_high - seen_low)


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


class Tensor:
    """What is known of a tensor so far."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.histogram = Histogram()
        self.lock = threading.Lock()

    def add(self, values: Array, count: bool) -> bool:
        """Take in the values of a run, counting them only on request; False if one is NaN or infinite."""
        low, high = float(values.min()), float(values.max())  # NaN if there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        with self.lock:
            self.low, self.high = min(self.low, low), max(self.high, high)
            if count:
                counted, step = thinned(values, COUNTED)
                self.histogram.add(counted, low, high, step)
        return True

    def range(self, method: Method, symmetric: bool, percentile: float) -> Range:
        """Choose the range to cover."""
        low, high, clipped = min(self.low, 0.0), max(self.high, 0.0), 0.0
        if method != "minmax":
            counts, width = self.histogram.counts, self.histogram.width
            values = methods.folded(counts) if symmetric else counts
            if method == "percentile":
                first, end = methods.percentile(values, percentile, symmetric)
            else:
                first, end = {"entropy": methods.entropy, "mse": methods.mse}[method](values, symmetric)
            if symmetric:
                first = -end
            total = int(counts.sum())
            clipped = (total - int(counts[HALF + first : HALF + end].sum())) / total
            low, high = max(low, first * width), min(high, end * width)
        if symmetric:
            high = max(-low, high)
            low = -high
        return Range(low, high, self.low, self.high, clipped)


def collect_ranges(
    model: "onnx.ModelProto",
    tensors: Sequence[str],
    utterances: Iterable[Array],
    method: Method = "minmax",
    *,
    symmetric: bool = False,
    percentile: float = 99.99,
    threads: int = 1,
) -> Ranges:
    """Run a graph on utterances and choose a range for each tensor.

    Args:
        model: Graph with one input (batch, frames, num_mel_bins). It is not changed.
        tensors: Names of float tensors in it: its input, or results of nodes.
        utterances: Features (frames, num_mel_bins) of any length, taken one at a time. One of more than
            ``MAX_FRAMES`` frames is run in equal pieces.
        method: ``minmax`` covers all that was seen, ``percentile`` most of it, ``entropy`` keeps the distribution,
            ``mse`` the values. All but ``minmax`` rest on at most ``COUNTED`` values of a tensor from each run.
        symmetric: Whether the ranges are to be -x..x, as TensorRT wants them.
        percentile: Of the values that ``percentile`` covers, the rest being cut on both sides alike.
        threads: Utterances are run side by side, ``MAX_RUNS`` at most: in networks as small as these, a second thread
            within an utterance gains little. The result does not depend on it.

    Raises:
        SettingError: If there is no such method, or the percentile is none.
        InputError: If there are no utterances, one has the wrong shape, holds NaN or cannot be run, or a tensor holds
            NaN or infinite values (named, with the node that makes it).
        ModelError: If a tensor is not in the graph.
    """
    if method not in get_args(Method):
        raise unknown_name("calibration method", method, get_args(Method))
    if not 50 < percentile <= 100:
        raise SettingError(f"the calibration percentile must be over 50 and up to 100, got {percentile}.")
    found = {name: Tensor() for name in tensors}
    runs = min(threads, MAX_RUNS)
    session = _open(model, list(found), threads // runs)
    count = frames = 0

    def pieces() -> Iterator[tuple[Array, int]]:
        nonlocal count, frames
        for utterance in utterances:
            count, frames = count + 1, frames + len(utterance)
            for piece in np.array_split(utterance, max(1, math.ceil(len(utterance) / MAX_FRAMES))):
                yield piece, count

    def take_in(piece: Array, number: int) -> None:
        for name, values in zip(found, _run(session, piece, number), strict=True):
            if not found[name].add(values, count=method != "minmax"):
                raise InputError(
                    f"{maker_of(model, name)} is NaN or infinite on calibration utterance {number}. Check the"
                    " weights of the network there."
                )

    begun: deque[Future[None]] = deque()
    with ThreadPoolExecutor(runs, "calibration") as pool:
        try:
            for piece, number in pieces():
                if len(begun) == 2 * runs:  # no more are read than can be worked on
                    begun.popleft().result()
                begun.append(pool.submit(take_in, piece, number))
            while begun:
                begun.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
    if not count:
        raise InputError("there are no calibration utterances; at least one is needed.")
    ranges = {name: tensor.range(method, symmetric, percentile) for name, tensor in found.items()}
    return Ranges(ranges, count, frames)


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
    for name in tensors:
        probed.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return open_session(probed.SerializeToString(), threads, plan_memory=False)


def _run(session: "onnxruntime.InferenceSession", piece: Array, number: int) -> list[Array]:
    given = session.get_inputs()[0]
    bins = given.shape[-1]
    if piece.ndim != 2 or not len(piece) or (isinstance(bins, int) and piece.shape[1] != bins):
        raise InputError(
            f"calibration utterance {number} has features of shape {piece.shape}; (frames, {bins}) are needed."
        )
    if not np.isfinite(piece).all():
        raise InputError(f"the features of calibration utterance {number} hold NaN or infinity.")
    try:
        outputs: list[Array] = session.run(None, {given.name: piece[None]})
    except Exception as error:  # its exceptions are private classes of the native module
        raise InputError(
            f"the network does not run on calibration utterance {number}, of {len(piece)} frames: {error}"
        ) from error
    return outputs


def maker_of(model: "onnx.ModelProto", tensor: str) -> str:
    """A tensor for a message: its name, and the node that makes it."""
    node = next((node for node in model.graph.node if tensor in node.output), None)
    return f"tensor '{tensor}' of {node.op_type} '{node.name}'" if node is not None else f"the input '{tensor}'"
