"""Exported graphs load in sherpa-onnx and give embeddings there."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from compress.artifact import Artifact
from compress.data import DataFolder, embedded_data
from compress.passes.onnx_export import add_metadata
from compress.runners import OnnxRuntimeRunner
from compress.vectors import cosine

sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")
knf = pytest.importorskip("kaldi_native_fbank", reason="kaldi-native-fbank is not installed")

Embed = Callable[[np.ndarray], np.ndarray]


def in_sherpa(path: Path) -> Embed:
    """Embeddings by sherpa-onnx of waveforms at 16 kHz."""
    config = sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=str(path), num_threads=1)
    assert config.validate()
    extractor = sherpa_onnx.SpeakerEmbeddingExtractor(config)

    def embed(waveform: np.ndarray) -> np.ndarray:
        stream = extractor.create_stream()
        stream.accept_waveform(16000, waveform)
        stream.input_finished()
        assert extractor.is_ready(stream)
        return np.array(extractor.compute(stream), np.float32)

    return embed


def features_of_sherpa(waveform: np.ndarray) -> np.ndarray:
    """Fbank as sherpa-onnx sets it up: up to 7600 Hz, frames over the edges, the mean removed."""
    options = knf.FbankOptions()
    options.frame_opts.samp_freq, options.frame_opts.dither, options.frame_opts.snip_edges = 16000, 0.0, False
    options.mel_opts.num_bins, options.mel_opts.high_freq = 80, -400.0
    fbank = knf.OnlineFbank(options)
    fbank.accept_waveform(16000, waveform.tolist())
    fbank.input_finished()
    frames = np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])
    return (frames - frames.mean(0)).astype(np.float32)


@pytest.fixture(scope="module")
def speech() -> list[np.ndarray]:
    data = DataFolder.read(embedded_data())
    return [data.waveform(utterance, 16000) for utterance in data.utterances[:40:10]]


def check(artifact: Artifact, path: Path, speech: list[np.ndarray]) -> list[float]:
    """Compare with our runtime on sherpa-onnx's features; returns the cosines to our own embeddings."""
    path.write_bytes(artifact.onnx)
    embed, runner = in_sherpa(path), OnnxRuntimeRunner(artifact, 1)
    for waveform in speech:
        found, expected = embed(waveform), runner.run(features_of_sherpa(waveform)[None])[0]
        assert found.shape == (artifact.embedding_size,)
        assert cosine(found, expected) >= 0.9999
    return [cosine(embed(waveform), runner.embed(waveform, 16000)) for waveform in speech]


def test_a_graph_with_our_metadata_gives_embeddings_there(
    tiny_graph: Path, speech: list[np.ndarray], tmp_path: Path
) -> None:
    artifact = replace(Artifact.from_onnx(tiny_graph), arch="campplus")
    model = onnx.load_from_string(artifact.onnx)
    add_metadata(model, artifact)
    artifact = replace(artifact, files={"model.onnx": model.SerializeToString()})
    cosines = check(artifact, tmp_path / "tiny.onnx", speech)
    assert min(cosines) > 0.9


@pytest.mark.slow
def test_campplus_gives_embeddings_there(campplus_onnx: Artifact, speech: list[np.ndarray], tmp_path: Path) -> None:
    cosines = check(campplus_onnx, tmp_path / "campplus.onnx", speech)
    assert np.mean(cosines) > 0.9  # their mel filters end at 7600 Hz, ours at 8000 Hz; see docs/passes/onnx.md
