"""Fixtures shared by all tests."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import soundfile
import torch
from hypothesis import settings
from onnx import helper, numpy_helper
from torch import Tensor, nn

from compress.artifact import Artifact, FrontEnd
from compress.data import DataFolder, embedded_data
from compress.models import architecture
from compress.models.campplus import CAMPPlus
from compress.models.ecapa_tdnn import ECAPATDNN
from compress.passes import PTQ, TRT, Context, Onnx, OpenVINO, Prune, onnx_export
from compress.pipeline import RunConfig, run

REPOSITORY = Path(__file__).parent.parent
settings.register_profile("untimed", deadline=None)  # a test may take long on a machine with other work
settings.load_profile("untimed")
os.environ["COMPRESS_CACHE"] = "off"  # no test leaves compiled networks in the user's cache folder


@pytest.fixture(scope="session")
def bench_data() -> Path:
    """Folder with public speech, noise and reference vectors; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("COMPRESS_BENCH_DATA", REPOSITORY / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no benchmark data at {folder}; set COMPRESS_BENCH_DATA")
    return folder


class Tiny(nn.Module):
    """A small network that the package does not know: two TDNN layers, attentive mean and deviation, embedding."""

    def __init__(self, num_mel_bins: int = 16, channels: int = 48, embedding_size: int = 24) -> None:
        super().__init__()
        self.first = nn.Conv1d(num_mel_bins, channels, 5, padding=2, bias=False)
        self.norm1 = nn.BatchNorm1d(channels)
        self.second = nn.Conv1d(channels, channels, 3, padding=2, dilation=2)
        self.norm2 = nn.BatchNorm1d(channels)
        self.embedding = nn.Linear(2 * channels, embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.first(x.transpose(1, 2))))
        y = torch.relu(self.norm2(self.second(y)))
        weights = torch.softmax(y.transpose(1, 2) @ y.mean(-1, keepdim=True) / y.shape[1], dim=1)
        result: Tensor = self.embedding(torch.cat([(y @ weights).squeeze(-1), y.std(-1)], dim=1))
        return result


@torch.no_grad()
def settle(model: nn.Module, num_mel_bins: int) -> nn.Module:
    """Give batch norms random scales and offsets and the statistics of noise, so that they all matter."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
    model.train()(torch.randn(4, 120, num_mel_bins))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@pytest.fixture(scope="session")
def fresh_tiny() -> Callable[..., nn.Module]:
    """Makes instances of a network that the package does not know."""
    return Tiny


@pytest.fixture(scope="session")
def noise() -> Callable[..., list[np.ndarray]]:
    """Makes features of noise, (frames, num_mel_bins) each, of many lengths."""

    def make(count: int, num_mel_bins: int, seed: int = 0) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [rng.standard_normal((60 + 37 * i % 150, num_mel_bins)).astype(np.float32) for i in range(count)]

    return make


@pytest.fixture(scope="session")
def tiny() -> Artifact:
    """A foreign network of 13 thousand parameters and 16 mel bins; it exports in a few seconds."""
    torch.manual_seed(0)
    return Artifact.from_module(settle(Tiny(), 16), FrontEnd(num_mel_bins=16))


@pytest.fixture(scope="session")
def tiny_teacher() -> Artifact:
    """A network like the tiny one, of other weights and a little wider."""
    torch.manual_seed(1)
    return Artifact.from_module(settle(Tiny(channels=56), 16), FrontEnd(num_mel_bins=16))


@pytest.fixture(scope="session")
def tiny_context(noise, tiny_teacher: Artifact) -> Context:
    """Calibration features of seven speakers for the tiny network, in a run that started from ``tiny_teacher``."""
    calibration = [lambda features=features: features for features in noise(60, 16)]
    return Context(calibration=calibration, source=tiny_teacher, speakers=[f"s{i % 7}" for i in range(60)])


@pytest.fixture(scope="session")
def tiny_onnx(tiny: Artifact) -> Artifact:
    return Onnx().run(tiny, Context())


@pytest.fixture(scope="session")
def tiny_waveform(tiny: Artifact, tiny_onnx: Artifact) -> Artifact:
    """The tiny network with the front end in its graph; the network itself is not exported anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "export", lambda *_: onnx.load_from_string(tiny_onnx.onnx))
        return Onnx(waveform=True).run(tiny, Context())


@pytest.fixture(scope="session")
def tiny_int8(tiny_onnx: Artifact, tiny_context: Context) -> Artifact:
    return PTQ(utterances=20).run(tiny_onnx, tiny_context)


@pytest.fixture(scope="session")
def tiny_openvino(tiny_onnx: Artifact) -> Artifact:
    return OpenVINO().run(tiny_onnx, Context())


