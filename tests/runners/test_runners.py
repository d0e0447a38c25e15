"""Every runtime gives PyTorch's embedding; waveforms of any rate are taken; errors say what to do."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compress
from compress.artifact import Artifact, Format, FrontEnd
from compress.audio import read_audio, resample
from compress.data import DataFolder, embedded_data
from compress.errors import InputError, MachineError, ModelError
from compress.models import architecture
from compress.runners import (
    RUNNERS,
    OnnxRuntimeRunner,
    OpenVinoRunner,
    Runner,
    TensorRTRunner,
    TorchRunner,
    golden_outputs,
    load,
    open_runner,
    runners_for,
    torch_threads,
)

RUNNABLE = ["tiny", "tiny_onnx", "tiny_int8", "tiny_openvino", "tiny_bf16", "tiny_openvino_int8"]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def tone(sample_rate: int, duration_s: float = 1.0) -> np.ndarray:
    """Speech-like noise below 3 kHz, the same whatever the rate."""
    time = np.arange(int(duration_s * sample_rate)) / sample_rate
    rng = np.random.default_rng(0)
    parts = [rng.uniform(0.2, 1) * np.sin(2 * np.pi * (f * time + rng.random())) for f in rng.uniform(100, 3000, 60)]
    return (np.sum(parts, axis=0) / 60).astype(np.float32)


@pytest.fixture(scope="module")
def opened(tiny_onnx, tiny_int8, tiny_openvino, tiny_bf16, tiny_openvino_int8) -> list[Runner]:
    """Every exported form of the tiny network, in every runtime that runs it."""
    artifacts = (tiny_onnx, tiny_int8, tiny_openvino, tiny_bf16, tiny_openvino_int8)
    return [kind(artifact, 1) for artifact in artifacts for kind in runners_for(artifact.format)]


@settings(deadline=None, max_examples=40)
@given(frames=st.integers(3, 400), batch=st.integers(1, 4))
def test_every_runtime_gives_the_embedding_of_pytorch(tiny, opened: list[Runner], frames: int, batch: int) -> None:
    features = np.random.default_rng(frames).standard_normal((batch, frames, 16)).astype(np.float32)
    expected = TorchRunner(tiny, 1).run(features)
    assert expected.dtype == np.float32
    for runner in opened:
        embedding = runner.run(features)
        assert (embedding.shape, embedding.dtype) == (expected.shape, expected.dtype)
        if runner.artifact.precision == "fp32":
            assert np.abs(embedding - expected).max() <= 1e-4 * np.abs(expected).max()
        else:
            assert all(cosine(a, b) > 0.98 for a, b in zip(embedding, expected, strict=True))


def test_campplus_is_the_same_in_every_runtime(campplus, campplus_onnx, campplus_int8) -> None:
    data = DataFolder.read(embedded_data())
    for utterance in data.utterances[:3]:
        waveform = data.waveform(utterance, 16000)
        expected = open_runner(campplus, 1).embed(waveform, 16000)
        embedding = open_runner(campplus_onnx, 1).embed(waveform, 16000)
        assert np.abs(embedding - expected).max() <= 1e-4 * np.abs(expected).max()
        assert cosine(open_runner(campplus_int8, 1).embed(waveform, 16000), expected) > 0.95


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("sample_rate", [8000, 22050, 44100, 48000])
def test_embed_resamples_to_the_rate_of_the_model(request, name: str, sample_rate: int) -> None:
    runner = open_runner(request.getfixturevalue(name), 1)
    other = runner.embed(tone(sample_rate), sample_rate)
    assert other.shape == (24,)
    assert np.array_equal(other, runner.embed(resample(tone(sample_rate), sample_rate, 16000), 16000))
    wrong = runner.embed(tone(sample_rate), 16000)
    assert cosine(other, runner.embed(tone(16000), 16000)) > cosine(wrong, runner.embed(tone(16000), 16000))


@pytest.mark.parametrize("name", RUNNABLE)
def test_embed_is_run_on_the_features(request, name: str) -> None:
    artifact = request.getfixturevalue(name)
    runner = open_runner(artifact, 1)
    features = artifact.front_end(tone(16000))
    assert np.array_equal(runner.embed(tone(16000), 16000), runner.run(features[None])[0])


@pytest.mark.parametrize("name", RUNNABLE)
def test_threads_do_not_change_the_embedding(request, name: str, noise) -> None:
    artifact, features = request.getfixturevalue(name), noise(1, 16)[0][None]
    before = torch.get_num_threads()
    try:
        one, two, free = (open_runner(artifact, threads).run(features) for threads in (1, 2, None))
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(free, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RUNNABLE)
def test_features_need_not_be_contiguous(request, name: str) -> None:
    runner = open_runner(request.getfixturevalue(name), 1)
    turned = np.random.default_rng(0).standard_normal((2, 16, 50)).astype(np.float32).transpose(0, 2, 1)
    assert np.array_equal(runner.run(turned), runner.run(np.ascontiguousarray(turned)))


def test_folder_opens_in_one_call(tiny_int8: Artifact, tmp_path: Path) -> None:
    tiny_int8.save(tmp_path / "artifact")
    for opened in (load(tmp_path / "artifact"), compress.load(str(tmp_path / "artifact"), threads=1)):
        embedding = opened.embed(tone(16000), 16000)
        assert np.array_equal(embedding, open_runner(tiny_int8, 1).embed(tone(16000), 16000))
        assert (opened.runtime, opened.device) == ("onnxruntime", "cpu")


def test_golden_outputs_are_those_of_the_runner(tiny_onnx: Artifact, noise) -> None:
    runner = open_runner(tiny_onnx, 1)
    features = noise(3, 16)
    golden = golden_outputs(runner, features)
    assert set(golden) == {f"{kind}_{i}" for kind in ("features", "embedding") for i in range(3)}
    for i, utterance in enumerate(features):
        assert np.array_equal(golden[f"features_{i}"], utterance[None])
        assert np.array_equal(golden[f"embedding_{i}"], runner.run(utterance[None]))


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.zeros(0, np.float32), "waveform holds no samples"),
        (np.zeros(16000, np.float32), "waveform is digital silence throughout"),
        (np.full(16000, np.nan, np.float32), "waveform holds NaN or infinite samples"),
        (np.ones((2, 16000), np.float32), r"a waveform has one axis \(samples,\), got shape \(2, 16000\)"),
        (tone(16000)[:200], "one Fbank frame needs 400"),
        (
            tone(16000)[:410],
            r"a waveform of 0\.026 s \(1 frames\) is too short for an embedding\. Give a longer one",
        ),
    ],
    ids=["empty", "silent", "nan", "stereo", "no frame", "one frame"],
)
def test_unusable_waveform_is_told(request, name: str, waveform: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_runner(request.getfixturevalue(name), 1).embed(waveform, 16000)


@pytest.mark.parametrize(
    ("name", "arguments", "fewest"),
    [
        ("resnet34", {"m_channels": 2}, 9),
        ("ecapa_tdnn", {"channels": [8, 8, 8, 8, 8], "attention_channels": 4, "se_channels": 4}, 5),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_network_tells_its_shortest_waveform(name: str, arguments: dict, fewest: int) -> None:
    network = Artifact.from_module(architecture(name).build(**arguments), arch=name, arguments=arguments)
    runner = open_runner(network, 1)
    samples = 400 + 160 * (fewest - 1)
    assert np.isfinite(runner.embed(tone(16000)[:samples], 16000)).all()
    with pytest.raises(InputError, match=rf"\({fewest - 1} frames\) is too short for an embedding"):
        runner.embed(tone(16000)[: samples - 1], 16000)


def test_embedding_that_is_not_a_number_is_told(fresh_tiny) -> None:
    class Overflows(type(fresh_tiny())):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.log(x.abs().amax() - 1e9)

    with pytest.raises(
        ModelError, match=r"torch: the embedding of a waveform of 1\.000 s \(98 frames\) is not a number"
    ):
        TorchRunner(Artifact.from_module(Overflows(), FrontEnd(num_mel_bins=16)), 1).embed(tone(16000), 16000)


@pytest.mark.parametrize("kind", RUNNERS, ids=lambda kind: kind.runtime)
def test_wrong_format_is_told(kind, tiny: Artifact, tiny_onnx: Artifact) -> None:
    for artifact in (tiny, tiny_onnx):
        if artifact.format != kind.format:
            with pytest.raises(ModelError, match=rf"{kind.runtime} runs {kind.format.value} artifacts, not"):
                kind(artifact)


def test_format_without_a_runtime_is_told(tiny_onnx: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorRTRunner, "missing", lambda: "there is no NVIDIA driver.")
    assert runners_for(Format.TENSORRT) == []
    with pytest.raises(MachineError, match=r"runs tensorrt artifacts\. tensorrt: there is no NVIDIA driver"):
        open_runner(replace(tiny_onnx, format=Format.TENSORRT))


def test_runtime_that_is_not_installed_is_told(tiny_openvino: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MachineError, match=r"runs openvino artifacts\. openvino: OpenVINO is not installed\. .* pip inst"
    ):
        open_runner(tiny_openvino)


def test_openvino_serves_several_threads_at_once(tiny_openvino: Artifact, noise) -> None:
    runner, utterances = OpenVinoRunner(tiny_openvino, 1), noise(6, 16)
    expected = [runner.run(utterance[None]) for utterance in utterances]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda utterance: runner.run(utterance[None]), utterances * 10))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected * 10, strict=True))


def test_openvino_keeps_the_compiled_network(
    tiny_openvino: Artifact, noise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    tiny_openvino.save(tmp_path / "artifact")
    before = sorted((tmp_path / "artifact").iterdir())
    first, second = (load(tmp_path / "artifact", threads=1) for _ in range(2))
    assert isinstance(first, OpenVinoRunner)
    assert isinstance(second, OpenVinoRunner)
    assert (first.from_cache, second.from_cache) == (False, True)
    features = noise(1, 16)[0][None]
    assert np.array_equal(first.run(features), second.run(features))
    assert sorted((tmp_path / "artifact").iterdir()) == before


def test_every_runtime_has_its_own_name() -> None:
    names = [kind.runtime for kind in RUNNERS]
    assert len(set(names)) == len(names)
    assert {TorchRunner, OnnxRuntimeRunner, OpenVinoRunner} <= set(RUNNERS)


def test_recording_of_another_rate_reads_and_embeds(tiny_onnx: Artifact, tmp_path: Path) -> None:
    import soundfile

    soundfile.write(tmp_path / "stereo.flac", np.stack([tone(44100)] * 2, axis=1), 44100)
    runner = open_runner(tiny_onnx, 1)
    embedding = runner.embed(read_audio(tmp_path / "stereo.flac", 16000), 16000)
    assert cosine(embedding, runner.embed(tone(16000), 16000)) > 0.99


@pytest.mark.parametrize("folder", [False, True])
def test_a_name_opens_the_embedded_weights(
    campplus: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if folder:
        Path("campplus").mkdir()  # of something else: it holds no artifact
    assert compress.load("campplus", threads=1).artifact.sha256 == campplus.sha256


def test_an_artifact_in_a_folder_of_that_name_is_taken(
    tiny_onnx: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_onnx.save(Path("campplus"))
    assert compress.load("campplus").artifact.sha256 == tiny_onnx.sha256


def test_a_graph_file_is_loaded(tiny_graph: Path) -> None:
    assert compress.load(tiny_graph).artifact.embedding_size == 24


def test_torch_threads_are_set_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
