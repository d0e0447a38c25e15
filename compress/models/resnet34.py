"""ResNet34: a residual network over the mel-time plane with statistics pooling.

Source: H. Zeinali, S. Wang, A. Silnova, P. Matejka, O. Plchot, "BUT System Description to VoxCeleb Speaker
Recognition Challenge 2019", after K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition",
CVPR 2016. Parameter names and defaults are those of modelscope/3D-Speaker, so its flat state dicts load by key.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor, nn

from compress.models.blocks import BasicResBlock, pooled_statistics

LAYERS = (3, 4, 6, 3)  # residual blocks of the four stages; each stage after the first halves mel and frames


def residual_stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Residual blocks of one width, the first with the stride."""
    first = BasicResBlock(in_channels, channels, (stride, stride))
    return nn.Sequential(first, *(BasicResBlock(channels, channels, (1, 1)) for _ in range(blocks - 1)))


class ResNet34(nn.Module):
    """ResNet34 speaker-embedding network with two embedding layers.

    Args:
        feat_dim: Mel bins of the Fbank; a multiple of 8.
        embedding_size: Width of the embedding.
        m_channels: Channels of the first stage; each later one has twice as many.
    """

    def __init__(self, feat_dim: int = 80, embedding_size: int = 192, m_channels: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, m_channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(m_channels)
        self.layer1 = residual_stage(m_channels, m_channels, LAYERS[0], stride=1)
        self.layer2 = residual_stage(m_channels, 2 * m_channels, LAYERS[1], stride=2)
        self.layer3 = residual_stage(2 * m_channels, 4 * m_channels, LAYERS[2], stride=2)
        self.layer4 = residual_stage(4 * m_channels, 8 * m_channels, LAYERS[3], stride=2)
        self.seg_1 = nn.Linear(2 * 8 * m_channels * (feat_dim // 8), embedding_size)
        self.seg_bn_1 = nn.BatchNorm1d(embedding_size, affine=False)
        self.seg_2 = nn.Linear(embedding_size, embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        """Mean-normalised Fbank (batch, frames, feat_dim) -> (batch, embedding_size), not length-normalised."""
        y = torch.relu(self.bn1(self.conv1(x.transpose(1, 2).unsqueeze(1))))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        y = torch.relu(self.seg_1(pooled_statistics(y)))
        embedding: Tensor = self.seg_2(self.seg_bn_1(y))
        return embedding


def infer_arguments(shapes: Mapping[str, Size]) -> dict[str, Any]:
    """Read the arguments of :class:`ResNet34` off the shapes of an unpruned state dict.

    Raises:
        KeyError: If a key that tells an argument is not there.
    """
    m_channels = shapes["conv1.weight"][0]
    return {
        "feat_dim": shapes["seg_1.weight"][1] // (2 * m_channels),
        "embedding_size": shapes["seg_1.weight"][0],
        "m_channels": m_channels,
    }
