"""Small networks for the surgery tests; random batch-norm statistics, so that equality means something."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from compress.models.campplus import CAMPPlus
from compress.surgery import ChannelGraph, trace

MEL_BINS = 8


@torch.no_grad()
def randomise(model: nn.Module, mel_bins: int) -> nn.Module:
    """Random batch-norm scale and offset, statistics near those of noise (so that few channels are dead); eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.5)
    model.train()(torch.randn(4, 40, mel_bins))
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.momentum = 0.1
        norm.running_mean.add_(0.3 * norm.running_var.sqrt() * torch.randn(norm.num_features))
        norm.running_var.mul_(torch.rand(norm.num_features) + 0.5)
    return model.eval()


class Pooled(nn.Module):
    """A body over (batch, channels, frames), then mean and std pooling and the embedding."""

    def __init__(self, body: nn.Module, channels: int, eps: float = 0.0) -> None:
        super().__init__()
        self.body = body
        self.eps = eps
        self.embedding = nn.Linear(2 * channels, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x.transpose(1, 2)).flatten(1, -2)
        std = torch.sqrt(y.var(-1) + self.eps) if self.eps else y.std(-1)
        result: Tensor = self.embedding(torch.cat([y.mean(-1), std], dim=1))
        return result


class Shared(nn.Module):
    """One convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(MEL_BINS, 16, 3)
        self.twice = nn.Conv1d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return torch.relu(self.norm(self.twice(torch.relu(self.twice(y)))))


class Tied(nn.Module):
    """Two convolutions that are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(MEL_BINS, 16, 3)
        self.left = nn.Conv1d(16, 16, 1)
        self.right = nn.Conv1d(16, 16, 1, bias=False)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return torch.relu(self.right(torch.relu(self.left(y))))


class Gated(nn.Module):
    """A squeeze-and-excitation gate, then a convolution behind a sigmoid, where zero does not stay zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(MEL_BINS, 24, 3)
        self.squeeze = nn.Linear(24, 12)
        self.excite = nn.Linear(12, 24)
        self.last = nn.Conv1d(24, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean(-1)))))
        return torch.relu(self.last(torch.sigmoid(y * gate.unsqueeze(-1))))


class Depthwise(nn.Module):
    """Pointwise, depthwise with bias, a learned gain per channel and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(MEL_BINS, 16, 1)
        self.depthwise = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.gain = nn.Parameter(torch.rand(1, 16, 1) + 0.5)
        self.slope = nn.PReLU(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.slope(self.enter(x))
        result: Tensor = y + self.gain * self.depthwise(y)
        return result


class Attentive(nn.Module):
    """Soft attention over time, weighted per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(MEL_BINS, 16, 1)
        self.hidden = nn.Conv1d(16, 12, 1)
        self.weight = nn.Conv1d(12, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.enter(x))
        return y * torch.softmax(self.weight(torch.tanh(self.hidden(y))), dim=-1)


class Image(nn.Module):
    """2-D convolutions with a residual connection; (batch, mel, frames) -> (batch, channels, mel / 2, frames)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, (2, 1), padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.shortcut = nn.Conv2d(16, 32, 1, (2, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x.unsqueeze(1))))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(y))


def tdnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(MEL_BINS, 24, 3),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(24),
        nn.Conv1d(24, 16, 3, dilation=2, padding="same"),
        nn.BatchNorm1d(16, affine=False),
        nn.GELU(),
    )


ZOO: dict[str, Callable[[], nn.Module]] = {
    "tdnn": lambda: Pooled(tdnn(), 16),
    "shared": lambda: Pooled(Shared(), 16),
    "tied": lambda: Pooled(Tied(), 16),
    "gated": lambda: Pooled(Gated(), 16),
    "depthwise": lambda: Pooled(Depthwise(), 16),
    "attentive": lambda: Pooled(Attentive(), 16),
    "image": lambda: Pooled(Image(), 32 * MEL_BINS // 2),
    "image with eps": lambda: Pooled(Image(), 32 * MEL_BINS // 2, eps=1e-3),
}


@dataclass(frozen=True)
class Traced:
    """A network with its channel graph."""

    model: nn.Module
    graph: ChannelGraph


def traced(model: nn.Module, mel_bins: int) -> Traced:
    return Traced(model, trace(model, torch.randn(2, 40, mel_bins)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def zoo() -> dict[str, Traced]:
    """Every small network, traced."""
    torch.manual_seed(0)
    return {name: traced(randomise(make(), MEL_BINS), MEL_BINS) for name, make in ZOO.items()}


@pytest.fixture(scope="session")
def campplus() -> Traced:
    """CAM++ with half the channels."""
    torch.manual_seed(0)
    return traced(randomise(CAMPPlus(growth_rate=16, bn_size=2, init_channels=64), 80), 80)


@pytest.fixture(scope="session")
def full_campplus() -> Traced:
    """CAM++ in the size of the public 192-d model."""
    torch.manual_seed(0)
    return traced(randomise(CAMPPlus(), 80), 80)
