"""Export to ONNX: equal to PyTorch at every shape, with nothing of this machine in the file."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.artifact import Artifact, FrontEnd
from compress.cli.inspect import golden_cosine
from compress.data import DataFolder
from compress.errors import InputError, ModelError, SettingError
from compress.front_end_graph import join_front_end, split_front_end
from compress.models import ARCHITECTURES
from compress.models.fsmn_vad import FSMNVAD
from compress.onnx_file import open_session
from compress.passes import TRT, Context, Onnx, onnx_export
from compress.passes.onnx_export import FRONT_END_COSINE, PARITY_SHAPES, export, front_end_parity
from compress.passes.recovery import batch_norms, reestimate_batch_norm
from compress.rewriting import optimize
from compress.runners import OnnxRuntimeRunner, TorchRunner, golden_outputs, load
from compress.surgery import choose_channels, l1_scores, remove_channels, trace
from compress.vectors import cosine

FRONT_END = FrontEnd(num_mel_bins=16)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def features_of(batch: int, frames: int, num_mel_bins: int) -> np.ndarray:
    return np.random.default_rng(frames).standard_normal((batch, frames, num_mel_bins)).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(1, 5), frames=st.integers(3, 500))
def test_export_equals_pytorch_at_any_shape(tiny: Artifact, tiny_onnx: Artifact, batch: int, frames: int) -> None:
    features = features_of(batch, frames, 16)
    assert relative_error(OnnxRuntimeRunner(tiny_onnx, 1).run(features), TorchRunner(tiny, 1).run(features)) <= 1e-4


def test_campplus_equals_pytorch_around_its_segments(campplus: Artifact, campplus_onnx: Artifact) -> None:
    torch_runner, onnx_runner = TorchRunner(campplus, 1), OnnxRuntimeRunner(campplus_onnx, 1)
    for batch, frames in ((1, 5), (1, 97), (2, 100), (1, 199), (3, 200), (1, 201), (1, 345), (2, 402)):
        features = features_of(batch, frames, 80)
        assert relative_error(onnx_runner.run(features), torch_runner.run(features)) <= 1e-4, (batch, frames)


def test_parity_is_checked_under_a_segment_and_off_its_multiples(tiny_onnx: Artifact) -> None:
    frames = [length for _, length in PARITY_SHAPES]
    assert len(PARITY_SHAPES) >= 4
    assert min(frames) < 100
    assert any(length % 100 for length in frames)
    assert len({batch for batch, _ in PARITY_SHAPES}) > 1
    assert "1x97" in tiny_onnx.history[-1].notes[0]


@pytest.mark.parametrize("name", ["tiny_onnx", "campplus_onnx", "tiny_int8", "campplus_int8"])
def test_batch_and_frames_stay_dynamic(request, name: str) -> None:
    artifact: Artifact = request.getfixturevalue(name)
    graph = onnx.load_from_string(artifact.onnx).graph
    axes = [axis.dim_param or axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", "frames", artifact.front_end.num_mel_bins]
    out = [axis.dim_param or axis.dim_value for axis in graph.output[0].type.tensor_type.shape.dim]
    assert out == ["batch", artifact.embedding_size]
    assert (graph.input[0].name, graph.output[0].name) == ("feats", "embedding")


@pytest.mark.parametrize("name", ["tiny_onnx", "campplus_onnx", "tiny_int8", "campplus_int8"])
def test_file_tells_nothing_of_this_machine(request, name: str) -> None:
    data = request.getfixturevalue(name).onnx
    for text in (str(Path.cwd()), str(Path.home()), "site-packages", "/tmp", "Traceback", "stack_trace"):
        assert text.encode() not in data, text
    assert not re.search(rb"\w{3}\.py", data)  # names of source files; weights may hold ".py" by chance


def test_batch_norms_are_folded_where_a_convolution_precedes(campplus_onnx: Artifact) -> None:
    kinds = [node.op_type for node in onnx.load_from_string(campplus_onnx.onnx).graph.node]
    assert kinds.count("Conv") > 0
    assert 0 < kinds.count("BatchNormalization") < kinds.count("Conv") / 2


def test_metadata_tells_the_front_end(campplus_onnx: Artifact, campplus_int8: Artifact) -> None:
    for artifact in (campplus_onnx, campplus_int8):
        metadata = {entry.key: entry.value for entry in onnx.load_from_string(artifact.onnx).metadata_props}
        assert metadata == {
            "task": "sv",
            "sample_rate": "16000",
            "num_mel_bins": "80",
            "window": "povey",
            "framework": "3d-speaker",
            "language": "English",
            "output_dim": "192",
            "normalize_samples": "1",
            "feature_normalize_type": "global-mean",
        }


@pytest.mark.parametrize("opset", [18, pytest.param(20, marks=pytest.mark.slow), 23])
def test_every_opset_is_written_as_asked(tiny: Artifact, opset: int) -> None:
    result = Onnx(opset=opset).run(tiny, Context())
    graph = onnx.load_from_string(result.onnx)
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [opset]
    assert graph.ir_version == {18: 8, 20: 9, 23: 11}[opset]  # ONNX Runtime 1.17 refuses versions above 9
    onnx.checker.check_model(graph, full_check=True)


class Pooled(nn.Module):
    """A linear layer and a mean over frames; what follows makes it unfit for other lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).mean(1)


