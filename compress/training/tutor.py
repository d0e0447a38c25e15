"""A teacher beside a training: it hears every batch that the student hears."""

import copy
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from compress.artifact import Artifact, Format, FrontEnd
from compress.errors import ModelError, SettingError
from compress.features import SAMPLE_RATE
from compress.training.objective import Comparison, class_centers
from compress.training.recipe import Recipe
from compress.training.taps import Tap, choose_taps
from compress.training.teacher import Answers, answer

CLASS_CROPS = 4  # of each class, over which the teacher's center is taken


class Classes(Protocol):
    """Where crops of a class come from."""

    @property
    def num_speakers(self) -> int:
        """Speakers at the first speed; every further speed makes as many classes more."""
        ...

    def clean(self, label: int, count: int) -> Tensor:
        """Features (count, frames, num_mel_bins) of undisturbed crops of one class."""
        ...


@dataclass(frozen=True, eq=False)
class Tutor:
    """A teacher and what compares the student with it.

    Attributes:
        module: The teacher, frozen and in eval mode.
        taps: Layers whose features are compared.
        comparison: The terms, with adapters to learn.
        sha256: Of the teacher's file.
    """

    module: nn.Module
    taps: tuple[Tap, ...]
    comparison: Comparison
    sha256: str

    def answers(self, features: Tensor) -> Answers:
        """What the teacher gives for features (batch, frames, num_mel_bins)."""
        with torch.no_grad():
            return answer(self.module, features, [(tap.teacher, tap.teacher_axis) for tap in self.taps])

    def heard(self, student: nn.Module, features: Tensor) -> Answers:
        """What the student gives for the same, with its gradient."""
        return answer(student, features, [(tap.student, tap.student_axis) for tap in self.taps])


def find_tutor(recipe: Recipe, student: nn.Module, crops: Classes, device: str) -> Tutor | None:
    """Open the teacher that a recipe names and compare widths; none without a teacher.

    The teacher's class centers are the means of its embeddings of some clean crops of each class.

    Raises:
        SettingError: If there is no such teacher, or layers to compare are not there.
        ModelError: If it is no network of PyTorch or takes other features than the student.
    """
    if not recipe.teacher:
        return None
    teacher = open_teacher(recipe)
    student = copy.deepcopy(student).cpu().eval()
    objective = replace(recipe.objective, margin=recipe.margin, scale=recipe.scale[1])
    taps = find_taps(recipe, student, teacher)
    module = teacher.module.float().requires_grad_(False).to(device)
    num_classes = crops.num_speakers * len(recipe.speeds)
    theirs = [(tap.teacher, tap.teacher_axis) for tap in taps]
    probe = torch.cat([crops.clean(label, 1) for label in range(min(num_classes, 16))])
    with torch.no_grad():
        ours = answer(student, probe[:2], [(tap.student, tap.student_axis) for tap in taps])
        given = answer(module, probe.to(device), theirs).to("cpu")
        centers = None
        if objective.beta:
            embeddings = [module(crops.clean(label, CLASS_CROPS).to(device)).cpu() for label in range(num_classes)]
            labels = torch.arange(num_classes).repeat_interleave(CLASS_CROPS)
            centers = class_centers(torch.cat(embeddings), labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # adapters start at random
        comparison = Comparison(objective, ours, given, centers).to(device)
    return Tutor(module, tuple(taps), comparison, teacher.sha256)


def check_teacher(recipe: Recipe, student: nn.Module) -> None:
    """Look whether the teacher that a recipe names can teach the student, before any data are read.

    Raises:
        SettingError, ModelError: As :func:`find_tutor`.
    """
    if recipe.teacher:
        with torch.random.fork_rng(devices=[]):  # a network is made at random before it has its weights
            find_taps(recipe, copy.deepcopy(student).eval(), open_teacher(recipe))


def find_taps(recipe: Recipe, student: nn.Module, teacher: Artifact) -> list[Tap]:
    """The layers that are compared; none where features do not count."""
    if not recipe.objective.gamma:
        return []
    bins = teacher.front_end.num_mel_bins
    return choose_taps(student, teacher.module, bins, recipe.layers, "the recipe's layers")


def open_teacher(recipe: Recipe) -> Artifact:
    """Open the teacher that a recipe names.

    Raises:
        SettingError: If its name is unknown, or crops are too short for it.
        ModelError: If it is no network of PyTorch or takes other features than the student.
    """
    teacher = Artifact.open(recipe.teacher)
    if teacher.format != Format.TORCH:
        raise ModelError(f"recipe: teacher {recipe.teacher} is of format {teacher.format}; a PyTorch one is needed.")
    ours, theirs = FrontEnd(), teacher.front_end
    if (theirs.sample_rate, theirs.num_mel_bins, theirs.cmn) != (ours.sample_rate, ours.num_mel_bins, ours.cmn):
        raise ModelError(
            f"recipe: teacher {recipe.teacher} takes {theirs.num_mel_bins} mel bins at {theirs.sample_rate} Hz"
            f" {'minus' if theirs.cmn else 'with'} their mean; a training computes {ours.num_mel_bins} at"
            f" {SAMPLE_RATE} Hz minus their mean."
        )
    frames = ours.frames_of(recipe.crop_s)
    if frames < teacher.min_frames:
        raise SettingError(
            f"recipe: crop_s: {recipe.crop_s:g} s are {frames} frames; teacher {recipe.teacher} needs"
            f" {teacher.min_frames}."
        )
    return teacher
