"""What a student is asked to equal: the weights of the terms of its loss, and the terms themselves."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import SettingError
from compress.training import distillation
from compress.training.loss import AAMSoftmax
from compress.training.parallel import ALONE, Processes
from compress.training.teacher import Answers

Relation: TypeAlias = Literal["cosine", "distance", "angle"]
FeatureLoss: TypeAlias = Literal["mse", "cosine"]

RELATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": distillation.cosine_matrix_loss,
    "distance": distillation.distance_loss,
    "angle": distillation.angle_loss,
}
FEATURE_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": distillation.feature_mse_loss,
    "cosine": distillation.feature_cosine_loss,
}


@dataclass(frozen=True)
class Objective:
    """L = alpha CE + beta KD + gamma feature + delta relation + embedding: the weights, and what shapes each term.

    Attributes:
        alpha: Of the classification of speakers, AAM-softmax.
        beta: Of the soft labels.
        beta_decay: Part of ``beta`` that is gone at the last step; it falls linearly.
        gamma: Of the features.
        delta: Of the relations, whose losses are added up.
        embedding: Of 1 - cosine to the teacher's embedding.
        temperature: Of the soft labels.
        margin: Of AAM-softmax, in radians.
        scale: Of the cosines to class centers, for AAM-softmax and soft labels.
        feature_loss: How features are compared.
        relations: Which relations are.
    """

    alpha: float = 0.0
    beta: float = 0.0
    beta_decay: float = 0.0
    gamma: float = 0.0
    delta: float = 0.0
    embedding: float = 0.0
    temperature: float = 4.0
    margin: float = 0.2
    scale: float = 32.0
    feature_loss: FeatureLoss = "mse"
    relations: tuple[Relation, ...] = ("cosine",)

    @property
    def needs_speakers(self) -> bool:
        """Whether crops must have labels."""
        return self.alpha > 0 or self.beta > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether anything but the classification of speakers counts."""
        return max(self.beta, self.gamma, self.delta, self.embedding) > 0

    def weights(self, progress: float) -> dict[str, float]:
        """The weight of each term that counts, when ``progress`` (0..1) of the steps are done."""
        beta = self.beta * (1 - self.beta_decay * progress)
        found = {
            "CE": self.alpha,
            "KD": beta,
            "feature": self.gamma,
            "relation": self.delta,
            "embedding": self.embedding,
        }
        return {name: weight for name, weight in found.items() if weight > 0}

    def total(self, terms: Mapping[str, Tensor], progress: float) -> Tensor:
        """The weighted sum of the terms, when ``progress`` (0..1) of the steps are done."""
        weights = self.weights(progress)
        return torch.stack([weights[name] * terms[name] for name in weights]).sum()

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The losses of all relations, added up; embeddings (batch, embedding_size) of either size."""
        return torch.stack([RELATIONS[name](student, teacher) for name in self.relations]).sum()

    def check(self, where: str) -> None:
        """Refuse values that make no sense.

        Raises:
            SettingError: Naming the value, after ``where``.
        """
        for name in ("alpha", "beta", "gamma", "delta", "embedding"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError(f"{where}{name} must be 0 or more, got {getattr(self, name)}.")
        if not 0 <= self.beta_decay < 1:
            raise SettingError(f"{where}beta_decay must be in 0..1, less than 1, got {self.beta_decay}.")
        if not 0 < self.temperature <= 1000:
            raise SettingError(f"{where}temperature must be more than 0 and at most 1000, got {self.temperature}.")
        if self.feature_loss not in get_args(FeatureLoss):
            raise SettingError(
                f"{where}feature_loss must be {' or '.join(get_args(FeatureLoss))}, got '{self.feature_loss}'."
            )
        unknown = [name for name in self.relations if name not in get_args(Relation)]
        if unknown or not self.relations:
            raise SettingError(
                f"{where}relations must be of {', '.join(get_args(Relation))}, got '{', '.join(unknown)}'."
            )
        if not self.weights(0.0):
            raise SettingError(f"{where}alpha, beta, gamma, delta and embedding are all 0: there is nothing to learn.")


class Comparison(nn.Module):
    """The terms between what a student and its teacher give for the same crops, with what is learned only for them.

    Adapters bring the student's embedding and features to the teacher's width, where those differ; they are linear
    and start at random.

    Args:
        objective: Which terms count.
        student: What it gives for some crops, at least two.
        teacher: What it gives for some crops. Layers differ in scale by magnitudes; features are compared relative to
            the root mean square of these, so that one weight fits all.
        centers: The teacher's class centers (classes, embedding_size), for soft labels.
    """

    def __init__(self, objective: Objective, student: Answers, teacher: Answers, centers: Tensor | None = None) -> None:
        super().__init__()
        self.objective = objective
        self.adapters = nn.ModuleDict()
        width, wanted = student.embeddings.shape[1], teacher.embeddings.shape[1]
        if objective.embedding and width != wanted:
            self.adapters["embedding"] = nn.Linear(width, wanted, bias=False)
        for i, (own, theirs) in enumerate(zip(student.features, teacher.features, strict=True)):
            if own.shape[1] != theirs.shape[1]:
                self.adapters[f"feature_{i}"] = nn.Conv1d(own.shape[1], theirs.shape[1], 1)
        scales = [feature.square().mean().sqrt().clamp(min=1e-6) for feature in teacher.features]
        self.scales: Tensor
        self.centers: Tensor
        self.register_buffer("scales", torch.stack(scales) if scales else torch.empty(0))
        self.register_buffer("centers", torch.empty(0) if centers is None else centers)

    def forward(
        self,
        student: Answers,
        teacher: Answers,
        classifier: AAMSoftmax | None = None,
        classes: int | None = None,
        processes: Processes = ALONE,
    ) -> dict[str, Tensor]:
        """Every term that counts apart from CE, not weighted.

        Args:
            student: What it gives for a batch.
            teacher: The same.
            classifier: Of the student, for soft labels.
            classes: Soft labels are over the first so many; none: all.
            processes: That have the other crops of the batch; relations are between the crops of all.
        """
        objective = self.objective
        found: dict[str, Tensor] = {}
        if objective.beta and classifier is not None:
            ours = objective.scale * classifier.cosines(student.embeddings)[:, :classes]
            theirs = distillation.class_logits(teacher.embeddings, self.centers[:classes], objective.scale)
            found["KD"] = distillation.soft_label_loss(ours, theirs, objective.temperature)
        if objective.gamma:
            found["feature"] = self.feature_loss(student.features, teacher.features)
        if objective.delta:
            pair = (processes.gathered(answers.embeddings).flatten(0, 1) for answers in (student, teacher))
            found["relation"] = objective.relation(*pair)
        if objective.embedding:
            adapted = self.adapted("embedding", student.embeddings)
            found["embedding"] = distillation.embedding_loss(adapted, teacher.embeddings)
        return found

    def feature_loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Mean over the layers; each feature is (batch, channels, stretches)."""
        compare = FEATURE_LOSSES[self.objective.feature_loss]
        pairs = zip(student, teacher, self.scales, strict=True)
        terms = [
            compare(self.adapted(f"feature_{i}", own) / scale, theirs / scale)
            for i, (own, theirs, scale) in enumerate(pairs)
        ]
        return torch.stack(terms).mean()

    def adapted(self, name: str, own: Tensor) -> Tensor:
        """Bring to the teacher's width what the student gives."""
        found: Tensor = self.adapters[name](own) if name in self.adapters else own
        return found


@torch.no_grad()
def class_centers(embeddings: Tensor, speakers: Tensor) -> Tensor:
    """Mean of the normalised embeddings (crops, embedding_size) of each speaker: (speakers, embedding_size)."""
    sums = torch.zeros(int(speakers.max()) + 1, embeddings.shape[1]).index_add_(0, speakers, F.normalize(embeddings))
    return F.normalize(sums)
