"""The front end as a graph: the same features as in Python, taken off a network and put back."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from compress.artifact import Artifact, FrontEnd
from compress.front_end_graph import front_end_graph, join_front_end, split_front_end
from compress.onnx_file import count_weights, open_session

EVERYWHERE = {"Unsqueeze", "Conv", "Mul", "Split", "Add", "MatMul", "Max", "Log", "ReduceMean", "Sub", "Transpose"}


def features_in_graph(front_end: FrontEnd, waveforms: np.ndarray) -> np.ndarray:
    session = open_session(front_end_graph(front_end, 18).SerializeToString(), 1)
    return session.run(["feats"], {"waveform": waveforms})[0]


def noise(samples: int, level: float = 1.0, seed: int = 0) -> np.ndarray:
    return (level * np.random.default_rng(seed).uniform(-1, 1, samples)).astype(np.float32)


@settings(deadline=None, max_examples=20)
@given(
    rate=st.sampled_from([8000, 16000]),
    samples=st.integers(400, 20000),
    bins=st.sampled_from([16, 40, 80]),
    cmn=st.booleans(),
    level=st.sampled_from([1.0, 0.03, 1e-4, 1e-6]),
)
def test_features_are_those_of_python(rate: int, samples: int, bins: int, cmn: bool, level: float) -> None:
    front_end, waveform = FrontEnd(rate, bins, cmn=cmn), noise(samples, level, samples)
    np.testing.assert_allclose(
        features_in_graph(front_end, waveform[None])[0], front_end.features(waveform), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("offset", [0.0, 0.25, -0.9])
def test_a_constant_is_removed_and_silence_lies_on_the_floor(offset: float) -> None:
    front_end, waveform = FrontEnd(cmn=False), np.full(4000, offset, np.float32)
    found = features_in_graph(front_end, waveform[None])[0]
    assert found.shape == (front_end.num_frames(4000), 80)
    np.testing.assert_allclose(found, np.log(1.1920929e-07), atol=1e-6)


def test_odd_sample_rate() -> None:
    front_end, waveform = FrontEnd(22050, 24), noise(9000)
    found = features_in_graph(front_end, waveform[None])[0]
    np.testing.assert_allclose(found, front_end.features(waveform), rtol=0, atol=1e-3)


def test_a_batch_is_its_waveforms_one_by_one() -> None:
    waveforms = np.stack([noise(5000, seed=seed) for seed in range(3)])
    found = features_in_graph(FrontEnd(), waveforms)
    for one, waveform in zip(found, waveforms, strict=True):
        np.testing.assert_allclose(one, FrontEnd()(waveform), rtol=0, atol=1e-3)


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_operators_are_plain_ones(opset: int) -> None:
    model = front_end_graph(FrontEnd(), opset)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert {node.op_type for node in model.graph.node} == EVERYWHERE


def test_split_and_join_undo_each_other(tiny_waveform: Artifact, tiny_onnx: Artifact) -> None:
    model = onnx.load_from_string(tiny_waveform.onnx)
    front, network = split_front_end(model)
    assert front is not None
    for part in (front, network):
        onnx.checker.check_model(part, full_check=True)
    assert join_front_end(front, network) == model
    assert network.graph == onnx.load_from_string(tiny_onnx.onnx).graph
    assert {entry.key for entry in network.metadata_props} == {entry.key for entry in model.metadata_props}
    assert {node.op_type for node in front.graph.node} == EVERYWHERE


def test_split_finds_the_front_end_whatever_its_tensors_are_called(tiny_waveform: Artifact) -> None:
    model = onnx.load_from_string(tiny_waveform.onnx)
    for node in model.graph.node:
        node.output[:] = [name.replace("front_end/", "x") for name in node.output]
        node.input[:] = [name.replace("front_end/", "x") for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("front_end/", "x")
    front, network = split_front_end(model)
    assert front is not None
    assert not {tensor.name for tensor in network.graph.initializer if tensor.name.startswith("x")}
    assert join_front_end(front, network).graph.node == model.graph.node


def test_a_graph_on_features_has_no_front_end(tiny_onnx: Artifact) -> None:
    model = onnx.load_from_string(tiny_onnx.onnx)
    assert split_front_end(model) == (None, model)


def test_weights_shared_with_the_network_stay_in_both_parts(tiny_waveform: Artifact) -> None:
    model = onnx.load_from_string(tiny_waveform.onnx)
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Add", ["before", "front_end/floor"], ["embedding"]))
    front, network = split_front_end(model)
    assert front is not None
    for part in (front, network):
        assert [t for t in part.graph.initializer if t.name == "front_end/floor"]
        onnx.checker.check_model(part, full_check=True)


def test_what_does_not_fit_together_is_refused(tiny_onnx: Artifact, tiny_waveform: Artifact) -> None:
    front = front_end_graph(FrontEnd(num_mel_bins=16), 20)
    with pytest.raises(ValueError, match="opsets differ"):
        join_front_end(front, onnx.load_from_string(tiny_onnx.onnx))
    with pytest.raises(ValueError, match=r"the network takes \['waveform'\], not feats alone"):
        join_front_end(front_end_graph(FrontEnd(num_mel_bins=16), 18), onnx.load_from_string(tiny_waveform.onnx))


def test_the_front_end_counts_as_no_weights(tiny_onnx: Artifact, tiny_waveform: Artifact) -> None:
    found = {count_weights(onnx.load_from_string(artifact.onnx)) for artifact in (tiny_onnx, tiny_waveform)}
    assert len(found) == 1


def test_the_kernel_does_what_python_does_to_one_frame() -> None:
    model, frame = front_end_graph(FrontEnd(), 18), noise(400)
    (kernel,) = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "front_end/transform"]
    centered = frame.astype(np.float64) - frame.mean(dtype=np.float64)
    emphasized = centered - 0.97 * np.concatenate([centered[:1], centered[:-1]])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    spectrum = np.fft.rfft(emphasized * hann**0.85, 512)[:256]
    np.testing.assert_allclose(kernel[:, 0] @ frame, np.concatenate([spectrum.real, spectrum.imag]), atol=1e-4)
