"""What a runtime really ran in INT8, as its own profile tells."""

import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RUNS = 5

# ONNX Runtime's operators that multiply 8-bit integers. Others that take integers only move, add or round them.
INT8_KERNELS = (
    "QLinearConv",
    "ConvInteger",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QGemm",
    "DynamicQuantizeLSTM",
)
FLOAT_KERNELS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "LSTM")  # with weights or without


@dataclass(frozen=True)
class Operator:
    """A kind of operator in the graph that a runtime made of the given one.

    Attributes:
        name: As the runtime calls it.
        count: In one run.
        share: Of the time of all operators.
        precision: ``int8`` or ``float`` of those that multiply, otherwise nothing.
    """

    name: str
    count: int
    share: float
    precision: str | None


def operators_run(model: bytes, inputs: dict[str, NDArray[np.float32]]) -> tuple[Operator, ...]:
    """Run a graph in ONNX Runtime, one thread, and read its profile.

    Returns:
        The operators of the optimized graph, those that take longest first.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = event["args"]["op_name"]
            times[kind] += event["dur"]
            counts[kind] += 1
    whole = max(sum(times.values()), 1)
    return tuple(
        Operator(kind, counts[kind] // RUNS, time / whole, precision_of(kind)) for kind, time in times.most_common()
    )


def precision_of(kind: str) -> str | None:
    """In what an operator of ONNX Runtime multiplies; None if it does not."""
    if kind in INT8_KERNELS:
        return "int8"
    return "float" if kind in FLOAT_KERNELS else None


def summary(operators: tuple[Operator, ...]) -> str:
    """A sentence on what ran in which precision, without the times, which differ from run to run."""

    def listed(precision: str) -> str:
        chosen = sorted((-operator.count, operator.name) for operator in operators if operator.precision == precision)
        return ", ".join(f"{-count} {name}" for count, name in chosen) or "nothing"

    return f"ran in ONNX Runtime: {listed('int8')} in INT8; {listed('float')} in float"
