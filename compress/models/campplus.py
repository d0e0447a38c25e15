"""CAM++: a densely connected TDNN whose layers are gated by a context mask.

Source: H. Wang, S. Zheng, Y. Chen, L. Cheng, Q. Chen, "CAM++: A Fast and Efficient Network for Speaker
Verification Using Context-Aware Masking", Interspeech 2023. Parameter names and defaults are those of
modelscope/3D-Speaker, so its flat state dicts load by key.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from compress.models.blocks import BasicResBlock

SEGMENT_FRAMES = 100  # length of a context segment, in frames after the stride of 2
BLOCKS = ((12, 3, 1), (24, 3, 2), (16, 3, 2))  # layers, kernel size, dilation of the three dense blocks


class Segments(NamedTuple):
    """How T frames fall into segments; made once per forward and shared by every layer."""

    pool: Tensor  # (frames, segments): x @ pool is the mean over the utterance plus the mean over the segment
    spread: Tensor  # (segments, frames): mask @ spread repeats a segment's value over its frames


def segments_of(frames: int, like: Tensor) -> Segments:
    """Build the pooling matrices for ``frames`` frames, in the type and on the device of ``like``.

    The last segment is averaged over the frames it really has. Matrix products are used instead of an
    average pooling with ceil_mode, which ONNX Runtime computes wrongly in INT8 and OpenVINO refuses when
    the utterance is shorter than the kernel.
    """
    frame = torch.arange(frames, device=like.device)
    segment = torch.arange((frames + SEGMENT_FRAMES - 1) // SEGMENT_FRAMES, device=like.device)
    member = (frame[:, None] // SEGMENT_FRAMES == segment[None, :]).to(like.dtype)
    return Segments(member / member.sum(0) + 1.0 / frames, member.t())


class BatchNormReLU(nn.Sequential):
    """Batch norm, then ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(OrderedDict(batchnorm=nn.BatchNorm1d(channels), relu=nn.ReLU()))


class TDNNLayer(nn.Module):
    """A strided convolution over time, batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.linear = nn.Conv1d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.nonlinear = BatchNormReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, frames) -> (batch, out_channels, ceil(frames / stride))."""
        y: Tensor = self.nonlinear(self.linear(x))
        return y


class CAMLayer(nn.Module):
    """A local convolution, gated per segment by a mask from the segment and utterance means."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2 * dilation
        self.linear_local = nn.Conv1d(
            in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False
        )
        self.linear1 = nn.Conv1d(in_channels, in_channels // 2, 1)
        self.relu = nn.ReLU()
        self.linear2 = nn.Conv1d(in_channels // 2, out_channels, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """(batch, in_channels, frames) -> (batch, out_channels, frames)."""
        context = self.relu(self.linear1(x @ segments.pool))
        mask = self.sigmoid(self.linear2(context))
        y: Tensor = self.linear_local(x) * (mask @ segments.spread)
        return y


class CAMDenseTDNNLayer(nn.Module):
    """One layer of a dense block: bottleneck, then the gated convolution."""

    def __init__(self, in_channels: int, growth: int, bottleneck: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.nonlinear1 = BatchNormReLU(in_channels)
        self.linear1 = nn.Conv1d(in_channels, bottleneck, 1, bias=False)
        self.nonlinear2 = BatchNormReLU(bottleneck)
        self.cam_layer = CAMLayer(bottleneck, growth, kernel_size, dilation)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """(batch, in_channels, frames) -> (batch, growth, frames)."""
        x = self.linear1(self.nonlinear1(x))
        y: Tensor = self.cam_layer(self.nonlinear2(x), segments)
        return y


class CAMDenseTDNNBlock(nn.ModuleDict):
    """Dense layers, each fed with the block's input and the output of every layer before it."""

    def __init__(
        self, num_layers: int, in_channels: int, growth: int, bottleneck: int, kernel_size: int, dilation: int
    ) -> None:
        super().__init__(
            {
                f"tdnnd{i + 1}": CAMDenseTDNNLayer(in_channels + i * growth, growth, bottleneck, kernel_size, dilation)
                for i in range(num_layers)
            }
        )

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """(batch, in_channels, frames) -> (batch, in_channels + num_layers * growth, frames)."""
        for layer in self.values():
            x = torch.cat([x, layer(x, segments)], dim=1)
        return x


class TransitLayer(nn.Module):
    """Batch norm, ReLU and a 1x1 convolution that halves the channels between dense blocks."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.nonlinear = BatchNormReLU(in_channels)
        self.linear = nn.Conv1d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, frames) -> (batch, out_channels, frames)."""
        y: Tensor = self.linear(self.nonlinear(x))
        return y


