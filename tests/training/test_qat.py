"""QAT: the network that learns computes what ``ptq`` will make of it; gradients pass; nothing stays behind."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.artifact import Artifact
from compress.errors import ModelError
from compress.passes import PTQ, Context
from compress.quantization.placement import grid_of, round_weight
from compress.runners import OnnxRuntimeRunner
from compress.training.qat import RoundedWeight, Rounding, Unit, count_rounded, fake_quantized, plain, units_of
from compress.vectors import cosine

FRAMES = 120


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((24, FRAMES, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def int8(tiny_onnx: Artifact, features: np.ndarray) -> np.ndarray:
    """Embeddings of the graph that ``ptq`` makes of the tiny network, without what moves values between layers."""
    settings = PTQ(utterances=24, equalize=False, bias_correction=False, reduce_range=False)
    made = settings.run(tiny_onnx, Context(calibration=[lambda one=one: one for one in features]))
    return OnnxRuntimeRunner(made, 1).run(features)


@torch.no_grad()
def embed(model: nn.Module, features: np.ndarray) -> np.ndarray:
    return np.asarray(model(torch.from_numpy(features)))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_the_fake_quantized_network_gives_what_the_int8_graph_gives(
    tiny: Artifact, features: np.ndarray, int8: np.ndarray
) -> None:
    rounded = fake_quantized(tiny.module, torch.from_numpy(features), bits=8)
    assert count_rounded(rounded) == 3
    near, far = distance(embed(rounded, features), int8), distance(embed(tiny.module, features), int8)
    assert near < 1e-3
    assert near < far / 4  # a grid beside it would be as far as the float network is


@pytest.mark.slow
def test_so_does_campplus(campplus: Artifact, campplus_onnx: Artifact, speech_features: list[np.ndarray]) -> None:
    crops = np.stack([utterance[: min(map(len, speech_features))] for utterance in speech_features])
    settings = PTQ(utterances=len(crops), equalize=False, bias_correction=False, reduce_range=False)
    made = settings.run(campplus_onnx, Context(calibration=[lambda one=one: one for one in crops]))
    int8 = np.concatenate([OnnxRuntimeRunner(made, 1).run(crop[None]) for crop in crops])
    rounded = fake_quantized(campplus.module, torch.from_numpy(crops), bits=8)
    assert count_rounded(rounded) == 224  # ptq's own count, in its notes
    assert any(note.startswith("224 of 225 weighted operators in INT8") for note in made.history[-1].notes)
    near, far = embed(rounded, crops), embed(campplus.module, crops)
    assert min(cosine(a, b) for a, b in zip(near, int8, strict=True)) > 0.9998
    assert distance(near, int8) < 0.8 * distance(far, int8)


def test_the_tiny_network_is_seen_as_its_graph(tiny: Artifact, features: np.ndarray) -> None:
    assert units_of(tiny.module, torch.from_numpy(features[:1])) == [
        Unit("first", "norm1", relu=True, rounds_result=True),
        Unit("second", "norm2", relu=True, rounds_result=True),
        Unit("embedding", None, relu=False, rounds_result=False),
    ]


class Branches(nn.Module):
    """What export does not fold, and what ptq leaves in float."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 4, 3, padding=1)
        self.image_norm = nn.BatchNorm2d(4)
        self.shared = nn.Conv1d(64, 8, 1)
        self.norm = nn.BatchNorm1d(8)
        self.unused = nn.Linear(3, 3)
        self.last = nn.Conv1d(8, 5, 1)
        self.last_norm = nn.BatchNorm1d(5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.image_norm(self.image(x.transpose(1, 2)[:, None]))).flatten(1, 2)
        y = self.shared(y)
        y = y + self.norm(y)  # two users: the norm cannot be folded
        y = y.mean(-1, keepdim=True)
        result: Tensor = self.last_norm(self.last(y).squeeze(-1))
        return result


