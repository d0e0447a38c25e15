import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.training.loss import AAMSoftmax


def filled(num_classes: int, margin: float) -> AAMSoftmax:
    torch.manual_seed(0)
    return AAMSoftmax(16, num_classes, margin)


@given(seed=st.integers(0, 50))
def test_without_margin_it_is_softmax_of_scaled_cosines(seed: int) -> None:
    loss = filled(5, margin=0.0)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 16, generator=generator)
    label = torch.randint(5, (7,), generator=generator)
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(loss.weight).T
    expected = torch.nn.functional.cross_entropy(32.0 * cosine, label)
    assert loss(x, label)[0].item() == pytest.approx(expected.item(), rel=1e-4)


@given(margin=st.floats(0.05, 0.5))
def test_a_margin_makes_the_same_embedding_cost_more(margin: float) -> None:
    x, label = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 4
    assert filled(4, margin)(x, label)[0] > filled(4, 0.0)(x, label)[0]


def test_the_loss_rises_with_the_angle_over_the_whole_half_circle() -> None:
    """Past pi - margin, too, where cos(angle + margin) would make it fall again."""
    margin = 0.5
    loss = AAMSoftmax(4, 2, margin, scale=1.0).double()
    loss.weight.data = torch.eye(4, dtype=torch.float64)[:2]
    angles = torch.linspace(0.01, math.pi - 0.01, 200, dtype=torch.float64)
    assert (angles > math.pi - margin).sum() > 20
    turned = torch.stack([angles.cos(), *torch.zeros(2, 200), angles.sin()], 1)  # at right angles to the other center
    losses = torch.stack([loss(each[None], torch.tensor([0]))[0] for each in turned])
    assert (losses.diff() > 0).all()


def test_accuracy_counts_the_nearest_center() -> None:
    loss = filled(4, 0.2)
    x = loss.weight.detach().clone()
    assert loss(x, torch.arange(4))[1].item() == 1.0
    assert loss(x, (torch.arange(4) + 1) % 4)[1].item() == 0.0


@given(seed=st.integers(0, 50), margin=st.floats(0.0, 0.5), sub_centers=st.integers(1, 3))
def test_the_loss_is_its_closed_form(seed: int, margin: float, sub_centers: int) -> None:
    """-log(e^(s cos(a + m)) / (e^(s cos(a + m)) + sum e^(s cos a_j))), the angles to the nearest sub-centers."""
    loss, x, label = drawn(seed, margin, sub_centers)
    centers = F.normalize(loss.weight.detach()).unflatten(0, (5, sub_centers))
    expected = []
    for crop, own in zip(F.normalize(x), label.tolist(), strict=True):
        cosines = [max(float(crop @ center) for center in its) for its in centers]
        angle = math.acos(cosines[own])
        assert angle + margin < math.pi
        logits = [30.0 * (math.cos(angle + margin) if j == own else c) for j, c in enumerate(cosines)]
        expected.append(math.log(sum(map(math.exp, logits))) - logits[own])
    assert loss(x, label)[0].item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)


@pytest.mark.parametrize("sub_centers", [1, 3])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_gradients_are_the_numerical_ones(margin: float, sub_centers: int) -> None:
    loss, x, label = drawn(1, margin, sub_centers)
    weight = loss.weight.detach().clone().requires_grad_()

    def value(x: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(loss, {"weight": weight}, (x, label))[0]
        return found

    assert torch.autograd.gradcheck(value, (x.requires_grad_(), weight))


def drawn(seed: int, margin: float, sub_centers: int) -> tuple[AAMSoftmax, Tensor, Tensor]:
    """A loss over five classes in float64, with four embeddings and their labels."""
    generator = torch.Generator().manual_seed(seed)
    loss = AAMSoftmax(8, 5, margin, 30.0, sub_centers).double()
    loss.weight.data = torch.randn(5 * sub_centers, 8, generator=generator, dtype=torch.float64)
    label = torch.randint(5, (4,), generator=generator)
    return loss, torch.randn(4, 8, generator=generator, dtype=torch.float64), label


def test_a_crop_pulls_the_nearest_sub_center_of_its_class_alone() -> None:
    loss = AAMSoftmax(2, 2, 0.2, 10.0, sub_centers=2)
    loss.weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    value, accuracy = loss(torch.tensor([[-0.9, 0.1]]), torch.tensor([0]))
    value.backward()
    assert accuracy == 1.0
    assert loss.weight.grad is not None
    assert loss.weight.grad.abs().sum(1).gt(0).tolist() == [False, True, True, False]


def test_classes_that_are_left_out_do_not_count() -> None:
    loss = filled(6, 0.2)
    few = AAMSoftmax(16, 4, 0.2)
    few.weight.data = loss.weight.data[:4]
    x, label = torch.randn(5, 16, generator=torch.Generator().manual_seed(2)), torch.arange(5) % 4
    assert loss(x, label, 4)[0] == few(x, label)[0]
    assert loss(x, label)[0] > few(x, label)[0]
