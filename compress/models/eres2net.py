"""ERes2Net: Res2Net blocks with attentional fusion of pieces within a block and of stages across the network.

Source: Y. Chen, S. Zheng, H. Wang, L. Cheng, Q. Chen, J. Qi, "An Enhanced Res2Net with Local and Global Feature Fusion
for Speaker Verification", Interspeech 2023. Parameter names and defaults are those of modelscope/3D-Speaker (the base
model), so its flat state dicts load by key.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from compress.models.blocks import pooled_statistics

LAYERS = (3, 4, 6, 3)  # blocks of the four stages; each stage after the first halves mel and frames
REDUCTION = 4  # of the channels in the bottleneck of a fusion
CEILING = 20.0  # of the activation


class Pieces(NamedTuple):
    """How a Res2Net block cuts and widens its channels."""

    base_width: int  # channels of a piece for every 64 of the stage
    scale: int  # number of pieces
    expansion: int  # channels that leave for each of the stage


PIECES = Pieces(base_width=32, scale=2, expansion=2)


class Activation(nn.Hardtanh):
    """ReLU with a ceiling."""

    def __init__(self) -> None:
        super().__init__(0.0, CEILING)


class AFF(nn.Module):
    """Attentional feature fusion: a gate from both inputs says how much of each is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        bottleneck = channels // REDUCTION
        self.local_att = nn.Sequential(
            nn.Conv2d(2 * channels, bottleneck, 1),
            nn.BatchNorm2d(bottleneck),
            nn.SiLU(),
            nn.Conv2d(bottleneck, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two of (batch, channels, mel, frames) -> the same shape."""
        gate = torch.tanh(self.local_att(torch.cat([x, y], dim=1)))
        return x * (1.0 + gate) + y * (1.0 - gate)


class Sum(nn.Module):
    """The plain fusion: both inputs are added."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two of the same shape -> that shape."""
        return x + y


class Res2NetBlock(nn.Module):
    """A bottleneck whose channels are cut into pieces; each piece is convolved after fusion with the one before it.

    Args:
        in_channels: Channels that enter.
        channels: Channels of the stage, by which the pieces and what leaves are measured.
        stride: Of mel and frames.
        pieces: How the channels are cut and widened.
        attentional: Fuse pieces by :class:`AFF`, not by a sum.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, pieces: Pieces, attentional: bool) -> None:
        super().__init__()
        scale, width, out_channels = pieces.scale, channels * pieces.base_width // 64, channels * pieces.expansion
        self.conv1 = nn.Conv2d(in_channels, scale * width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(scale * width)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1, bias=False) for _ in range(scale))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(scale))
        self.fuse_models = nn.ModuleList(AFF(width) if attentional else Sum() for _ in range(scale - 1))
        self.conv3 = nn.Conv2d(scale * width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.activation = Activation()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, mel, frames) -> (batch, out_channels, mel / stride, frames / stride), rounded up."""
        pieces = self.activation(self.bn1(self.conv1(x))).chunk(len(self.convs), dim=1)
        y = self.activation(self.bns[0](self.convs[0](pieces[0])))
        outputs = [y]
        for fuse, conv, norm, piece in zip(self.fuse_models, self.convs[1:], self.bns[1:], pieces[1:], strict=True):
            y = self.activation(norm(conv(fuse(y, piece))))
            outputs.append(y)
        z = self.bn3(self.conv3(torch.cat(outputs, dim=1)))
        result: Tensor = self.activation(z + self.shortcut(x))
        return result


def res2net_stage(
    in_channels: int, channels: int, blocks: int, stride: int, pieces: Pieces, attentional: bool = False
) -> nn.Sequential:
    """Blocks of one width, the first with the stride."""
    first = Res2NetBlock(in_channels, channels, stride, pieces, attentional)
    inner = channels * pieces.expansion
    return nn.Sequential(first, *(Res2NetBlock(inner, channels, 1, pieces, attentional) for _ in range(blocks - 1)))


class ERes2Net(nn.Module):
    """ERes2Net speaker-embedding network.

    Args:
        feat_dim: Mel bins of the Fbank; a multiple of 8.
        embedding_size: Width of the embedding.
        m_channels: Channels after the first convolution; the stages have 2, 4, 8 and 16 times as many.
    """

    def __init__(self, feat_dim: int = 80, embedding_size: int = 192, m_channels: int = 32) -> None:
        super().__init__()
        m = m_channels
        self.conv1 = nn.Conv2d(1, m, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(m)
        self.layer1 = res2net_stage(m, m, LAYERS[0], 1, PIECES)
        self.layer2 = res2net_stage(2 * m, 2 * m, LAYERS[1], 2, PIECES)
        self.layer3 = res2net_stage(4 * m, 4 * m, LAYERS[2], 2, PIECES, attentional=True)
        self.layer4 = res2net_stage(8 * m, 8 * m, LAYERS[3], 2, PIECES, attentional=True)
        self.layer1_downsample = nn.Conv2d(2 * m, 4 * m, 3, 2, 1, bias=False)
        self.layer2_downsample = nn.Conv2d(4 * m, 8 * m, 3, 2, 1, bias=False)
        self.layer3_downsample = nn.Conv2d(8 * m, 16 * m, 3, 2, 1, bias=False)
        self.fuse_mode12 = AFF(4 * m)
        self.fuse_mode123 = AFF(8 * m)
        self.fuse_mode1234 = AFF(16 * m)
        self.seg_1 = nn.Linear(2 * 16 * m * (feat_dim // 8), embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        """Mean-normalised Fbank (batch, frames, feat_dim) -> (batch, embedding_size), not length-normalised."""
        y = torch.relu(self.bn1(self.conv1(x.transpose(1, 2).unsqueeze(1))))
        y1 = self.layer1(y)
        y2 = self.layer2(y1)
        y3 = self.layer3(y2)
        y4 = self.layer4(y3)
        fused = self.fuse_mode12(y2, self.layer1_downsample(y1))
        fused = self.fuse_mode123(y3, self.layer2_downsample(fused))
        fused = self.fuse_mode1234(y4, self.layer3_downsample(fused))
        embedding: Tensor = self.seg_1(pooled_statistics(fused))
        return embedding


def infer_arguments(shapes: Mapping[str, Size]) -> dict[str, Any]:
    """Read the arguments of :class:`ERes2Net` off the shapes of an unpruned state dict.

    Raises:
        KeyError: If a key that tells an argument is not there.
    """
    m_channels = shapes["conv1.weight"][0]
    return {
        "feat_dim": shapes["seg_1.weight"][1] // (4 * m_channels),
        "embedding_size": shapes["seg_1.weight"][0],
        "m_channels": m_channels,
    }
