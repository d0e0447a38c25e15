"""Additive angular margin softmax."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AAMSoftmax(nn.Module):
    """Classify speakers by the angle between embedding and class center.

    Source: J. Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019.

    Attributes:
        margin: Added to the angle of the true class, in radians.
        scale: Multiplies the cosines before the softmax.
    """

    def __init__(self, embedding_size: int, num_classes: int, margin: float = 0.2, scale: float = 32.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.xavier_normal_(self.weight)
        self.margin, self.scale = margin, scale

    def forward(self, embedding: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, embedding_size), (batch,) -> the mean loss and the share of crops classified right."""
        cosine = self.cosines(embedding).clamp(-1 + 1e-6, 1 - 1e-6)
        target = cosine.gather(1, label[:, None])
        shifted = torch.where(
            target > math.cos(math.pi - self.margin),
            torch.cos(torch.acos(target) + self.margin),
            target - self.margin * math.sin(self.margin),  # keeps the penalty monotonic past pi
        )
        logits = self.scale * cosine.scatter(1, label[:, None], shifted)
        accuracy = (cosine.argmax(1) == label).float().mean()
        return F.cross_entropy(logits, label), accuracy

    def cosines(self, embedding: Tensor) -> Tensor:
        """(batch, embedding_size) -> cosines to the class centers, (batch, num_classes)."""
        return F.linear(F.normalize(embedding), F.normalize(self.weight))
