"""Removal: the masked network and the network without the channels are the same function."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.errors import SettingError
from compress.surgery import (
    ChannelGraph,
    choose_channels,
    l1_scores,
    mask_channels,
    mask_consumers,
    remove_channels,
    trace,
)
from compress.surgery.graph import Removal

TOLERANCE = 1e-10  # relative, in float64; right removals measure 1e-15


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize(
    "ratio", [pytest.param(0.2, marks=pytest.mark.slow), 0.4, pytest.param(0.6, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_campplus_without_channels_equals_campplus_with_them_masked(campplus, scope, ratio: float) -> None:
    graph, model = campplus.graph, copy.deepcopy(campplus.model).double()
    channels = choose_channels(graph, l1_scores(model, graph), ratio, scope).channels
    pruned = remove_channels(model, graph, channels)
    references = [mask(model, graph, channels) for mask in (mask_channels, mask_consumers)]
    for batch, frames in ((3, 97), (1, 100), (1, 101), (1, 345)):
        features = torch.randn(batch, frames, 80, dtype=torch.float64)
        embedding = pruned(features)
        assert embedding.shape == (batch, 192)
        for masked in references:
            assert relative_error(embedding, masked(features)) < TOLERANCE
    assert relative_error(model(features), embedding) > 1e-3


@torch.no_grad()
def test_reference_checkpoint_is_pruned_exactly(bench_data, full_campplus) -> None:
    path = bench_data / "reference" / "checkpoints" / "campplus_192.bin"
    if not path.is_file():
        pytest.skip(f"no reference checkpoint at {path}")
    state = torch.load(path, weights_only=True)
    model = copy.deepcopy(full_campplus.model)
    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    model, graph = model.double(), full_campplus.graph
    channels = choose_channels(graph, l1_scores(model, graph), 0.4).channels
    features = torch.randn(1, 130, 80, dtype=torch.float64)
    embedding = remove_channels(model, graph, channels)(features)
    assert relative_error(embedding, mask_channels(model, graph, channels)(features)) < TOLERANCE
    assert relative_error(embedding, mask_consumers(model, graph, channels)(features)) < TOLERANCE


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_any_channels_of_any_network_can_be_removed(zoo, draw_channels, data: st.DataObject) -> None:
    network = zoo[data.draw(st.sampled_from(sorted(zoo)))]
    assert_exact(network.model, network.graph, draw_channels(data, network.graph), data.draw(st.integers(12, 40)))


@torch.no_grad()
def test_half_the_channels_of_every_network_can_be_removed(zoo) -> None:
    for network in zoo.values():
        channels = {group.name: range(group.width // 2) for group in network.graph.groups()}
        effect = assert_exact(network.model, network.graph, channels, 30)
        assert effect > 1e-3


def assert_exact(model: nn.Module, graph: ChannelGraph, channels: Removal, frames: int) -> float:
    """Removed equals masked, both ways of masking; returns how far the dense network is from them."""
    model = copy.deepcopy(model).double()
    features = torch.randn(2, frames, 8, dtype=torch.float64)
    embedding = remove_channels(model, graph, channels)(features)
    assert relative_error(embedding, mask_channels(model, graph, channels)(features)) < TOLERANCE
    assert relative_error(embedding, mask_consumers(model, graph, channels)(features)) < TOLERANCE
    return relative_error(model(features), embedding)


class Random(nn.Module):
    """Drawn layers: convolutions, residual sums, concatenations, gates, splits and LSTMs in any order."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.steps = [step for step, _ in steps]
        self.layers = nn.ModuleList()
        channels = 8
        for step, width in steps:
            out = {"conv": width, "cat": width, "norm": width, "lstm": 2 * width, "grouped": 2 * width}.get(
                step, channels
            )
            out = {"split": 2 * width, "glu": 2 * width}.get(step, out)
            if step == "lstm":
                self.layers.append(nn.LSTM(channels, width, batch_first=True, bidirectional=True))
            else:
                groups = {"depthwise": channels, "grouped": 2 if channels % 2 == 0 else 1}.get(step, 1)
                self.layers.append(nn.Conv1d(channels, out, 3, padding=1, groups=groups))
            channels = {"cat": channels + out, "glu": out // 2}.get(step, out)
            self.layers.append(nn.BatchNorm1d(channels))
        self.embedding = nn.Linear(2 * channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        for step, layer, norm in zip(self.steps, self.layers[::2], self.layers[1::2], strict=True):
            y = layer(x.transpose(1, 2))[0].transpose(1, 2) if step == "lstm" else layer(x)
            if step == "add":
                y = x + y
            elif step == "cat":
                y = torch.cat([x, torch.relu(y)], dim=1)
            elif step == "gate":
                y = x * torch.sigmoid(y)
            elif step == "glu":
                y = nn.functional.glu(y, dim=1)
            elif step == "split":
                first, second = torch.chunk(y, 2, dim=1)
                y = torch.cat([second, first * torch.tanh(second)], dim=1)
            x = torch.tanh(norm(y)) if step != "conv" else torch.sigmoid(y)
        result: Tensor = self.embedding(torch.cat([x.mean(-1), x.std(-1)], dim=1))
        return result


STEPS = st.tuples(
    st.sampled_from(["conv", "norm", "add", "cat", "gate", "depthwise", "grouped", "glu", "split", "lstm"]),
    st.integers(1, 6),
)


def assert_random_network_is_exact(draw_channels, steps: list[tuple[str, int]], seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    model = Random(steps).double().eval()
    for norm in model.layers[1::2]:
        norm.running_mean.normal_()
        norm.bias.normal_()
    graph = trace(model, torch.randn(2, 20, 8, dtype=torch.float64))
    assert_exact(model, graph, draw_channels(data, graph), data.draw(st.integers(12, 40)))


RANDOM_NETWORKS = given(steps=st.lists(STEPS, min_size=1, max_size=5), seed=st.integers(0, 99), data=st.data())


@settings(max_examples=25, deadline=None)
@RANDOM_NETWORKS
@torch.no_grad()
def test_random_networks_are_pruned_exactly(draw_channels, steps, seed: int, data: st.DataObject) -> None:
    assert_random_network_is_exact(draw_channels, steps, seed, data)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@RANDOM_NETWORKS
@torch.no_grad()
def test_two_thousand_random_networks_are_pruned_exactly(draw_channels, steps, seed: int, data: st.DataObject) -> None:
    assert_random_network_is_exact(draw_channels, steps, seed, data)


@torch.no_grad()
def test_removing_nothing_is_bit_identical(campplus) -> None:
    features = torch.randn(2, 100, 80)
    assert torch.equal(remove_channels(campplus.model, campplus.graph, {})(features), campplus.model(features))


def test_an_lstm_of_as_many_units_as_projections_is_refused(zoo) -> None:
    network = zoo["lstm with projection"]
    units = [g.name for g in network.graph.groups() if g.bundle == "body.recurrent.hidden_size"]
    with pytest.raises(SettingError, match="8 units and as many projections"):
        remove_channels(network.model, network.graph, dict.fromkeys(units, range(8)))
    remove_channels(network.model, network.graph, dict.fromkeys(units, range(9)))(torch.randn(2, 30, 8))


@torch.no_grad()
def test_one_by_one_equals_all_at_once(zoo) -> None:
    model = zoo["tdnn"].model
    at_once = remove_channels(model, zoo["tdnn"].graph, {"body.0": [1, 5], "body.3": [0, 7]})
    for name, channel in (("body.3", 7), ("body.0", 5), ("body.3", 0), ("body.0", 1)):
        model = remove_channels(model, trace(model, torch.randn(2, 40, 8)), {name: [channel]})
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), at_once.state_dict().values(), strict=True)
    )