def test_only_what_ptq_quantizes_is_rounded(features: np.ndarray) -> None:
    model = Branches().eval()
    found = units_of(model, torch.from_numpy(features[:1]))
    assert found == [
        Unit("shared", None, relu=False, rounds_result=True),
        Unit("last", "last_norm", relu=False, rounds_result=False),
    ]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), bits=st.sampled_from([7, 8]), shape=st.sampled_from([(5, 3), (4, 2, 3), (3, 2, 2, 2)]))
def test_weights_are_on_the_grid_of_ptq(seed: int, bits: int, shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    weight[0] = 0
    integers, step = round_weight(weight, 0, bits)
    expected = integers * step.reshape(-1, *(1,) * (len(shape) - 1))
    found = RoundedWeight(None, {8: 127, 7: 64}[bits])(torch.from_numpy(weight)).numpy()
    # a value in the middle between two levels may go to either
    steps = np.abs(found - expected) / step.reshape(-1, *(1,) * (len(shape) - 1))
    assert (steps < 1e-3).mean() > 0.95
    assert steps.max() < 1.001


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), low=st.floats(-3, 0), high=st.floats(0.1, 3))
def test_activations_are_on_the_grid_of_ptq(seed: int, low: float, high: float) -> None:
    grid = grid_of(low, high, symmetric=False)
    values = np.random.default_rng(seed).uniform(2 * low - 1, 2 * high, 200).astype(np.float32)
    levels = np.clip(np.rint(values / grid.step) + grid.zero_point, 0, 255) - grid.zero_point
    found = Rounding.of(*grid)(torch.from_numpy(values)).numpy()
    assert np.abs(found - levels * grid.step).max() < 1.001 * grid.step
    assert (np.abs(found - levels * grid.step) < 1e-3 * grid.step).mean() > 0.95


def test_a_folded_batch_norm_scales_the_weight_that_is_rounded() -> None:
    norm = nn.BatchNorm1d(2).eval()
    norm.weight.data, norm.running_var = torch.tensor([2.0, -1.0]), torch.tensor([4.0, 0.25]) - norm.eps
    weight = torch.tensor([[1.0, 0.5], [0.3, 0.1]])
    folded = weight * torch.tensor([[1.0], [-2.0]])
    expected = RoundedWeight(None, 127)(folded) * torch.tensor([[1.0], [-0.5]])
    torch.testing.assert_close(RoundedWeight(norm, 127)(weight), expected)


def test_gradients_pass_within_the_range_and_not_outside() -> None:
    values = torch.tensor([-5.0, 0.2, 0.9, 7.0], requires_grad=True)
    Rounding(1 / 255, 0)(values).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 1, 0]
    weight = torch.randn(3, 4, requires_grad=True)
    RoundedWeight(None, 127)(weight).sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 1).all()


def test_nothing_stays_behind(tiny: Artifact, features: np.ndarray) -> None:
    before = copy.deepcopy(tiny.module)
    rounded = copy.deepcopy(fake_quantized(tiny.module, torch.from_numpy(features)))  # as a trainer copies it
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.mul_(1.5)
    result = plain(rounded)
    assert list(result.state_dict()) == list(before.state_dict()) == list(tiny.module.state_dict())
    for name, value in result.named_parameters():
        torch.testing.assert_close(value, 1.5 * before.get_parameter(name))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in result.modules())
    assert distance(embed(tiny.module, features), embed(before, features)) == 0
    assert count_rounded(rounded) == 3  # the copy is another


def test_learning_lowers_the_error_of_rounding(tiny: Artifact, features: np.ndarray) -> None:
    crops = torch.from_numpy(features)
    wanted = tiny.module(crops).detach()
    rounded = fake_quantized(tiny.module, crops, bits=7)

    def error() -> Tensor:
        return (rounded(crops) - wanted).square().mean()

    before = error().item()
    optimizer = torch.optim.Adam(rounded.parameters(), 1e-4)
    for _ in range(30):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.8 * before


def test_a_network_without_layers_is_refused(features: np.ndarray) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    with pytest.raises(ModelError, match="no convolution or linear layer that ptq quantizes"):
        fake_quantized(Mean(), torch.from_numpy(features))