class DenseLayer(nn.Module):
    """The embedding layer: linear, then batch norm without scale and offset."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv1d(in_channels, out_channels, 1, bias=False)
        self.nonlinear = nn.Sequential(OrderedDict(batchnorm=nn.BatchNorm1d(out_channels, affine=False)))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels) -> (batch, out_channels)."""
        y: Tensor = self.nonlinear(self.linear(x.unsqueeze(-1)).squeeze(-1))
        return y


def frequency_stage(channels: int) -> nn.Sequential:
    """Two residual blocks that halve the mel axis and keep the frames."""
    return nn.Sequential(BasicResBlock(channels, channels, (2, 1)), BasicResBlock(channels, channels, (1, 1)))


class FCM(nn.Module):
    """The 2-D front: residual convolutions that bring the mel axis from num_mel_bins to an eighth."""

    def __init__(self, num_mel_bins: int, channels: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer1 = frequency_stage(channels)
        self.layer2 = frequency_stage(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, (2, 1), 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.out_channels = channels * (num_mel_bins // 8)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, mel, frames) -> (batch, out_channels, frames)."""
        y = torch.relu(self.bn1(self.conv1(x.unsqueeze(1))))
        y = self.layer2(self.layer1(y))
        y = torch.relu(self.bn2(self.conv2(y)))
        return y.flatten(1, 2)


def xvector_layers(
    in_channels: int, embedding_size: int, growth_rate: int, bn_size: int, init_channels: int
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the named layers from the front's output to the embedding."""
    yield "tdnn", TDNNLayer(in_channels, init_channels, kernel_size=5, stride=2)
    channels = init_channels
    for i, (num_layers, kernel_size, dilation) in enumerate(BLOCKS, start=1):
        bottleneck = bn_size * growth_rate
        yield f"block{i}", CAMDenseTDNNBlock(num_layers, channels, growth_rate, bottleneck, kernel_size, dilation)
        channels += num_layers * growth_rate
        yield f"transit{i}", TransitLayer(channels, channels // 2)
        channels //= 2
    yield "out_nonlinear", BatchNormReLU(channels)
    yield "dense", DenseLayer(2 * channels, embedding_size)


class CAMPPlus(nn.Module):
    """CAM++ speaker-embedding network.

    Args:
        feat_dim: Mel bins of the Fbank; a multiple of 8.
        embedding_size: Width of the embedding.
        growth_rate: Channels that each dense layer adds.
        bn_size: Bottleneck width as a multiple of the growth rate.
        init_channels: Channels after the first TDNN layer.
    """

    def __init__(
        self,
        feat_dim: int = 80,
        embedding_size: int = 192,
        growth_rate: int = 32,
        bn_size: int = 4,
        init_channels: int = 128,
    ) -> None:
        super().__init__()
        self.head = FCM(feat_dim)
        self.xvector = nn.ModuleDict(
            dict(xvector_layers(self.head.out_channels, embedding_size, growth_rate, bn_size, init_channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Mean-normalised Fbank (batch, frames, feat_dim) -> (batch, embedding_size), not length-normalised."""
        layers = self.xvector
        x = layers["tdnn"](self.head(x.transpose(1, 2)))
        segments = segments_of(x.shape[-1], x)
        for i in range(1, len(BLOCKS) + 1):
            x = layers[f"transit{i}"](layers[f"block{i}"](x, segments))
        x = layers["out_nonlinear"](x)
        statistics = torch.cat([x.mean(-1), x.std(-1, unbiased=True)], dim=1)
        y: Tensor = layers["dense"](statistics)
        return y


def infer_arguments(shapes: Mapping[str, Size]) -> dict[str, Any]:
    """Read the arguments of :class:`CAMPPlus` off the shapes of an unpruned state dict.

    Raises:
        KeyError: If a key that tells an argument is not there.
    """
    first_layer = "xvector.block1.tdnnd1"
    growth_rate = shapes[f"{first_layer}.cam_layer.linear_local.weight"][0]
    return {
        "feat_dim": shapes["xvector.tdnn.linear.weight"][1] // shapes["head.conv2.weight"][0] * 8,
        "embedding_size": shapes["xvector.dense.linear.weight"][0],
        "growth_rate": growth_rate,
        "bn_size": shapes[f"{first_layer}.linear1.weight"][0] // growth_rate,
        "init_channels": shapes["xvector.tdnn.linear.weight"][0],
    }
