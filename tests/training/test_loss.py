import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


def test_the_target_logit_falls_with_the_angle_over_the_whole_circle() -> None:
    loss = AAMSoftmax(2, 2, margin=0.3, scale=1.0)
    loss.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    angles = torch.linspace(0.01, math.pi - 0.01, 60)
    shifted = torch.where(
        torch.cos(angles) > math.cos(math.pi - 0.3), torch.cos(angles + 0.3), torch.cos(angles) - 0.3 * math.sin(0.3)
    )
    assert (shifted.diff() < 0).all()
    losses = [loss(torch.tensor([[math.cos(a), -math.sin(a)]]), torch.tensor([0]))[0].item() for a in angles]
    assert math.isfinite(sum(losses))


def test_accuracy_counts_the_nearest_center() -> None:
    loss = filled(4, 0.2)
    x = loss.weight.detach().clone()
    assert loss(x, torch.arange(4))[1].item() == 1.0
    assert loss(x, (torch.arange(4) + 1) % 4)[1].item() == 0.0
