"""Small networks for the surgery tests; random batch-norm statistics, so that equality means something."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.models.campplus import CAMPPlus
from compress.surgery import ChannelGraph, trace
from compress.surgery.widths import least_width

MEL_BINS = 8


@torch.no_grad()
def with_random_statistics(model: nn.Module, mel_bins: int) -> nn.Module:
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


class Recurrent(nn.Module):
    """A recurrent layer over (batch, channels, frames), between convolutions."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, proj_size: int = 0, **settings: Any) -> None:
        super().__init__()
        self.enter = nn.Conv1d(MEL_BINS, 24, 3)
        if proj_size:
            settings["proj_size"] = proj_size
        self.recurrent = kind(24, 16, batch_first=True, **settings)
        width = (proj_size or 16) * (2 if self.recurrent.bidirectional else 1)
        self.leave = nn.Conv1d(width, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.recurrent(torch.relu(self.enter(x)).transpose(1, 2))
        return torch.relu(self.leave(y.transpose(1, 2)))


class LastState(nn.Module):
    """The last state of a recurrent layer is the embedding's input; (batch, frames, mel) in."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(MEL_BINS, 16, layers, batch_first=True)
        self.embedding = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(x)
        result: Tensor = self.embedding(hidden[-1])
        return result


class Residual(nn.Module):
    """Two bidirectional LSTMs with a connection around the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(MEL_BINS, 16, bidirectional=True, batch_first=True)
        self.second = nn.LSTM(32, 16, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.first(x.transpose(1, 2))
        z, _ = self.second(y)
        return (y + z).transpose(1, 2)


class Res2Net(nn.Module):
    """Pieces of the channels, each convolved together with the result of the one before.

    The pieces are cut at a width that the module stores, or into a number of pieces.
    """

    def __init__(self, stored: bool) -> None:
        super().__init__()
        self.width = 12 if stored else 0
        self.enter = nn.Conv1d(MEL_BINS, 48, 1)
        self.norm = nn.BatchNorm1d(48)
        self.convs = nn.ModuleList(nn.Conv1d(12, 12, 3, padding=1) for _ in range(3))
        self.leave = nn.Conv1d(48, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.enter(x)))
        first, *others = torch.split(y, self.width, 1) if self.width else torch.chunk(y, 4, 1)
        done = [first]
        for conv, piece in zip(self.convs, others, strict=True):
            done.append(torch.relu(conv(piece + done[-1] if len(done) > 1 else piece)))
        return torch.relu(self.leave(torch.cat(done, 1)))


class Tried(nn.Module):
    """A call inside ``try``, at which torch.export gives up, then an operator in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Res2Net(stored=True), nn.Conv1d(16, 16, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            try:
                x = layer(x, lengths=None)
            except TypeError:
                x = layer(x)
        return x.relu_()


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(MEL_BINS, 32, 3),
        nn.ReLU(),
        nn.Conv1d(32, 24, 3, groups=4),
        nn.InstanceNorm1d(24, affine=True),
        nn.ReLU(),
        nn.Conv1d(24, 48, 3, groups=24),  # two filters for each channel
        nn.BatchNorm1d(48),
        nn.GLU(1),
    )


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
    "grouped": lambda: Pooled(grouped(), 24),
    "lstm": lambda: Pooled(Recurrent(), 16),
    "blstm": lambda: Pooled(Recurrent(num_layers=2, bidirectional=True), 16),
    "lstm with projection": lambda: Pooled(Recurrent(num_layers=2, proj_size=8), 16),
    "blstm with projection": lambda: Pooled(Recurrent(proj_size=8, bidirectional=True), 16),
    "gru": lambda: Pooled(Recurrent(nn.GRU, num_layers=2, bidirectional=True, bias=False), 16),
    "rnn": lambda: Pooled(Recurrent(nn.RNN), 16),
    "residual blstm": lambda: Pooled(Residual(), 32),
    "last state": lambda: LastState(1),
    "res2net": lambda: Pooled(Res2Net(stored=False), 16),
    "res2net with stored width": lambda: Pooled(Res2Net(stored=True), 16),
    "tried": lambda: Pooled(Tried(), 16),
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


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module, int], nn.Module]:
    """The function that gives a network random batch-norm statistics."""
    return with_random_statistics


DrawChannels: TypeAlias = Callable[[st.DataObject, ChannelGraph], dict[str, set[int]]]


@pytest.fixture(scope="session")
def draw_channels() -> DrawChannels:
    """Any channels of any groups, but for the last of a group; equally many in the groups of a bundle."""

    def draw(data: st.DataObject, graph: ChannelGraph) -> dict[str, set[int]]:
        counts: dict[str, int] = {}
        drawn = {}
        for group in graph.groups():
            most = group.width - least_width(graph, group)
            count = counts.get(group.bundle or "", data.draw(st.integers(0, most)))
            if group.bundle:
                counts[group.bundle] = count
            drawn[group.name] = data.draw(st.sets(st.integers(0, group.width - 1), min_size=count, max_size=count))
        return drawn

    return draw


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def zoo() -> dict[str, Traced]:
    """Every small network, traced."""
    torch.manual_seed(0)
    return {name: traced(with_random_statistics(make(), MEL_BINS), MEL_BINS) for name, make in ZOO.items()}


@pytest.fixture(scope="session")
def campplus() -> Traced:
    """CAM++ with half the channels."""
    torch.manual_seed(0)
    return traced(with_random_statistics(CAMPPlus(growth_rate=16, bn_size=2, init_channels=64), 80), 80)


@pytest.fixture(scope="session")
def full_campplus() -> Traced:
    """CAM++ in the size of the public 192-d model."""
    torch.manual_seed(0)
    return traced(with_random_statistics(CAMPPlus(), 80), 80)
