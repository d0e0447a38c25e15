"""Fixtures shared by all tests."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.artifact import Artifact, FrontEnd
from compress.data import DataFolder, embedded_data
from compress.models.campplus import CAMPPlus
from compress.passes import PTQ, Context, Onnx

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def bench_data() -> Path:
    """Folder with public speech, noise and reference vectors; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("COMPRESS_BENCH_DATA", REPOSITORY / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no benchmark data at {folder}; set COMPRESS_BENCH_DATA")
    return folder


class Tiny(nn.Module):
    """A small network that the package does not know: two TDNN layers, attentive mean, standard deviation, embedding."""

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
    """Give batch norms a random affine part and the statistics of noise, so that no layer passes its input as it is."""
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
def tiny_context(noise) -> Context:
    """Calibration features for the tiny network."""
    return Context(calibration=[lambda features=features: features for features in noise(60, 16)])


@pytest.fixture(scope="session")
def tiny_onnx(tiny: Artifact) -> Artifact:
    return Onnx().run(tiny, Context())


@pytest.fixture(scope="session")
def tiny_int8(tiny_onnx: Artifact, tiny_context: Context) -> Artifact:
    return PTQ(utterances=20).run(tiny_onnx, tiny_context)


@pytest.fixture(scope="session")
def small_campplus() -> Artifact:
    """CAM++ of half the width with random weights."""
    torch.manual_seed(0)
    arguments = {"growth_rate": 16, "bn_size": 2, "init_channels": 64}
    return Artifact.from_module(settle(CAMPPlus(**arguments), 80), arch="campplus", arguments=arguments)


@pytest.fixture(scope="session")
def small_campplus_onnx(small_campplus: Artifact) -> Artifact:
    return Onnx().run(small_campplus, Context())


@pytest.fixture(scope="session")
def small_campplus_int8(small_campplus_onnx: Artifact, noise) -> Artifact:
    calibration = [lambda features=features: features for features in noise(10, 80)]
    return PTQ(utterances=10).run(small_campplus_onnx, Context(calibration=calibration))


@pytest.fixture(scope="session")
def speech_features() -> list[np.ndarray]:
    """Features (frames, 80) of 24 utterances of the embedded speech."""
    data = DataFolder.read(embedded_data()).calibration(count=24)
    return [FrontEnd()(data.waveform(utterance, 16000)) for utterance in data.utterances]


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
