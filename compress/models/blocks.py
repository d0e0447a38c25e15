"""Building blocks that several networks share."""

import torch
from torch import Tensor, nn


class BasicResBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != (1, 1) or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, mel, frames) -> (batch, channels, mel / stride, frames / stride), rounded up."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + self.shortcut(x))


def pooled_statistics(x: Tensor) -> Tensor:
    """Mean and standard deviation over time: (batch, channels, mel, frames) -> (batch, 2 * channels * mel).

    Temporal statistics pooling of modelscope/3D-Speaker: the unbiased variance, with 1e-8 under the root.
    """
    deviation = torch.sqrt(x.var(-1, unbiased=True) + 1e-8)
    return torch.cat([x.mean(-1).flatten(1), deviation.flatten(1)], dim=1)
