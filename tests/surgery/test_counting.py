"""Counting: predicted parameters, bytes and multiply-accumulates are those of the network that is left."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.surgery import (
    ByteCounter,
    MacsCounter,
    ParameterCounter,
    count_macs,
    count_parameters,
    parameters_after,
    remove_channels,
    trace,
)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_predicted_count_is_the_real_count(zoo, data: st.DataObject) -> None:
    network = zoo[data.draw(st.sampled_from(sorted(zoo)))]
    groups = network.graph.groups()
    channels, removed = some_channels(groups, data)
    predicted = parameters_after(network.graph, channels)
    assert predicted == count_parameters(remove_channels(network.model, network.graph, channels))
    assert predicted == ParameterCounter(network.graph, groups).count(removed)


@pytest.fixture(scope="module")
def macs_counters(zoo) -> dict[str, MacsCounter]:
    return {
        name: MacsCounter(network.model, network.graph, network.graph.groups(), torch.randn(2, 30, 8))
        for name, network in zoo.items()
    }


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_predicted_macs_are_the_real_macs(zoo, macs_counters, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(zoo)))
    network = zoo[name]
    channels, removed = some_channels(network.graph.groups(), data)
    # torch's LSTM knows that it projects by hidden_size being another number than proj_size.
    assume("projection" not in name or not removed.any())
    pruned = remove_channels(network.model, network.graph, channels)
    assert macs_counters[name].count(removed) == count_macs(pruned, torch.randn(2, 30, 8))


def some_channels(groups, data: st.DataObject) -> tuple[dict[str, set[int]], np.ndarray]:
    """Draw channels to remove, as many from every group of a bundle."""
    counts: dict[str, int] = {}
    channels = {}
    for group in groups:
        count = counts.setdefault(group.bundle or group.name, data.draw(st.integers(0, group.width - 1)))
        channels[group.name] = data.draw(st.sets(st.integers(0, group.width - 1), min_size=count, max_size=count))
    return channels, np.array([len(channels[group.name]) for group in groups])


def test_predicted_macs_of_campplus_are_the_real_macs(campplus) -> None:
    features, groups = torch.randn(1, 130, 80), campplus.graph.groups()
    counter = MacsCounter(campplus.model, campplus.graph, groups, features)
    removed = np.array([1 + i % (group.width // 2) for i, group in enumerate(groups)])
    channels = {group.name: range(int(count)) for group, count in zip(groups, removed, strict=True)}
    pruned = remove_channels(campplus.model, campplus.graph, channels)
    assert counter.count(np.zeros(len(groups), dtype=np.int64)) == count_macs(campplus.model, features)
    assert counter.count(removed) == count_macs(pruned, features)


def test_many_narrow_layers_are_told_apart() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(3, 3), nn.ReLU())]
    model = nn.Sequential(nn.Linear(8, 3), *layers, nn.Linear(3, 5))
    graph = trace(model, torch.randn(2, 8))
    groups = graph.groups()
    counter = MacsCounter(model, graph, groups, torch.randn(2, 8))
    for i, group in enumerate(groups):
        removed = np.eye(len(groups), dtype=np.int64)[i]
        assert counter.count(removed) == count_macs(remove_channels(model, graph, {group.name: [0]}), torch.randn(2, 8))


def test_a_product_of_two_activations_is_followed() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values, self.score = nn.Linear(8, 12), nn.Linear(8, 1)
            self.embedding = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            weights = torch.softmax(self.score(x), dim=1)
            pooled: Tensor = self.embedding((self.values(x).transpose(1, 2) @ weights).squeeze(-1))
            return pooled

    torch.manual_seed(0)
    model, features = Attention().eval(), torch.randn(2, 30, 8)
    graph = trace(model, features)
    counter = MacsCounter(model, graph, graph.groups(), features)
    assert [group.name for group in graph.groups()] == ["values"]
    for width in (1, 4, 11):
        pruned = remove_channels(model, graph, {"values": range(width)})
        assert counter.count(np.array([width])) == count_macs(pruned, features)


def test_a_network_without_prunable_channels_is_counted() -> None:
    model = nn.Linear(8, 4)
    graph = trace(model, torch.randn(2, 8))
    nothing = np.zeros(0, dtype=np.int64)
    assert MacsCounter(model, graph, (), torch.randn(2, 8)).count(nothing) == 2 * 8 * 4
    assert ParameterCounter(graph, ()).count(nothing) == 8 * 4 + 4


def test_bytes_are_those_of_weights_and_running_statistics(zoo) -> None:
    network = zoo["tdnn"]
    counter = ByteCounter(network.graph, network.graph.groups())
    elements = sum(tensor.numel() for tensor in network.model.state_dict().values())
    assert counter.count(np.zeros(len(network.graph.groups()), dtype=np.int64)) == 4 * elements


def test_several_removals_are_counted_at_once(zoo) -> None:
    network = zoo["gated"]
    groups = network.graph.groups()
    counter = ParameterCounter(network.graph, groups)
    removals = np.random.default_rng(0).integers(0, [group.width for group in groups], (5, len(groups)))
    assert counter.counts(removals).tolist() == [counter.count(removed) for removed in removals]


def test_tied_parameters_count_once(zoo) -> None:
    assert count_parameters(zoo["tied"].model) == 8 * 16 * 3 + 16 + 16 * 16 + 16 + 32 * 6 + 6


def test_buffers_are_not_parameters() -> None:
    assert count_parameters(nn.BatchNorm1d(5)) == 10


def test_macs_of_a_convolution() -> None:
    assert count_macs(nn.Conv1d(8, 16, 3, stride=2), torch.randn(2, 8, 21)) == 2 * 8 * 16 * 3 * 10


def test_macs_of_a_transposed_and_of_a_grouped_convolution() -> None:
    assert count_macs(nn.ConvTranspose1d(8, 16, 3, stride=2), torch.randn(2, 8, 10)) == 2 * 8 * 16 * 3 * 10
    assert count_macs(nn.Conv2d(8, 16, 3, groups=4, bias=False), torch.randn(1, 8, 7, 9)) == 2 * 16 * 9 * 5 * 7


def test_macs_of_fused_attention() -> None:
    class Fused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert count_macs(Fused(), torch.randn(1, 2, 10, 4)) == 2 * 2 * 10 * 10 * 4


def test_macs_of_an_lstm() -> None:
    class Recurrent(nn.LSTM):
        pass

    assert count_macs(Recurrent(16, 8), torch.randn(10, 1, 16)) == 10 * 4 * 8 * (16 + 8)


def test_fewer_channels_need_fewer_macs(campplus) -> None:
    features = torch.randn(1, 60, 80)
    pruned = remove_channels(campplus.model, campplus.graph, {"xvector.tdnn.linear": range(32)})
    assert count_macs(pruned, features) < count_macs(campplus.model, features)