def test_the_network_itself_is_left_as_it_is(campplus) -> None:
    before = {key: value.clone() for key, value in campplus.model.state_dict().items()}
    for change in (remove_channels, mask_channels, mask_consumers):
        change(campplus.model, campplus.graph, {"xvector.tdnn.linear": range(8)})
    after = campplus.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_training_flag_types_and_requires_grad_are_kept(zoo) -> None:
    model = copy.deepcopy(zoo["tdnn"].model).half().train()
    model.get_parameter("body.0.weight").requires_grad_(False)
    pruned = remove_channels(model, zoo["tdnn"].graph, {"body.0": range(8)})
    assert pruned.training
    assert pruned.get_parameter("body.0.weight").dtype == torch.float16
    assert not pruned.get_parameter("body.0.weight").requires_grad
    assert pruned.get_parameter("body.3.weight").requires_grad
    assert torch.equal(pruned.get_buffer("body.2.running_var"), model.get_buffer("body.2.running_var")[8:])


def test_gradients_reach_every_parameter(zoo) -> None:
    pruned = remove_channels(zoo["gated"].model, zoo["gated"].graph, {"body.first": [0, 3], "body.squeeze": [1]})
    pruned(torch.randn(2, 30, 8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_stored_widths_follow(zoo) -> None:
    pruned = remove_channels(zoo["depthwise"].model, zoo["depthwise"].graph, {"body.enter": range(6)})
    text = repr(pruned)
    assert "Conv1d(8, 10, kernel_size=(1,)" in text
    assert "Conv1d(10, 10, kernel_size=(3,), stride=(1,), padding=(1,), groups=10)" in text
    assert "PReLU(num_parameters=10)" in text
    assert "Linear(in_features=20, out_features=6" in text


def test_tied_parameters_stay_tied(zoo) -> None:
    pruned = remove_channels(zoo["tied"].model, zoo["tied"].graph, {"body.first": range(4)})
    assert pruned.get_parameter("body.left.weight") is pruned.get_parameter("body.right.weight")
    assert pruned.get_submodule("body.right").in_channels == 12


def test_a_pruned_network_can_be_copied_and_pickled(campplus) -> None:
    pruned = remove_channels(campplus.model, campplus.graph, {"xvector.tdnn.linear": range(8)})
    features = torch.randn(1, 50, 80)
    with torch.no_grad():
        for other in (copy.deepcopy(pruned), pickle.load(io.BytesIO(pickle.dumps(pruned)))):
            assert torch.equal(other(features), pruned(features))
