"""ECAPA-TDNN: Res2Net TDNN blocks with squeeze-excitation, aggregated over layers, and attentive statistics pooling.

Source: B. Desplanques, J. Thienpondt, K. Demuynck, "ECAPA-TDNN: Emphasized Channel Attention, Propagation and
Aggregation in TDNN Based Speaker Verification", Interspeech 2020. Parameter names and defaults are those of
modelscope/3D-Speaker's recipe, so its flat state dicts load by key.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

KERNEL_SIZES = (5, 3, 3, 3, 1)  # of the first layer, the three Res2Net blocks, and the layer that aggregates them
DILATIONS = (1, 2, 3, 4, 1)
CHANNELS = (1024, 1024, 1024, 1024, 3072)
MIN_FRAMES = 5  # reflected padding needs more frames than it adds: 4 on each side at dilation 4
MIN_VARIANCE = 1e-12


class SameConv1d(nn.Module):
    """A convolution that keeps the number of frames by reflecting the utterance at its ends."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2
        self.conv = nn.Conv1d(
            in_channels,
            out_channels,
            kernel_size,
            padding=padding,
            dilation=dilation,
            padding_mode="reflect" if padding else "zeros",
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, frames) -> (batch, out_channels, frames)."""
        y: Tensor = self.conv(x)
        return y


class Norm(nn.Module):
    """Batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, frames) -> the same shape."""
        y: Tensor = self.norm(x)
        return y


class TDNNBlock(nn.Module):
    """A convolution over time, ReLU, then batch norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = SameConv1d(in_channels, out_channels, kernel_size, dilation)
        self.norm = Norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, frames) -> (batch, out_channels, frames)."""
        y: Tensor = self.norm(torch.relu(self.conv(x)))
        return y


class Res2NetBlock(nn.Module):
    """Equal pieces of the channels; each after the second is convolved on top of the one before it."""

    def __init__(self, channels: int, scale: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        width = channels // scale
        self.blocks = nn.ModuleList(TDNNBlock(width, width, kernel_size, dilation) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, frames) -> the same shape."""
        first, *pieces = x.chunk(len(self.blocks) + 1, dim=1)
        y = self.blocks[0](pieces[0])
        outputs = [first, y]
        for block, piece in zip(self.blocks[1:], pieces[1:], strict=True):
            y = block(piece + y)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


class SEBlock(nn.Module):
    """Squeeze-excitation: each channel is scaled by a gate from the means over the utterance."""

    def __init__(self, channels: int, se_channels: int) -> None:
        super().__init__()
        self.conv1 = SameConv1d(channels, se_channels)
        self.conv2 = SameConv1d(se_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, frames) -> the same shape."""
        squeezed = torch.relu(self.conv1(x.mean(-1, keepdim=True)))
        return x * torch.sigmoid(self.conv2(squeezed))


class SERes2NetBlock(nn.Module):
    """A Res2Net block between two 1x1 layers, squeeze-excitation, and a shortcut around all of it."""

    def __init__(
        self, in_channels: int, channels: int, scale: int, se_channels: int, kernel_size: int, dilation: int
    ) -> None:
        super().__init__()
        self.shortcut: nn.Module = nn.Identity() if in_channels == channels else SameConv1d(in_channels, channels)
        self.tdnn1 = TDNNBlock(in_channels, channels)
        self.res2net_block = Res2NetBlock(channels, scale, kernel_size, dilation)
        self.tdnn2 = TDNNBlock(channels, channels)
        self.se_block = SEBlock(channels, se_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, frames) -> (batch, channels, frames)."""
        y = self.tdnn2(self.res2net_block(self.tdnn1(x)))
        result: Tensor = self.se_block(y) + self.shortcut(x)
        return result


