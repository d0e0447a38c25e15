"""The probe compares one network with itself, and its verdict follows from the figures."""

import numpy as np
import onnx
import pytest

from compress import machine, openvino_file
from compress.evaluation import int8_probe
from compress.evaluation.int8_probe import (
    CHANNELS,
    HEIGHT,
    INT8,
    OPENVINO,
    REFERENCE,
    SIGNED,
    WIDTH,
    Probe,
    advice,
    probe_int8,
    small_network,
)
from compress.onnx_file import open_session
from compress.vectors import cosine


def probe(gain: float, signed: float = 1.0, vnni: bool = True, missing: str | None = None, **openvino: float) -> Probe:
    speedups = {REFERENCE: 1.0, INT8: gain, SIGNED: signed}
    speedups |= {OPENVINO[precision]: times for precision, times in openvino.items()}
    return Probe(("avx2",), vnni, {name: 10 / times for name, times in speedups.items()}, speedups, missing)


@pytest.mark.parametrize("form", ["uint8", "int8"])
def test_quantized_forms_compute_the_same_function(form: str) -> None:
    x = np.random.default_rng(1).standard_normal((1, CHANNELS, HEIGHT, WIDTH), dtype=np.float32)
    exact, found = (open_session(small_network(f), 1).run(None, {"x": x})[0].ravel() for f in ("fp32", form))
    assert np.isfinite(exact).all()
    assert exact.std() > 0.1
    assert cosine(exact, found) > 0.98


def test_every_product_is_quantized_in_the_quantized_forms() -> None:
    for form in ("uint8", "int8"):
        model = onnx.load_from_string(small_network(form))
        onnx.checker.check_model(model, full_check=True)
        made_by = {name: node.op_type for node in model.graph.node for name in node.output}
        products = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
        assert len(products) == 4
        assert all(made_by[name] == "DequantizeLinear" for node in products for name in node.input)
    assert not [n for n in onnx.load_from_string(small_network("fp32")).graph.node if "Quantize" in n.op_type]


def test_every_form_is_measured() -> None:
    found = probe_int8(budget_s=0)
    expected = {REFERENCE, INT8, SIGNED}
    if openvino_file.missing() is None:
        expected |= {name for kind, name in OPENVINO.items() if kind != "bf16" or machine.has_bf16()}
    assert found.milliseconds.keys() == found.speedups.keys() == expected
    assert found.speedups[REFERENCE] == 1
    assert all(value > 0 for value in found.milliseconds.values())
    assert advice(found)


def test_without_openvino_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_probe.openvino_file, "missing", lambda: "OpenVINO is not installed. Install it: pip")
    found = probe_int8(budget_s=0)
    assert found.milliseconds.keys() == {REFERENCE, INT8, SIGNED}
    assert advice(found)[-1].startswith("OpenVINO is not installed. Install it: pip, and run this again")


@pytest.mark.parametrize(
    ("given", "sentences"),
    [
        (probe(3.1), ["INT8 pays on this CPU: 3.1 times as fast as FP32 in ONNX Runtime."]),
        (
            probe(1.3),
            ["INT8 pays a little on this CPU: 1.3 times", "It has instructions for INT8 (avx2), so something"],
        ),
        (probe(0.9, vnni=False), ["INT8 does not pay on this CPU: 0.9 times", "It has no VNNI (instructions: avx2)"]),
        (probe(3.1, signed=0.3), ["With signed activations it would be 0.3 times: keep them unsigned"]),
        (probe(3.1, fp32=1.1, int8=2.0), ["in the same measure: FP32 1.1, INT8 2.0 times.", "BF16 was not measured"]),
        (
            probe(3.1, fp32=1.1, bf16=1.9, int8=4.0),
            ["BF16 pays, and needs no cal", "Fastest of all is OpenVINO in INT8."],
        ),
    ],
)
def test_verdict_follows_from_the_figures(given: Probe, sentences: list[str]) -> None:
    if given.speedups.keys() == {REFERENCE, INT8, SIGNED}:
        given = Probe(given.instructions, given.vnni, given.milliseconds, given.speedups, "No OpenVINO")
    said = " ".join(advice(given))
    for sentence in sentences:
        assert sentence in said


def test_nothing_is_said_that_does_not_hold() -> None:
    said = " ".join(advice(probe(3.0, signed=3.0, fp32=1.0, bf16=1.0, int8=2.0)))
    for text in ("no VNNI", "signed activations", "BF16 pays", "Fastest of all", "does not pay"):
        assert text not in said
