"""Recovery: batch norm gets the statistics of unlabeled audio, within bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.passes.recovery import (
    batches_by_length,
    inputs_of,
    mean_cosine,
    reconstruct_consumers,
    reestimate_batch_norm,
)
from compress.surgery import remove_channels, trace


@given(lengths=st.lists(st.integers(3, 60), min_size=2, max_size=70), size=st.integers(1, 20))
def test_batches_hold_every_utterance_once_and_no_padding(lengths: list[int], size: int) -> None:
    utterances = [np.full((length, 2), i + 1, np.float32) for i, length in enumerate(lengths)]
    batches = batches_by_length(utterances, size)
    marks = [int(utterance[0, 0]) for batch in batches for utterance in batch]
    assert sorted(marks) == list(range(1, len(lengths) + 1))
    for batch in batches:
        members = [int(utterance[0, 0]) - 1 for utterance in batch]
        assert batch.shape[1] == max(lengths[i] for i in members)
        assert (batch == batch[:, :1]).all()
        assert len(batches) == 1 or len(batch) >= size


@given(seed=st.integers(0, 99), count=st.integers(2, 12))
def test_reestimated_statistics_are_those_of_the_batch(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    utterances = [(3 + 2 * rng.standard_normal((20, 4))).astype(np.float32) for _ in range(count)]
    norm = nn.BatchNorm1d(4).eval()
    model = nn.Sequential(Turn(), norm)
    reestimate_batch_norm(model, utterances)
    frames = np.concatenate(utterances)
    np.testing.assert_allclose(norm.running_mean, frames.mean(0), rtol=1e-4)
    np.testing.assert_allclose(norm.running_var, frames.var(0, ddof=1), rtol=1e-3)
    assert not norm.training
    assert norm.momentum == 0.1
    assert torch.equal(norm.weight, torch.ones(4))


def test_a_channel_that_lost_its_input_is_not_amplified() -> None:
    utterances = [np.zeros((20, 2), np.float32)] * 4
    norm = nn.BatchNorm1d(2).eval()
    norm.running_var = torch.tensor([4.0, 0.01])
    reestimate_batch_norm(nn.Sequential(Turn(), norm), utterances)
    assert norm.running_var.tolist() == pytest.approx([2.0, 0.005])


class Plain(nn.Module):
    """Convolutions, an LSTM and a linear layer without batch norm; (batch, frames, 8) in, (batch, 5) out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 24, 3, padding="same")
        self.strided = nn.Conv1d(24, 16, 5, stride=2, dilation=2, padding=3)
        self.image = nn.Conv2d(1, 8, (3, 3), (2, 1), (1, 1))
        self.after = nn.Conv2d(8, 4, (3, 5), (1, 2), (0, 1))
        self.lstm = nn.LSTM(24, 12, bidirectional=True, batch_first=True)
        self.out = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.strided(torch.relu(self.conv(x.transpose(1, 2)))))
        y = torch.tanh(self.after(torch.relu(self.image(y.unsqueeze(1))))).flatten(1, 2)
        result: torch.Tensor = self.out(self.lstm(y.transpose(1, 2))[0].mean(1))
        return result


def speech_like(count: int, frames: int = 60) -> list[np.ndarray]:
    """Utterances of which eight bins are mixtures of three sources, as neighbouring mel bins are."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((3, 8))
    return [(rng.standard_normal((frames, 3)) @ mixing).astype(np.float32) for _ in range(count)]


def test_what_a_layer_reads_times_its_weights_is_what_it_gives() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    features = torch.randn(2, 40, 8)
    for name in ("conv", "strided", "image", "after", "out"):
        layer = model.get_submodule(name)
        given: list[torch.Tensor] = []
        handle = layer.register_forward_hook(lambda *results, given=given: given.append(results[2]))
        read = inputs_of(model, layer, features)
        handle.remove()
        expected = given[0].flatten(2).transpose(1, 2).flatten(0, 1) if given[0].ndim > 2 else given[0]
        torch.testing.assert_close((read @ layer.weight.flatten(1).double().T + layer.bias).float(), expected)


def test_least_squares_brings_a_network_without_batch_norm_nearer() -> None:
    torch.manual_seed(0)
    dense, utterances = Plain().eval(), speech_like(12)
    graph = trace(dense, torch.from_numpy(utterances[0][None]))
    channels = {group.name: range(group.width // 2) for group in graph.groups()}
    pruned = remove_channels(dense, graph, channels)
    before = mean_cosine(dense, pruned, utterances)
    fitted = reconstruct_consumers(dense, pruned, graph, channels, utterances)
    expected = ["strided.weight", "after.weight", "lstm.weight_ih_l0", "lstm.weight_ih_l0_reverse", "out.weight"]
    assert fitted == expected
    assert mean_cosine(dense, pruned, utterances) > before


def test_least_squares_finds_weights_that_make_up_for_redundant_channels() -> None:
    torch.manual_seed(0)
    dense, utterances = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).eval(), speech_like(6)
    graph = trace(dense, torch.from_numpy(utterances[0][None]))
    channels = {"0": range(12)}  # four of sixteen suffice: the input has three dimensions
    pruned = remove_channels(dense, graph, channels)
    assert mean_cosine(dense, pruned, utterances) < 0.95
    assert reconstruct_consumers(dense, pruned, graph, channels, utterances) == ["1.weight"]
    assert mean_cosine(dense, pruned, utterances) > 0.999


class Turn(nn.Module):
    """(batch, frames, channels) -> (batch, channels, frames)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)
