"""Additive angular margin softmax."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AAMSoftmax(nn.Module):
    """Classify speakers by the angle between embedding and class center, or the nearest of a class's sub-centers.

    Sources: J. Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019; J. Deng et
    al., "Sub-center ArcFace: Boosting Face Recognition by Large-Scale Noisy Web Faces", ECCV 2020.

    Attributes:
        weight: (num_classes * sub_centers, embedding_size); those of a class lie together.
        margin: Added to the angle of the true class, in radians.
        scale: Multiplies the cosines before the softmax.
        sub_centers: Of each class.
    """

    def __init__(
        self, embedding_size: int, num_classes: int, margin: float = 0.2, scale: float = 32.0, sub_centers: int = 1
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes * sub_centers, embedding_size))
        nn.init.xavier_normal_(self.weight)
        self.margin, self.scale, self.sub_centers = margin, scale, sub_centers

    def forward(self, embedding: Tensor, label: Tensor, classes: int | None = None) -> tuple[Tensor, Tensor]:
        """(batch, embedding_size), (batch,) -> the mean loss and the share of crops classified right.

        Among the first so many ``classes``; None: all.
        """
        cosine = self.cosines(embedding)[:, :classes].clamp(-1 + 1e-6, 1 - 1e-6)
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
        every = F.linear(F.normalize(embedding), F.normalize(self.weight))
        return every if self.sub_centers == 1 else every.view(len(every), -1, self.sub_centers).amax(2)

    def centers(self) -> Tensor:
        """The centers of each class, (num_classes, sub_centers, embedding_size)."""
        return self.weight.view(-1, self.sub_centers, self.weight.shape[1])
