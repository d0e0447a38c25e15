"""Ways to calibrate a graph, each for a process of its own: `benchmarks/calibration.py` measures them."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compress.calibration import collect_ranges
from compress.onnx_file import open_session

WEIGHTED = ("Conv", "Gemm", "MatMul")
PERCENTILE = 99.99

Ends = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Features:
    """Utterances (frames, num_mel_bins) in a file, one after the other, so that reading them takes no memory."""

    path: str
    num_mel_bins: int
    frames: tuple[int, ...]

    def __iter__(self) -> Iterator[np.ndarray]:
        with Path(self.path).open("rb") as file:
            for frames in self.frames:
                yield np.fromfile(file, np.float32, frames * self.num_mel_bins).reshape(frames, -1)

    def head(self, count: int) -> "Features":
        """The first utterances."""
        return Features(self.path, self.num_mel_bins, self.frames[:count])

    def equal(self) -> "Features":
        """The same frames, cut to utterances of one length."""
        count = len(self.frames)
        return Features(self.path, self.num_mel_bins, (sum(self.frames) // count,) * count)


class Reader:
    """Feeds utterances to ONNX Runtime's calibrators."""

    def __init__(self, features: Features) -> None:
        self.utterances = iter(features)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Give the next utterance, or None at the end."""
        utterance = next(self.utterances, None)
        return None if utterance is None else {"feats": utterance[None]}


@dataclass(frozen=True)
class Cost:
    """What a calibration took, and the ranges it found."""

    wall_s: float
    cpu_s: float
    ends: Ends


def timed(work: Callable[[], Ends]) -> Cost:
    """Call and measure wall and processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    ends = work()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, ends)


def inputs_of_weighted(model: onnx.ModelProto) -> list[str]:
    """Tensors that INT8 convolutions and matrix products take: those to calibrate."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [node.input[0] for node in model.graph.node if node.op_type in WEIGHTED and node.input[1] in weights]


def inference(path: str, features: Features, threads: int) -> Cost:
    """Run the float graph on each utterance: the floor of any calibration in one pass."""

    def work() -> Ends:
        session = open_session(Path(path).read_bytes(), threads)
        for utterance in features:
            session.run(None, {"feats": utterance[None]})
        return {}

    return timed(work)


def own(path: str, features: Features, threads: int, method: Any) -> Cost:
    """Collect with this package."""

    def work() -> Ends:
        model = onnx.load(path)
        found = collect_ranges(
            model, inputs_of_weighted(model), features, method, percentile=PERCENTILE, threads=threads
        )
        return {name: (chosen.low, chosen.high) for name, chosen in found.ranges.items()}

    return timed(work)


def onnxruntime_calibrator(path: str, features: Features, method: str) -> Cost:
    """Collect with the calibrator of ONNX Runtime alone, on the weighted operators."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    def work() -> Ends:
        with tempfile.TemporaryDirectory() as folder:
            options = {"percentile": PERCENTILE} if method == "Percentile" else {}
            calibrator = create_calibrator(
                path, WEIGHTED, f"{folder}/augmented.onnx", getattr(CalibrationMethod, method), extra_options=options
            )
            calibrator.collect_data(Reader(features))
            found = calibrator.compute_data()
        ends = {name: data.range_value for name, data in found.data.items()}
        return {name: (np.asarray(low).item(), np.asarray(high).item()) for name, (low, high) in ends.items()}

    return timed(work)


def quantize_static(path: str, features: Features, all_operators: bool) -> Cost:
    """Quantize with ONNX Runtime by its extremes: calibration, and the rewriting of the graph that comes with it."""
    from onnxruntime.quantization import CalibrationMethod, quantize_static

    def work() -> Ends:
        with tempfile.TemporaryDirectory() as folder:
            quantize_static(
                path,
                f"{folder}/quantized.onnx",
                Reader(features),
                op_types_to_quantize=None if all_operators else list(WEIGHTED),
                calibrate_method=CalibrationMethod.MinMax,
            )
        return {}

    return timed(work)
