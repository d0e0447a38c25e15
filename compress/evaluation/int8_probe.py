"""Whether INT8 pays on this CPU: a small network without weights worth knowing, timed in each form side by side."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from compress import machine, openvino_file
from compress.evaluation.latency import speedup, time_interleaved
from compress.onnx_file import open_session

Form = Literal["fp32", "uint8", "int8"]  # of the activations; quantized weights are signed

CHANNELS, HEIGHT, WIDTH = 64, 20, 100  # of the convolutions, as in the head of CAM++
COLUMNS = 1024  # of the matrix products
BUDGET_S = 6.0  # for all rounds; with loading, the probe ends within 20 s
PAYS, PAYS_A_LITTLE = 1.5, 1.1  # times as fast as FP32
REFERENCE, INT8 = "onnxruntime fp32", "onnxruntime int8 (U8 activations, S8 weights)"
SIGNED = "onnxruntime int8 (S8 activations, S8 weights)"
OPENVINO = {"fp32": "openvino fp32", "bf16": "openvino bf16", "int8": "openvino int8"}


@dataclass(frozen=True)
class Probe:
    """What was measured, with one thread, in CPU time.

    Attributes:
        instructions: Those of the CPU that matter for INT8 and BF16.
        vnni: Whether it multiplies 8-bit integers without saturating.
        milliseconds: Median of each form.
        speedups: Of each form over FP32 in ONNX Runtime.
        missing: Why OpenVINO was not measured, or None.
    """

    instructions: tuple[str, ...]
    vnni: bool
    milliseconds: Mapping[str, float]
    speedups: Mapping[str, float]
    missing: str | None


def probe_int8(budget_s: float = BUDGET_S) -> Probe:
    """Time the network in each form, taking turns."""
    features = np.random.default_rng(0).standard_normal((1, CHANNELS, HEIGHT, WIDTH), dtype=np.float32)
    calls: dict[str, Callable[[], object]] = {}
    for name, form in ((REFERENCE, "fp32"), (INT8, "uint8"), (SIGNED, "int8")):
        calls[name] = partial(open_session(small_network(form), 1).run, None, {"x": features})  # type: ignore[arg-type]
    missing = openvino_file.missing()
    if missing is None:
        for precision, form in (("fp32", "fp32"), ("bf16", "fp32"), ("int8", "uint8")):
            if precision == "bf16" and not machine.has_bf16():
                continue
            network = openvino_file.read_network(small_network(form), b"")  # type: ignore[arg-type]
            computed_in = "bf16" if precision == "bf16" else "f32"
            request = openvino_file.compile_network(network, 1, computed_in).create_infer_request()
            calls[OPENVINO[precision]] = partial(request.infer, {0: features})
    timings = time_interleaved(calls, budget_s=budget_s, min_runs=3, warmup=1, clock=time.process_time)
    return Probe(
        instructions=tuple(machine.describe()["cpu_features"]),
        vnni=machine.has_vnni(),
        milliseconds={name: timing.p50 for name, timing in timings.items()},
        speedups=speedup(timings, REFERENCE),
        missing=missing,
    )


def small_network(form: Form) -> bytes:
    """Two 3x3 convolutions and two matrix products, each before a ReLU, as an ONNX graph in float or with Q/DQ.

    Input ``x`` (1, CHANNELS, HEIGHT, WIDTH).
    """
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []

    def constant(name: str, value: NDArray[Any]) -> str:
        tensors.append(numpy_helper.from_array(value, name))
        return name

    def add(kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [output], output, **attributes))
        return output

    def quantized(x: str) -> str:
        if form == "fp32":
            return x
        scale = constant(f"{x}_scale", np.array(4 / 127, np.float32))  # noise reaches 4, and ReLUs leave it about there
        zero = np.uint8(128 if x == "x" else 0) if form == "uint8" else np.int8(0)
        zero_point = constant(f"{x}_zero", np.array(zero))
        return add("DequantizeLinear", add("QuantizeLinear", x, scale, zero_point), scale, zero_point)

    def weight(name: str, shape: tuple[int, ...], axis: int) -> str:
        others = tuple(i for i in range(len(shape)) if i != axis)
        inputs = np.prod(shape) / shape[axis]
        values = rng.standard_normal(shape).astype(np.float32) * np.float32(np.sqrt(2 / inputs))
        if form == "fp32":
            return constant(name, values)
        scale = np.abs(values).max(axis=others) / np.float32(127)
        along = scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        stored = constant(name, np.round(values / along).astype(np.int8))
        zeros = constant(f"{name}_zero", np.zeros(len(scale), np.int8))
        return add("DequantizeLinear", stored, constant(f"{name}_scale", scale), zeros, axis=axis)

    y = "x"
    for i in range(2):
        shape = (CHANNELS, CHANNELS, 3, 3)
        y = add("Relu", add("Conv", quantized(y), weight(f"conv{i}", shape, 0), pads=[1, 1, 1, 1]))
    y = add("Reshape", y, constant("matrix", np.array([-1, COLUMNS])))
    for i in range(2):
        y = add("Relu", add("MatMul", quantized(y), weight(f"product{i}", (COLUMNS, COLUMNS), 1)))
    ends = [
        helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, CHANNELS, HEIGHT, WIDTH]),
        helper.make_tensor_value_info(y, onnx.TensorProto.FLOAT, [CHANNELS * HEIGHT * WIDTH // COLUMNS, COLUMNS]),
    ]
    graph = helper.make_graph(nodes, "probe", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    data: bytes = model.SerializeToString()
    return data


def advice(probe: Probe) -> list[str]:
    """What the figures say, in sentences: the verdict, the reason for it, and what to do."""
    gain = probe.speedups[INT8]
    has = ", ".join(probe.instructions) or "none that matter"
    said = []
    if gain >= PAYS:
        said.append(f"INT8 pays on this CPU: {gain:.1f} times as fast as FP32 in ONNX Runtime.")
    elif gain >= PAYS_A_LITTLE:
        said.append(f"INT8 pays a little on this CPU: {gain:.1f} times as fast as FP32 in ONNX Runtime.")
    else:
        said.append(
            f"INT8 does not pay on this CPU: {gain:.1f} times as fast as FP32 in ONNX Runtime. Ship FP32 here, or INT8"
            " for its file of a quarter of the size."
        )
    if not probe.vnni:
        said.append(
            f"It has no VNNI (instructions: {has}): products of 8 bits are added in 16 bits and saturate. ptq uses"
            " weights of 7 bits here (reduce_range), and little is gained."
        )
    elif gain < PAYS:
        said.append(f"It has instructions for INT8 ({has}), so something else holds it up: the machine may be busy.")
    if probe.speedups[SIGNED] < 0.8 * gain:
        said.append(
            f"With signed activations it would be {probe.speedups[SIGNED]:.1f} times: keep them unsigned, as ptq does"
            " for CPUs. The signed form is for TensorRT."
        )
    if probe.missing is not None:
        said.append(f"{probe.missing}, and run this again to compare; it is often faster.")
        return said
    found = {precision: probe.speedups[name] for precision, name in OPENVINO.items() if name in probe.speedups}
    figures = ", ".join(f"{precision.upper()} {times:.1f}" for precision, times in found.items())
    said.append(f"OpenVINO, in the same measure: {figures} times.")
    if "bf16" not in found:
        said.append("BF16 was not measured: the CPU has no instructions for it.")
    elif found["bf16"] >= PAYS:
        said.append("BF16 pays, and needs no calibration: pass openvino with precision=bf16.")
    best = max(found, key=lambda precision: found[precision])
    if found[best] > 1.1 * gain:
        said.append(f"Fastest of all is OpenVINO in {best.upper()}.")
    return said
