from collections.abc import Callable

import pytest
import torch
from torch import nn

from compress.errors import SettingError
from compress.models import architecture
from compress.training.taps import STRETCHES, choose_taps, stretched, tapped


def names(student: nn.Module, teacher: nn.Module, bins: int = 80, layers: tuple[str, ...] = ()) -> list[str]:
    return [tap.student for tap in choose_taps(student.eval(), teacher.eval(), bins, layers)]


def test_layers_of_campplus_are_its_blocks() -> None:
    build = architecture("campplus").build
    small, large = build(growth_rate=8, bn_size=2, init_channels=16), build(growth_rate=16, bn_size=2, init_channels=32)
    assert names(small, large) == ["xvector.block1", "xvector.block2", "xvector.block3", "xvector.out_nonlinear"]


def test_time_is_found_wherever_it_stands() -> None:
    class BatchFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.linear, self.norm = nn.LSTM(4, 6, batch_first=True), nn.Linear(4, 5), nn.BatchNorm1d(5)
            self.end = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.linear(x).transpose(1, 2))
            return self.end(y.mean(-1)) + self.rnn(x)[0].mean()

    model = BatchFirst().eval()
    taps = choose_taps(model, model, 4, ("linear", "norm", "end=end"))
    assert [(tap.student, tap.student_axis) for tap in taps] == [("linear", 1), ("norm", 2), ("end", None)]
    assert names(model, model, 4) == ["linear", "norm"]  # of its own choice, only layers with time
    with pytest.raises(SettingError, match=r"distill\.layers: rnn of the student gives no tensor to compare\."):
        names(model, model, 4, ("rnn",))


def test_stretches_are_means_over_time_of_each_channel() -> None:
    x = torch.arange(2 * 3 * 16, dtype=torch.float32).reshape(2, 16, 3)
    found = stretched(x, 1)
    assert found.shape == (2, 3, STRETCHES)
    assert found[0, 1].tolist() == [(x[0, i, 1] + x[0, i + 1, 1]).item() / 2 for i in range(0, 16, 2)]
    assert stretched(x.reshape(2, 16, 3, 1).transpose(1, 2), 2).equal(found)  # an image: (batch, 3, 16, 1)
    assert stretched(x[:, 0], None).shape == (2, 3, 1)


def test_unknown_layers_and_networks_without_common_names(fresh_tiny: Callable[..., nn.Module]) -> None:
    tiny, other = fresh_tiny(), nn.Sequential(nn.Linear(16, 4))
    with pytest.raises(SettingError, match=r"unknown layer in distill\.layers 'frst'\. Did you mean 'first'"):
        names(tiny, tiny, 16, ("frst",))
    with pytest.raises(SettingError, match="no layer has the same name in student and teacher"):
        names(tiny, other, 16)


def test_taps_are_gone_afterwards(fresh_tiny: Callable[..., nn.Module]) -> None:
    model = fresh_tiny()
    with tapped(model, ["first"]) as seen:
        model(torch.zeros(1, 30, 16))
    assert seen["first"].shape == (1, 48, 30)
    with pytest.raises(RuntimeError), tapped(model, ["first"]):
        model(torch.zeros(1, 30, 17))
    assert not model.first._forward_hooks
