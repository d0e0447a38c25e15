"""TDNN-BLSTM: convolutions over time, a bidirectional LSTM, self-attentive pooling and a normalised embedding.

An architecture of this project, made of standard parts. Pooling: W. Cai, J. Chen, M. Li, "Exploring the Encoding Layer
and Loss Function in End-to-End Speaker and Language Recognition System", Odyssey 2018.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor, nn

# Kernel size, dilation and stride of the TDNN layers. The stride halves the steps of the LSTM, which run one by one.
LAYERS = ((5, 1, 1), (3, 2, 2), (3, 2, 1), (1, 1, 1))
MIN_LENGTH = 1e-12  # an embedding of zeros is divided by it


class TDNNLayer(nn.Module):
    """A convolution over time, batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int, stride: int) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2 * dilation
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)
        self.norm = nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, frames) -> (batch, out_channels, ceil(frames / stride))."""
        return torch.relu(self.norm(self.conv(x)))


class SelfAttentivePooling(nn.Module):
    """The mean over time, weighted by a small network that scores each frame."""

    def __init__(self, channels: int, attention_channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, attention_channels)
        self.score = nn.Linear(attention_channels, 1, bias=False)  # softmax is blind to an offset

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frames, channels) -> (batch, channels)."""
        weights = torch.softmax(self.score(torch.tanh(self.hidden(x))), dim=1)
        return (weights * x).sum(1)


class TDNNBLSTM(nn.Module):
    """TDNN-BLSTM speaker-embedding network.

    Args:
        feat_dim: Mel bins of the Fbank.
        embedding_size: Width of the embedding.
        channels: Of the TDNN layers.
        hidden_size: Units of the LSTM in each direction.
        attention_channels: Bottleneck of the pooling.
    """

    def __init__(
        self,
        feat_dim: int = 80,
        embedding_size: int = 192,
        channels: int = 1024,
        hidden_size: int = 696,
        attention_channels: int = 128,
    ) -> None:
        super().__init__()
        inputs = (feat_dim, *[channels] * (len(LAYERS) - 1))
        self.tdnn = nn.Sequential(
            *(TDNNLayer(inside, channels, *layer) for inside, layer in zip(inputs, LAYERS, strict=True))
        )
        self.blstm = nn.LSTM(channels, hidden_size, batch_first=True, bidirectional=True)
        self.pooling = SelfAttentivePooling(2 * hidden_size, attention_channels)
        self.norm = nn.BatchNorm1d(2 * hidden_size)
        self.embedding = nn.Linear(2 * hidden_size, embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        """Mean-normalised Fbank (batch, frames, feat_dim) -> (batch, embedding_size), of length one."""
        y, _ = self.blstm(self.tdnn(x.transpose(1, 2)).transpose(1, 2))
        embedding: Tensor = self.embedding(self.norm(self.pooling(y)))
        length: Tensor = embedding.norm(dim=1, keepdim=True)
        return embedding / length.clamp(min=MIN_LENGTH)


def infer_arguments(shapes: Mapping[str, Size]) -> dict[str, Any]:
    """Read the arguments of :class:`TDNNBLSTM` off the shapes of an unpruned state dict.

    Raises:
        KeyError: If a key that tells an argument is not there.
    """
    return {
        "feat_dim": shapes["tdnn.0.conv.weight"][1],
        "embedding_size": shapes["embedding.weight"][0],
        "channels": shapes["tdnn.0.conv.weight"][0],
        "hidden_size": shapes["blstm.weight_hh_l0"][1],
        "attention_channels": shapes["pooling.hidden.weight"][0],
    }
