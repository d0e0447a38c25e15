"""Losses by which a student network learns from a teacher. Plain functions of what both gave for the same crops."""

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 1e-12  # under distances, whose root has no gradient at 0


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine between embeddings (batch, embedding_size) of the same crops; 0..2."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()


def soft_label_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Divergence of the student's classes from the teacher's at a temperature T: T^2 KL(teacher || student).

    The gradient of the divergence falls with 1 / T^2; the factor makes up for it, so that the weight of this loss
    beside others need not follow the temperature.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015.

    Args:
        student: Logits (batch, classes).
        teacher: Logits (batch, classes).
        temperature: Both are divided by it before the softmax.
    """
    wanted = F.log_softmax(teacher / temperature, dim=-1)
    given = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)


def class_logits(embedding: Tensor, centers: Tensor, scale: float) -> Tensor:
    """Scaled cosines of embeddings (batch, embedding_size) to class centers (classes, embedding_size)."""
    return scale * F.linear(F.normalize(embedding), F.normalize(centers))


def feature_mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two tensors of one shape."""
    return F.mse_loss(student, teacher)


def feature_cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine over the channels, of features (batch, channels, stretches)."""
    return 1 - F.cosine_similarity(student, teacher, dim=1).mean()


def cosine_matrix_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines between all pairs of a batch: what verification scores.

    The embeddings (batch, embedding_size) may differ in size; both spaces may be turned in any way.
    """
    first, second = pairs(len(student), student.device)
    return F.mse_loss(cosine_matrix(student)[first, second], cosine_matrix(teacher)[first, second])


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between distances of all pairs, each relative to the mean distance of its network (RKD-D).

    Source: W. Park, D. Kim, Y. Lu, M. Cho, "Relational Knowledge Distillation", CVPR 2019, equations 5 to 8.
    """
    return F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the cosines of the angles at the middle of all triplets (RKD-A).

    Source: as :func:`distance_loss`, equations 9 and 10.
    """
    return F.smooth_l1_loss(angles(student), angles(teacher))


def pairs(count: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Places (first, second) of all unordered pairs among ``count`` things."""
    first, second = torch.triu_indices(count, count, offset=1, device=device)
    return first, second


def cosine_matrix(embeddings: Tensor) -> Tensor:
    """(batch, embedding_size) -> (batch, batch)."""
    unit = F.normalize(embeddings)
    return unit @ unit.T


def relative_distances(embeddings: Tensor) -> Tensor:
    """Euclidean distances of all pairs of (batch, embedding_size), divided by their mean."""
    first, second = pairs(len(embeddings), embeddings.device)
    distances = (embeddings[first] - embeddings[second]).square().sum(-1).clamp(min=FLOOR).sqrt()
    return distances / distances.mean()


def angles(embeddings: Tensor) -> Tensor:
    """Cosines of the angle at j between i and k, of all triplets of different i, j, k; three at least are needed."""
    count = len(embeddings)
    unit = F.normalize(embeddings[None, :, :] - embeddings[:, None, :], dim=-1, eps=FLOOR**0.5)  # [j, i]: j to i
    cosines = unit @ unit.transpose(1, 2)  # [j, i, k]
    first, second = pairs(count, embeddings.device)
    middle = torch.arange(count, device=embeddings.device)[:, None]
    return cosines[:, first, second][(middle != first) & (middle != second)]
