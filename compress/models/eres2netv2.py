"""ERes2NetV2: ERes2Net with narrower pieces, wider stages, and fusion of the last two stages alone.

Source: Y. Chen, S. Zheng, H. Wang, L. Cheng, T. Zhu, R. Huang, C. Deng, Q. Chen, S. Zhang, W. Wang, X. Li, "ERes2NetV2:
Boosting Short-Duration Speaker Verification Performance with Computational Efficiency", Interspeech 2024. Parameter
names and defaults are those of modelscope/3D-Speaker, so its flat state dicts load by key.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor, nn

from compress.models.blocks import pooled_statistics
from compress.models.eres2net import AFF, LAYERS, Pieces, res2net_stage


class ERes2NetV2(nn.Module):
    """ERes2NetV2 speaker-embedding network.

    Args:
        feat_dim: Mel bins of the Fbank; a multiple of 8.
        embedding_size: Width of the embedding.
        m_channels: Channels after the first convolution.
        base_width: Channels of a piece for every 64 of a stage.
        scale: Pieces that a block cuts its channels into.
        expansion: The four stages have this many times 1, 2, 4 and 8 ``m_channels``.
    """

    def __init__(
        self,
        feat_dim: int = 80,
        embedding_size: int = 192,
        m_channels: int = 64,
        base_width: int = 26,
        scale: int = 2,
        expansion: int = 2,
    ) -> None:
        super().__init__()
        m, wide = m_channels, m_channels * expansion
        pieces = Pieces(base_width, scale, expansion)
        self.conv1 = nn.Conv2d(1, m, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(m)
        self.layer1 = res2net_stage(m, m, LAYERS[0], 1, pieces)
        self.layer2 = res2net_stage(wide, 2 * m, LAYERS[1], 2, pieces)
        self.layer3 = res2net_stage(2 * wide, 4 * m, LAYERS[2], 2, pieces, attentional=True)
        self.layer4 = res2net_stage(4 * wide, 8 * m, LAYERS[3], 2, pieces, attentional=True)
        self.layer3_ds = nn.Conv2d(4 * wide, 8 * wide, 3, 2, 1, bias=False)
        self.fuse34 = AFF(8 * wide)
        self.seg_1 = nn.Linear(2 * 8 * wide * (feat_dim // 8), embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        """Mean-normalised Fbank (batch, frames, feat_dim) -> (batch, embedding_size), not length-normalised."""
        y = torch.relu(self.bn1(self.conv1(x.transpose(1, 2).unsqueeze(1))))
        y3 = self.layer3(self.layer2(self.layer1(y)))
        fused = self.fuse34(self.layer4(y3), self.layer3_ds(y3))
        embedding: Tensor = self.seg_1(pooled_statistics(fused))
        return embedding


def infer_arguments(shapes: Mapping[str, Size]) -> dict[str, Any]:
    """Read the arguments of :class:`ERes2NetV2` off the shapes of an unpruned state dict.

    Raises:
        KeyError: If a key that tells an argument is not there.
    """
    m_channels = shapes["conv1.weight"][0]
    expansion = shapes["layer1.0.conv3.weight"][0] // m_channels
    pieces = [key for key in shapes if key.startswith("layer1.0.convs.") and key.endswith(".weight")]
    return {
        "feat_dim": shapes["seg_1.weight"][1] // (2 * m_channels * expansion),
        "embedding_size": shapes["seg_1.weight"][0],
        "m_channels": m_channels,
        # The piece of the widest stage: 8 * m_channels * base_width / 64, rounded down.
        "base_width": -(-shapes["layer4.0.convs.0.weight"][0] * 8 // m_channels),
        "scale": len(pieces),
        "expansion": expansion,
    }