class AttentiveStatisticsPooling(nn.Module):
    """Mean and deviation over time, each channel weighted by its own attention, which sees the utterance's own."""

    def __init__(self, channels: int, attention_channels: int) -> None:
        super().__init__()
        self.tdnn = TDNNBlock(3 * channels, attention_channels)
        self.conv = SameConv1d(attention_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, frames) -> (batch, 2 * channels, 1)."""
        mean = x.mean(-1, keepdim=True)
        deviation = root((x - mean).square().mean(-1, keepdim=True))
        context = torch.cat([x, mean.expand_as(x), deviation.expand_as(x)], dim=1)
        weights = torch.softmax(self.conv(torch.tanh(self.tdnn(context))), dim=-1)
        mean = (weights * x).sum(-1, keepdim=True)
        deviation = root((weights * (x - mean).square()).sum(-1, keepdim=True))
        return torch.cat([mean, deviation], dim=1)


def root(variance: Tensor) -> Tensor:
    """The deviation, kept off zero, where the slope of the root is infinite."""
    return torch.sqrt(variance.clamp(min=MIN_VARIANCE))


class EmbeddingLayer(nn.Module):
    """A linear layer in the form of a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, 1) -> (batch, out_channels)."""
        y: Tensor = self.conv(x).squeeze(-1)
        return y


class ECAPATDNN(nn.Module):
    """ECAPA-TDNN speaker-embedding network.

    Args:
        feat_dim: Mel bins of the Fbank.
        embedding_size: Width of the embedding.
        channels: Of the first layer, of the three Res2Net blocks, and of the layer that aggregates them.
        attention_channels: Bottleneck of the attentive pooling.
        res2net_scale: Pieces that a Res2Net block cuts its channels into.
        se_channels: Bottleneck of the squeeze-excitation.
    """

    def __init__(
        self,
        feat_dim: int = 80,
        embedding_size: int = 192,
        channels: Sequence[int] = CHANNELS,
        attention_channels: int = 128,
        res2net_scale: int = 8,
        se_channels: int = 128,
    ) -> None:
        super().__init__()
        first, *widths, aggregated = channels
        self.blocks = nn.ModuleList([TDNNBlock(feat_dim, first, KERNEL_SIZES[0], DILATIONS[0])])
        inputs = [first, *widths[:-1]]
        for inside, outside, size, dilation in zip(inputs, widths, KERNEL_SIZES[1:-1], DILATIONS[1:-1], strict=True):
            self.blocks.append(SERes2NetBlock(inside, outside, res2net_scale, se_channels, size, dilation))
        self.mfa = TDNNBlock(sum(widths), aggregated, KERNEL_SIZES[-1], DILATIONS[-1])
        self.asp = AttentiveStatisticsPooling(aggregated, attention_channels)
        self.asp_bn = Norm(2 * aggregated)
        self.fc = EmbeddingLayer(2 * aggregated, embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        """Mean-normalised Fbank (batch, frames, feat_dim) -> (batch, embedding_size), not length-normalised.

        At least ``MIN_FRAMES`` frames are needed.
        """
        y = self.blocks[0](x.transpose(1, 2))
        outputs = []
        for block in self.blocks[1:]:
            y = block(y)
            outputs.append(y)
        y = self.mfa(torch.cat(outputs, dim=1))
        embedding: Tensor = self.fc(self.asp_bn(self.asp(y)))
        return embedding


def infer_arguments(shapes: Mapping[str, Size]) -> dict[str, Any]:
    """Read the arguments of :class:`ECAPATDNN` off the shapes of an unpruned state dict.

    Raises:
        KeyError: If a key that tells an argument is not there.
    """
    blocks = range(1, len(KERNEL_SIZES) - 1)
    res2net = [key for key in shapes if key.startswith("blocks.1.res2net_block.") and key.endswith(".conv.weight")]
    return {
        "feat_dim": shapes["blocks.0.conv.conv.weight"][1],
        "embedding_size": shapes["fc.conv.weight"][0],
        "channels": [
            shapes["blocks.0.conv.conv.weight"][0],
            *(shapes[f"blocks.{i}.tdnn2.conv.conv.weight"][0] for i in blocks),
            shapes["mfa.conv.conv.weight"][0],
        ],
        "attention_channels": shapes["asp.tdnn.conv.conv.weight"][0],
        "res2net_scale": len(res2net) + 1,
        "se_channels": shapes["blocks.1.se_block.conv1.conv.weight"][0],
    }
