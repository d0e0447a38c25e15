"""Recovery: batch norm gets the statistics of unlabeled audio, within bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.passes.recovery import batches_by_length, reestimate_batch_norm


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


class Turn(nn.Module):
    """(batch, frames, channels) -> (batch, channels, frames)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)
