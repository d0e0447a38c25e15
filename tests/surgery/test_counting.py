"""Counting: predicted parameters and multiply-accumulates."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.surgery import ParameterCounter, count_macs, count_parameters, parameters_after, remove_channels


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_predicted_count_is_the_real_count(zoo, data: st.DataObject) -> None:
    network = zoo[data.draw(st.sampled_from(sorted(zoo)))]
    groups = network.graph.groups()
    channels = {g.name: data.draw(st.sets(st.integers(0, g.width - 1), max_size=g.width - 1)) for g in groups}
    predicted = parameters_after(network.graph, channels)
    removed = np.array([len(channels[g.name]) for g in groups])
    assert predicted == count_parameters(remove_channels(network.model, network.graph, channels))
    assert predicted == ParameterCounter(network.graph, groups).count(removed)


def test_tied_parameters_count_once(zoo) -> None:
    assert count_parameters(zoo["tied"].model) == 8 * 16 * 3 + 16 + 16 * 16 + 16 + 32 * 6 + 6


def test_buffers_are_not_parameters() -> None:
    assert count_parameters(nn.BatchNorm1d(5)) == 10


def test_macs_of_a_convolution() -> None:
    assert count_macs(nn.Conv1d(8, 16, 3, stride=2), torch.randn(2, 8, 21)) == 2 * 8 * 16 * 3 * 10


def test_macs_of_an_lstm() -> None:
    class Recurrent(nn.LSTM):
        pass

    assert count_macs(Recurrent(16, 8), torch.randn(10, 1, 16)) == 10 * 4 * 8 * (16 + 8)


def test_fewer_channels_need_fewer_macs(campplus) -> None:
    features = torch.randn(1, 60, 80)
    pruned = remove_channels(campplus.model, campplus.graph, {"xvector.tdnn.linear": range(32)})
    assert count_macs(pruned, features) < count_macs(campplus.model, features)