class DividesByPythonCount(Pooled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).sum(1) / int(x.shape[1])


class WindowOfPythonCount(Pooled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        window = torch.from_numpy(np.hanning(int(x.shape[1])).astype(np.float32))
        return (self.linear(x) * window[:, None]).sum(1)


class BranchesOnFrames(Pooled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).mean(1) if x.shape[1] > 200 else self.linear(x).sum(1)


class BranchesOnValues(Pooled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).mean(1) if x.sum() > 0 else self.linear(x).sum(1)


class LongOnly(Pooled):
    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Conv1d(4, 4, 150)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.long(self.linear(x).transpose(1, 2)).mean(-1)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            DividesByPythonCount,
            r"onnx: the exported graph differs from PyTorch by .* torch\.export does not take the network \(the"
            r" exporter fixed the frames axis to the traced size; the network's code uses it\), TorchScript does\.$",
        ),
        (WindowOfPythonCount, r"torch\.export does not take the network \(the exporter fixed the frames axis"),
        (BranchesOnFrames, r"onnx: (the exported graph differs from PyTorch|the network cannot be exported)"),
        (
            BranchesOnValues,
            r"onnx: the network cannot be exported: torch\.export does not take the network \(.*data-dependent.*\);"
            r" TorchScript does not take the network \(its code branches on a value at test_onnx_export\.py:\d+; only"
            r" one branch would be exported\)\.$",
        ),
        (LongOnly, r"onnx: the network does not run on 1 x 97 frames .* utterances of any length"),
    ],
)
def test_network_that_is_not_free_in_its_frames_is_refused(network: type[nn.Module], message: str) -> None:
    torch.manual_seed(0)
    artifact = Artifact.from_module(network(), FRONT_END)
    with pytest.raises(ModelError, match=message) as caught:
        Onnx().run(artifact, Context())
    assert "\n" not in str(caught.value)


class ForTorchScript(Pooled):
    """Stands for code that torch.export does not follow; what that is differs between releases."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            raise RuntimeError("not followed")
        return self.linear(x).sum(1) / x.shape[1]


class ForTorchExport(Pooled):
    """Has complex numbers, which TorchScript's exporter does not take, and a layer for which it is tried first."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.GRU(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(self.linear(x), dim=-1).abs().mean(1)


@pytest.mark.parametrize(
    ("network", "first", "second"),
    [(ForTorchScript, r"torch\.export", "TorchScript"), (ForTorchExport, "TorchScript", r"torch\.export")],
)
def test_what_one_exporter_does_not_take_the_other_exports(network: type[nn.Module], first: str, second: str) -> None:
    torch.manual_seed(0)
    artifact = Artifact.from_module(network(), FRONT_END)
    exported = Onnx().run(artifact, Context())
    notes = exported.history[-1].notes
    assert re.match(r"equals PyTorch to .*1x97", notes[0])
    assert re.fullmatch(rf"{first} does not take the network \(.+\), {second} does", notes[-1])
    features = features_of(2, 133, 16)
    assert relative_error(OnnxRuntimeRunner(exported, 1).run(features), TorchRunner(artifact, 1).run(features)) <= 1e-4


@pytest.mark.parametrize("opset", [11, 17, 24])
def test_opset_out_of_range_is_told(opset: int) -> None:
    with pytest.raises(SettingError, match=rf"onnx\.opset must be in 18\.\.23, got {opset}"):
        Onnx(opset=opset)


def test_a_foreign_network_is_not_said_to_be_of_a_framework(tiny_onnx: Artifact) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load_from_string(tiny_onnx.onnx).metadata_props}
    assert metadata["output_dim"] == "24"
    assert not {"framework", "language"} & set(metadata)


