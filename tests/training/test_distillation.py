"""Every loss against a closed form, written out in numpy or by hand, and its gradient against differences."""

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.training.distillation import (
    angle_loss,
    angles,
    class_logits,
    cosine_matrix_loss,
    distance_loss,
    embedding_loss,
    feature_cosine_loss,
    feature_mse_loss,
    soft_label_loss,
)

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "embedding": embedding_loss,
    "soft_label": lambda student, teacher: soft_label_loss(student, teacher, 3.0),
    "feature_mse": feature_mse_loss,
    "feature_cosine": feature_cosine_loss,
    "cosine_matrix": cosine_matrix_loss,
    "distance": distance_loss,
    "angle": angle_loss,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
RELATIONAL = {name: LOSSES[name] for name in ("cosine_matrix", "distance", "angle")}
every_relation = pytest.mark.parametrize("loss", RELATIONAL.values(), ids=RELATIONAL.keys())


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def huber(x: float, y: float) -> float:
    difference = abs(x - y)
    return 0.5 * difference**2 if difference <= 1 else difference - 0.5


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


@every_loss
def test_gradient_equals_that_by_differences(loss: Loss) -> None:
    student, teacher = drawn(0, 5, 4), drawn(1, 5, 4)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), (student.requires_grad_(),))


@every_loss
def test_a_student_that_gives_what_the_teacher_gives_loses_nothing_and_is_not_moved(loss: Loss) -> None:
    same = drawn(2, 6, 4)
    student = same.clone().requires_grad_()
    value = loss(student, same)
    assert value.item() == pytest.approx(0, abs=1e-12)
    value.backward()
    assert student.grad.abs().max() < 1e-7


@every_loss
@given(seed=st.integers(0, 30))
def test_any_other_student_loses_something(loss: Loss, seed: int) -> None:
    assert loss(drawn(seed, 5, 4), drawn(seed + 100, 5, 4)) > 1e-6


def test_embedding_loss_of_right_angles_and_opposites() -> None:
    teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    student = torch.tensor([[0.0, 5.0], [0.0, -1.0], [1.0, 1.0]])
    assert embedding_loss(student, teacher).item() == pytest.approx((1 + 2 + 0) / 3, abs=1e-6)


@given(seed=st.integers(0, 30), temperature=st.floats(0.5, 20))
def test_soft_labels_are_the_divergence_of_two_softmaxes_times_the_square(seed: int, temperature: float) -> None:
    student, teacher = drawn(seed, 3, 5), drawn(seed + 100, 3, 5)
    expected = 0.0
    for ours, theirs in zip(student.numpy() / temperature, teacher.numpy() / temperature, strict=True):
        p, q = np.exp(theirs) / np.exp(theirs).sum(), np.exp(ours) / np.exp(ours).sum()
        expected += temperature**2 * float(np.sum(p * np.log(p / q))) / 3
    assert soft_label_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_at_high_temperature_soft_labels_become_half_the_squared_difference_of_centered_logits() -> None:
    """The limit that Hinton et al. derive; without the factor T^2 it would be 0."""
    student, teacher = drawn(3, 4, 6), drawn(4, 4, 6)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    expected = difference.square().sum(1).mean() / (2 * 6)
    assert soft_label_loss(student, teacher, 1e4).item() == pytest.approx(expected.item(), rel=1e-3)


def test_logits_are_scaled_cosines() -> None:
    logits = class_logits(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.1], [-3.0, -4.0]]), 10.0)
    assert logits[0].tolist() == pytest.approx([6.0, 8.0, -10.0], abs=1e-5)


def test_feature_losses_by_hand() -> None:
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # two channels, two stretches
    student = torch.tensor([[[0.0, 0.0], [2.0, 5.0]]])
    assert feature_mse_loss(student, teacher).item() == pytest.approx((1 + 0 + 4 + 16) / 4)
    assert feature_cosine_loss(student, teacher).item() == pytest.approx((1 + 0) / 2, abs=1e-6)


@given(seed=st.integers(0, 20))
def test_cosine_matrix_loss_over_all_pairs(seed: int) -> None:
    student, teacher = drawn(seed, 5, 3), drawn(seed + 100, 5, 7)
    s, t = student.numpy(), teacher.numpy()
    terms = [(cosine(s[i], s[j]) - cosine(t[i], t[j])) ** 2 for i, j in combinations(range(5), 2)]
    assert cosine_matrix_loss(student, teacher).item() == pytest.approx(np.mean(terms), rel=1e-9)


@given(seed=st.integers(0, 20))
def test_distance_loss_over_all_pairs(seed: int) -> None:
    student, teacher = drawn(seed, 5, 3), drawn(seed + 100, 5, 7)

    def relative(x: np.ndarray) -> list[float]:
        found = [float(np.linalg.norm(x[i] - x[j])) for i, j in combinations(range(5), 2)]
        return [distance / np.mean(found) for distance in found]

    terms = [huber(a, b) for a, b in zip(relative(student.numpy()), relative(teacher.numpy()), strict=True)]
    assert distance_loss(student, teacher).item() == pytest.approx(np.mean(terms), rel=1e-9)


@given(seed=st.integers(0, 20))
def test_angle_loss_over_all_triplets(seed: int) -> None:
    student, teacher = drawn(seed, 5, 3), drawn(seed + 100, 5, 7)
    terms = []
    for j in range(5):
        for i, k in combinations([place for place in range(5) if place != j], 2):
            s, t = (cosine(x[i] - x[j], x[k] - x[j]) for x in (student.numpy(), teacher.numpy()))
            terms.append(huber(s, t))
    assert angle_loss(student, teacher).item() == pytest.approx(np.mean(terms), rel=1e-9)


def test_angles_of_a_right_triangle() -> None:
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, math.sqrt(3)]])
    degrees = sorted(math.degrees(math.acos(value)) for value in angles(corner).tolist())
    assert degrees == pytest.approx([30, 60, 90], abs=1e-3)


@every_relation
def test_relations_do_not_change_when_a_space_is_turned(loss: Loss) -> None:
    student, teacher = drawn(5, 6, 4), drawn(6, 6, 4)
    turn = torch.linalg.qr(drawn(7, 4, 4)).Q
    assert loss(student @ turn, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-9)
    assert loss(teacher @ turn, teacher).item() == pytest.approx(0, abs=1e-12)


def test_distance_does_not_change_with_the_scale_of_a_space() -> None:
    student, teacher = drawn(8, 6, 4), drawn(9, 6, 4)
    assert distance_loss(7 * student, teacher).item() == pytest.approx(distance_loss(student, teacher).item())


@every_relation
def test_equal_crops_in_a_batch_give_a_finite_gradient(loss: Loss) -> None:
    student = drawn(10, 1, 4).repeat(4, 1).requires_grad_()
    loss(student, drawn(11, 4, 4)).backward()
    assert torch.isfinite(student.grad).all()