@pytest.fixture(scope="session")
def tiny_bf16(tiny_onnx: Artifact, tiny_context: Context) -> Artifact:
    return OpenVINO(precision="bf16").run(tiny_onnx, tiny_context)


@pytest.fixture(scope="session")
def tiny_openvino_int8(tiny_int8: Artifact, tiny_context: Context) -> Artifact:
    return OpenVINO().run(tiny_int8, tiny_context)


@pytest.fixture(scope="session")
def small_arguments() -> dict[str, dict[str, Any]]:
    """What makes each network known by name small; its ends are the caller's."""
    return {
        "campplus": {"growth_rate": 8, "bn_size": 2, "init_channels": 8},
        "tdnn_blstm": {"channels": 12, "hidden_size": 8, "attention_channels": 6},
        "ecapa_tdnn": {"channels": [16, 16, 16, 16, 24], "attention_channels": 6, "res2net_scale": 4, "se_channels": 6},
        "eres2net": {"m_channels": 4},
        "eres2netv2": {"m_channels": 8, "scale": 3},
        "resnet34": {"m_channels": 3},
        "fsmn_vad": {"input_affine_dim": 12, "linear_dim": 14, "proj_dim": 8, "output_affine_dim": 10, "output_dim": 9},
    }


@pytest.fixture(scope="session")
def small_network(small_arguments: dict[str, dict[str, Any]]) -> Callable[[str], nn.Module]:
    """Makes a small network known by name, of 16 mel bins and an embedding of 10."""

    def make(name: str) -> nn.Module:
        torch.manual_seed(0)
        return settle(architecture(name).build(feat_dim=16, embedding_size=10, **small_arguments[name]), 16)

    return make


@pytest.fixture(scope="session")
def small_campplus() -> Artifact:
    """CAM++ of half the width with random weights."""
    torch.manual_seed(0)
    arguments = {"growth_rate": 16, "bn_size": 2, "init_channels": 64}
    return Artifact.from_module(settle(CAMPPlus(**arguments), 80), arch="campplus", arguments=arguments)


@pytest.fixture(scope="session")
def campplus() -> Artifact:
    """CAM++ with the embedded trained weights."""
    return Artifact.open("campplus")


@pytest.fixture(scope="session")
def speech_features() -> list[np.ndarray]:
    """Features (frames, 80) of 24 utterances of the embedded speech, of different lengths."""
    data = DataFolder.read(embedded_data()).calibration(count=24)
    return [FrontEnd()(data.waveform(utterance, 16000)) for utterance in data.utterances]


@pytest.fixture(scope="session")
def speech_context(speech_features: list[np.ndarray]) -> Context:
    """Calibration features for CAM++."""
    return Context(calibration=[lambda features=features: features for features in speech_features])


@pytest.fixture(scope="session")
def campplus_onnx(campplus: Artifact) -> Artifact:
    """The embedded CAM++ as ONNX: 20 s of export, made once for all tests."""
    return Onnx().run(campplus, Context())