SMALL = {
    "campplus": {"growth_rate": 8, "bn_size": 2, "init_channels": 32},
    "ecapa_tdnn": {"channels": [32, 32, 32, 32, 48], "attention_channels": 16, "se_channels": 16},
    "eres2net": {"m_channels": 8},
    "eres2netv2": {"m_channels": 8},
    "fsmn_vad": {"input_affine_dim": 24, "linear_dim": 32, "proj_dim": 24, "output_affine_dim": 24},
    "resnet34": {"m_channels": 8},
    "tdnn_blstm": {"channels": 32, "hidden_size": 24, "attention_channels": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_pruned_network_equals_pytorch(noise, name: str, scope: str, ratio: float) -> None:
    torch.manual_seed(0)
    bins = 400 if name == "fsmn_vad" else 80
    dense = ARCHITECTURES[name].build(**SMALL[name]).eval()
    if batch_norms(dense):  # fresh statistics let the activations grow from layer to layer
        reestimate_batch_norm(dense, noise(8, bins))
    graph = trace(dense, torch.randn(1, 120, bins))
    selection = choose_channels(graph, l1_scores(dense, graph), ratio, scope, round_to=1, min_width=1)
    pruned = remove_channels(dense, graph, selection.channels)
    exported = optimize(export(pruned, bins, 18), "onnxruntime")
    session = open_session(exported.SerializeToString(), 1)
    for batch, frames in ((1, 40), (3, 97), (2, 211)):
        features = features_of(batch, frames, bins)
        with torch.inference_mode():
            expected = pruned(torch.from_numpy(features)).numpy()
        assert relative_error(session.run(None, {"feats": features})[0], expected) <= 1e-4


class Recurrent(Pooled):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 3, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(self.linear(x))[0].mean(1)


@pytest.mark.parametrize("opset", [18, 23])
def test_recurrent_network_stays_whole_and_free_in_its_frames(opset: int) -> None:
    torch.manual_seed(0)
    artifact = Artifact.from_module(Recurrent(), FRONT_END)
    exported = Onnx(opset).run(artifact, Context())
    graph = onnx.load_from_string(exported.onnx)
    assert graph.opset_import[0].version == opset
    assert [node.op_type for node in graph.graph.node].count("GRU") == 2
    axes = [axis.dim_param or axis.dim_value for axis in graph.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", "frames", 16]
    assert "1x97" in exported.history[-1].notes[0]


def voice(duration_s: float, seed: int = 0) -> np.ndarray:
    """A gliding tone with harmonics, pauses and a noise 60 dB below it, at 16 kHz."""
    rng, time = np.random.default_rng(seed), np.arange(int(duration_s * 16000)) / 16000
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(3 * time)) / 16000
    tone = sum(np.sin(k * phase) / k for k in range(1, 20))
    return (0.1 * tone * (np.sin(5 * time) > -0.5) + 1e-4 * rng.standard_normal(len(time))).astype(np.float32)


@settings(deadline=None, max_examples=12)
@given(duration_s=st.floats(0.5, 30), seed=st.integers(0, 9))
def test_front_end_in_the_graph_gives_the_embedding_of_the_one_in_python(
    tiny_onnx: Artifact, tiny_waveform: Artifact, duration_s: float, seed: int
) -> None:
    waveform = voice(duration_s, seed)
    expected, found = (OnnxRuntimeRunner(a, 1).embed(waveform, 16000) for a in (tiny_onnx, tiny_waveform))
    assert cosine(found, expected) >= 0.9999
    assert relative_error(found, expected) <= 1e-3


@pytest.mark.slow
def test_front_end_in_the_graph_of_campplus_on_speech(campplus: Artifact, campplus_onnx: Artifact, bench_data) -> None:
    folder = DataFolder.read(bench_data / "speechocean762" / "dev")
    speech = np.concatenate([folder.waveform(utterance, 16000) for utterance in folder.utterances[:20]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "export", lambda *_: onnx.load_from_string(campplus_onnx.onnx))
        inside = Onnx(waveform=True).run(campplus, Context())
    runners = OnnxRuntimeRunner(campplus_onnx, 1), OnnxRuntimeRunner(inside, 1)
    for duration_s in (0.5, 0.77, 1.0, 2.345, 3.0, 5.5, 10.0, 30.0):
        expected, found = (runner.embed(speech[: int(duration_s * 16000)], 16000) for runner in runners)
        assert cosine(found, expected) >= 0.9999, duration_s


def test_graph_with_the_front_end_takes_waveforms(tiny_waveform: Artifact) -> None:
    graph = onnx.load_from_string(tiny_waveform.onnx).graph
    axes = [axis.dim_param or axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim]
    assert (graph.input[0].name, axes) == ("waveform", ["batch", "samples"])
    assert tiny_waveform.front_end.in_graph
    assert "the front end is in the graph: cosine 1.0" in tiny_waveform.history[-1].notes[-1]
    waveforms = np.stack([voice(1.0, seed) for seed in range(3)])
    runner = OnnxRuntimeRunner(tiny_waveform, 1)
    for one, waveform in zip(runner.run(waveforms), waveforms, strict=True):
        np.testing.assert_allclose(one, runner.embed(waveform, 16000), rtol=1e-4, atol=1e-5)


def test_artifact_with_its_front_end_in_the_graph_is_used_as_any_other(
    tiny_waveform, tiny_onnx, tmp_path: Path
) -> None:
    runner = OnnxRuntimeRunner(tiny_waveform, 1)
    golden = golden_outputs(runner, [voice(1.0), voice(2.0)])
    assert golden.keys() == {"waveform_0", "embedding_0", "waveform_1", "embedding_1"}
    replace(tiny_waveform, golden=golden).save(tmp_path / "artifact")
    loaded = Artifact.load(tmp_path / "artifact")
    assert loaded.front_end == tiny_waveform.front_end
    assert golden_cosine(OnnxRuntimeRunner(loaded, 1), loaded) >= 0.999999
    expected = OnnxRuntimeRunner(tiny_onnx, 1).embed(voice(1.5), 16000)
    for source in (tmp_path / "artifact", tmp_path / "artifact" / "model.onnx"):
        assert cosine(load(source, 1).embed(voice(1.5), 16000), expected) >= 0.9999
    with pytest.raises(InputError, match=r"0\.025 s \(1 frames\) is too short for an embedding"):
        load(tmp_path / "artifact").embed(voice(0.025), 16000)


def test_file_with_the_front_end_opens_as_it_was_made(tiny_waveform: Artifact, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(tiny_waveform.onnx)
    opened = Artifact.open(tmp_path / "model.onnx")
    assert opened.front_end == tiny_waveform.front_end
    assert opened.embedding_size == tiny_waveform.embedding_size
    model = onnx.load_from_string(tiny_waveform.onnx)
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ModelError, match=r"takes a waveform; .* metadata must tell num_mel_bins"):
        Artifact.open(tmp_path / "model.onnx")


def test_wrong_front_end_is_not_let_through(tiny: Artifact, tiny_onnx: Artifact, tiny_waveform: Artifact) -> None:
    model = onnx.load_from_string(tiny_waveform.onnx)
    (log,) = [node for node in model.graph.node if node.op_type == "Log"]
    log.op_type = "Sqrt"
    wrong = replace(tiny_waveform, files={"model.onnx": model.SerializeToString()})
    assert front_end_parity(tiny_onnx, wrong, 1) < FRONT_END_COSINE <= front_end_parity(tiny_onnx, tiny_waveform, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "export", lambda *_: onnx.load_from_string(tiny_onnx.onnx))
        patch.setattr(onnx_export, "join_front_end", lambda front, network: model)
        with pytest.raises(ModelError, match=r"onnx: with the front end in the graph, embeddings have cosine -?0\."):
            Onnx(waveform=True).run(tiny, Context())


def test_metadata_does_not_promise_features_to_sherpa_where_they_are_computed_inside(
    campplus: Artifact, tiny_waveform: Artifact
) -> None:
    model = onnx.load_from_string(tiny_waveform.onnx)
    inside = replace(campplus, front_end=replace(campplus.front_end, in_graph=True))
    onnx_export.add_metadata(model, inside)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert not {"framework", "language"} & told.keys()
    assert (told["num_mel_bins"], told["sample_rate"], told["output_dim"]) == ("80", "16000", "192")


def test_quantized_network_gets_its_front_end_back(tiny_waveform: Artifact, tiny_int8: Artifact) -> None:
    front, _ = split_front_end(onnx.load_from_string(tiny_waveform.onnx))
    assert front is not None
    joined = join_front_end(front, onnx.load_from_string(tiny_int8.onnx))
    inside = replace(tiny_waveform, files={"model.onnx": joined.SerializeToString()})
    expected, found = (OnnxRuntimeRunner(a, 1).embed(voice(2.0), 16000) for a in (tiny_int8, inside))
    assert cosine(found, expected) >= 0.999


def test_tensorrt_refuses_a_front_end_in_the_graph(tiny_waveform: Artifact) -> None:
    with pytest.raises(ModelError, match=r"trt: the front end is in the graph, .* Export without onnx\.waveform"):
        TRT().run(tiny_waveform, Context())


def test_fsmn_vad_exports_with_free_batch_and_frames() -> None:
    torch.manual_seed(0)
    network = FSMNVAD(40, 12, 2, 16, 8, 5, 2, 1, 1, 12, 6).eval()
    graph = export(network, 40, 18)
    session = open_session(graph.SerializeToString(), 1)
    for batch, frames in ((1, 3), (1, 97), (3, 41)):
        features = features_of(batch, frames, 40)
        with torch.no_grad():
            expected = network(torch.from_numpy(features)).numpy()
        assert relative_error(session.run(None, {"feats": features})[0], expected) <= 1e-4
