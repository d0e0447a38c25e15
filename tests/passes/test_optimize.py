"""The pass optimize: every registered network stays equal, and the record tells what was done."""

import numpy as np
import onnx
import pytest
import torch

from compress.artifact import Artifact
from compress.errors import ModelError, SettingError
from compress.front_end_graph import has_front_end
from compress.models import ARCHITECTURES
from compress.onnx_file import FRONT_END
from compress.passes import Context, Onnx, Optimize
from compress.passes.onnx_export import export
from compress.rewriting import rewrite
from compress.rewriting.steps import outputs_of, relative_error
from compress.runners import OnnxRuntimeRunner


def kinds(artifact: Artifact) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(artifact.onnx).graph.node]


@pytest.fixture(scope="module")
def plain(tiny: Artifact) -> Artifact:
    """The tiny network exported as the exporter writes it."""
    return Onnx(optimize=False).run(tiny, Context())


def test_the_record_tells_what_was_done_how_often_and_how_it_was_checked(plain: Artifact) -> None:
    done = Optimize().run(plain, Context())
    first, second = done.history[-1].notes
    before, after = (len(kinds(artifact)) for artifact in (plain, done))
    assert first.startswith("rewritten: ")
    assert "Conv1d as Conv2d (" in first
    assert first.endswith(f"; {before} nodes before, {after} after")
    assert "1x97" in second


def test_parameters_stay_as_they_were_counted(plain: Artifact) -> None:
    for settings in ({}, {"float_form": True}, {"runtime": "openvino", "float_form": True}):
        done = Optimize(**settings).run(plain, Context())
        assert (done.params, done.macs, done.precision) == (plain.params, plain.macs, "fp32")


def test_export_optimizes_unless_told_not_to(tiny_onnx: Artifact, plain: Artifact) -> None:
    assert kinds(tiny_onnx) == kinds(Optimize().run(plain, Context()))
    assert kinds(tiny_onnx) != kinds(plain)
    assert any("rewritten: " in note for note in tiny_onnx.history[-1].notes)
    assert not any("rewritten: " in note for note in plain.history[-1].notes)


def test_a_front_end_in_the_graph_is_left_alone(tiny_waveform: Artifact) -> None:
    done = Optimize(runtime="openvino", float_form=True).run(tiny_waveform, Context())
    before, after = (onnx.load_from_string(artifact.onnx) for artifact in (tiny_waveform, done))
    front = [node for node in before.graph.node if node.name.startswith(FRONT_END)]
    assert front == list(after.graph.node)[: len(front)]
    assert has_front_end(after)
    waveforms = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 24000)).astype(np.float32)
    expected, found = (OnnxRuntimeRunner(artifact, 1).run(waveforms) for artifact in (tiny_waveform, done))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_quantized_graph_is_refused(tiny_int8: Artifact) -> None:
    with pytest.raises(ModelError, match=r"optimize takes an fp32 graph; this one is int8 already\. Optimize before"):
        Optimize().run(tiny_int8, Context())


def test_an_unknown_runtime_offers_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"unknown runtime of optimize 'openvin'\. Did you mean 'openvino'\?"):
        Optimize(runtime="openvin")  # type: ignore[arg-type]


TINY_WIDTHS = {
    "campplus": {"growth_rate": 8, "bn_size": 2, "init_channels": 16},
    "ecapa_tdnn": {"channels": [16, 16, 16, 16, 24], "attention_channels": 8, "se_channels": 8},
    "eres2net": {"m_channels": 8},
    "eres2netv2": {"m_channels": 8},
    "resnet34": {"m_channels": 4},
    "tdnn_blstm": {"channels": 16, "hidden_size": 12, "attention_channels": 8},
}


def test_every_network_for_speakers_is_tried() -> None:
    assert set(TINY_WIDTHS) == {name for name, entry in ARCHITECTURES.items() if entry.task == "sv"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_WIDTHS)
def test_every_registered_network_stays_equal(name: str) -> None:
    torch.manual_seed(0)
    model = export(ARCHITECTURES[name].build(**TINY_WIDTHS[name]).eval(), 80, 18)
    shapes = ((1, 60), (2, 199), (1, 200), (3, 201), (1, 433))
    expected = outputs_of(model, shapes)
    assert len(expected) == len(shapes)
    for runtime in ("onnxruntime", "openvino"):
        for float_form in (False, True):
            done = rewrite(model, runtime, float_form)
            assert relative_error(outputs_of(done.model, shapes), expected) <= 1e-5