@pytest.fixture(scope="session")
def campplus_int8(campplus_onnx: Artifact, speech_context: Context) -> Artifact:
    return PTQ(utterances=12).run(campplus_onnx, speech_context)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB; tests that need it skip where it cannot be mounted."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"a small disk needs mount: {error}")
    if done.returncode:
        pytest.skip(f"a small disk needs the right to mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def speech_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 6 speakers, 3 utterances of 1 s each, with trials and a calibration list. Not to be changed."""
    return write_speech(tmp_path_factory.mktemp("speech") / "data", 4000)


@pytest.fixture(scope="session")
def other_speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of another second of the same utterances. Not to be changed."""
    return write_speech(tmp_path_factory.mktemp("other") / "data", 24000)


def write_speech(folder: Path, start: int) -> Path:
    """Write one second of 3 utterances of 6 speakers each, from sample ``start`` on."""
    (folder / "wav").mkdir(parents=True)
    source = DataFolder.read(embedded_data())
    speakers = sorted(set(source.speakers.values()))[:6]
    chosen = [u for s in speakers for u in [u for u in source.utterances if source.speakers[u] == s][:3]]
    for utterance in chosen:
        soundfile.write(folder / "wav" / f"{utterance}.wav", source.waveform(utterance, 16000)[start:][:16000], 16000)
    scp = "".join(f"{utterance} wav/{utterance}.wav\n" for utterance in chosen)
    pairs = [(a, b) for i, a in enumerate(chosen) for b in chosen[:i]]
    trials = "".join(f"{int(source.speakers[a] == source.speakers[b])} {a} {b}\n" for a, b in pairs)
    (folder / "wav.scp").write_text(scp)
    (folder / "calib.scp").write_text(scp)
    (folder / "utt2spk").write_text("".join(f"{utterance} {source.speakers[utterance]}\n" for utterance in chosen))
    (folder / "trials").write_text(trials)
    return folder


@pytest.fixture
def own_speech(speech_folder: Path, tmp_path: Path) -> Path:
    """A copy of ``speech_folder`` to break."""
    return Path(shutil.copytree(speech_folder, tmp_path / "speech"))


@pytest.fixture(scope="session")
def tiny_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file of 6 thousand weights: two layers, the mean over time, an embedding of 24. Runs in microseconds."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (80, 48), "b1": (48,), "w2": (48, 32), "w3": (32, 24), "b3": (24,)}
    weights = {
        name: (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32) for name, shape in shapes.items()
    }
    nodes = [
        helper.make_node("MatMul", ["feats", "w1"], ["product"], "first"),
        helper.make_node("Add", ["product", "b1"], ["sum"], "bias"),
        helper.make_node("Relu", ["sum"], ["hidden"], "relu1"),
        helper.make_node("MatMul", ["hidden", "w2"], ["product2"], "second"),
        helper.make_node("Relu", ["product2"], ["hidden2"], "relu2"),
        helper.make_node("ReduceMean", ["hidden2", "axes"], ["pooled"], "pool", keepdims=0),
        helper.make_node("Gemm", ["pooled", "w3", "b3"], ["embedding"], "embed"),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("feats", ["batch", "frames", 80]), ("embedding", ["batch", 24]))
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    initializers.append(numpy_helper.from_array(np.array([1]), "axes"))
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:], initializers)
    path = tmp_path_factory.mktemp("graph") / "tiny.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {"sample_rate": "16000", "feature_normalize_type": "global-mean"})
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="session")
def graph_of() -> Callable[..., onnx.ModelProto]:
    """Makes a graph from feats (batch, frames, 8) through x (batch, 8, frames) to the value ``y``.

    Its weights are seeded noise of the shapes that are given; those named ``var...`` are positive.
    """

    def make(text: str, shapes: Mapping[str, tuple[int, ...]], rank: int = 3, opset: int = 18) -> onnx.ModelProto:
        head = f'<ir_version: 9, opset_import: ["" : {opset}]> '
        axes = ", ".join("NABC"[:rank])
        ends = f"net (float[batch, frames, 8] feats) => (float[{axes}] y) "
        body = "{ x = Transpose <perm = [0, 2, 1]> (feats)\n" + text + "}"
        model = onnx.parser.parse_model(head + ends + body)
        rng = np.random.default_rng(0)
        for name, shape in shapes.items():
            values = rng.uniform(0.5, 2, shape) if name.startswith("var") else rng.standard_normal(shape)
            model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        onnx.checker.check_model(model)
        return model

    return make


@pytest.fixture
def foreign_graph(tiny_graph: Path, tmp_path: Path) -> Path:
    """The same file without metadata."""
    model = onnx.load(tiny_graph)
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "foreign.onnx"))
    return tmp_path / "foreign.onnx"


@pytest.fixture(scope="session")
def small_checkpoint(small_campplus: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of ``small_campplus`` as a checkpoint file."""
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    safetensors.torch.save_file(small_campplus.module.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def finished_run(speech_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``prune,ptq,trt`` over a narrow ECAPA-TDNN with random weights. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    torch.manual_seed(0)
    arguments = {"embedding_size": 64, "channels": [128, 128, 128, 128, 256], "res2net_scale": 4}
    network = Artifact.from_module(settle(ECAPATDNN(**arguments), 80), arch="ecapa_tdnn", arguments=arguments)
    network.save(folder.with_name("ecapa"))
    passes = (Prune(ratio=0.3, scope="uniform", bn_utterances=8), PTQ(utterances=8), TRT())
    run(RunConfig(passes, str(folder.with_name("ecapa")), data=str(speech_folder), out=str(folder), timing_s=0.0))
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_graph: Path, speech_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``ptq,trt`` over the tiny graph. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run(RunConfig((PTQ(utterances=8), TRT()), str(tiny_graph), data=str(speech_folder), out=str(folder), timing_s=0.0))
    return folder


@pytest.fixture(scope="session")
def lasting() -> Callable[[Path], dict[str, Any]]:
    """Reads the table of a run folder without what differs from run to run: times, memory and the folder's name."""

    def read(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / "table.json").read_text())
        del found["created"], found["run"]
        for figures in found["rows"]:
            for name in ("latency_ms", "e2e_latency_ms", "speedup", "rtf", "qps", "peak_rss_bytes", "build_s"):
                del figures[name]
        return found

    return read
