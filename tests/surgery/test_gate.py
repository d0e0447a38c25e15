"""The gate: a right removal passes, a wrong one is refused by name."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.surgery import ChannelGraph, choose_channels, l1_scores, remove_channels, trace, verify_removal
from compress.surgery.gate import output


def with_wrong_column(graph: ChannelGraph, group_name: str, tensor: str) -> ChannelGraph:
    """The graph with the first two channels of one member mistaken for one another."""
    group = next(g for g in graph.groups() if g.name == group_name)
    members = tuple(
        replace(m, indices=(m.indices[1], m.indices[0], *m.indices[2:])) if m.name == tensor and m.dim == 1 else m
        for m in group.members
    )
    assert members != group.members
    wrong = replace(group, members=members)
    return replace(graph, all_groups=tuple(wrong if g is group else g for g in graph.all_groups))


def test_campplus_passes(campplus) -> None:
    graph, model = campplus.graph, campplus.model
    channels = choose_channels(graph, l1_scores(model, graph), 0.4).channels
    report = verify_removal(model, remove_channels(model, graph, channels), graph, channels, torch.randn(2, 101, 80))
    assert report.max_relative_error < 1e-13
    assert report.effect > 1e-3
    assert report.control_error > 1e-7
    assert report.seconds > 0


def test_every_network_passes_in_either_scope(zoo) -> None:
    for network in zoo.values():
        scores = l1_scores(network.model, network.graph)
        for scope in ("uniform", "global"):
            selection = choose_channels(network.graph, scores, 0.3, scope, round_to=1, min_width=1)
            pruned = remove_channels(network.model, network.graph, selection.channels)
            report = verify_removal(network.model, pruned, network.graph, selection.channels, torch.randn(2, 30, 8))
            assert report.max_relative_error < 1e-13


def test_removing_nothing_passes(zoo) -> None:
    network = zoo["tdnn"]
    report = verify_removal(network.model, network.model, network.graph, {}, torch.randn(2, 30, 8))
    assert report.max_relative_error == report.effect == 0


@pytest.mark.parametrize(
    ("group", "tensor"),
    [
        ("head.conv2", "xvector.tdnn.linear.weight"),
        pytest.param("xvector.tdnn.linear", "xvector.block1.tdnnd3.linear1.weight", marks=pytest.mark.slow),
        ("xvector.block2.tdnnd1.cam_layer.linear_local", "xvector.transit2.linear.weight"),
        pytest.param("xvector.transit3.linear", "xvector.dense.linear.weight", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_column_in_campplus_is_refused_by_name(campplus, group: str, tensor: str) -> None:
    channels = {g.name: (0,) for g in campplus.graph.groups()}
    pruned = remove_channels(campplus.model, with_wrong_column(campplus.graph, group, tensor), channels)
    with pytest.raises(ModelError, match=rf"^{group}: removing its channels changes the network's function"):
        verify_removal(campplus.model, pruned, campplus.graph, channels, torch.randn(1, 101, 80))


def test_a_wrong_graph_is_refused_by_the_name_of_the_wrong_group(zoo) -> None:
    network = zoo["image"]
    wrong = with_wrong_column(network.graph, "body.conv2", "embedding.weight")
    channels = {g.name: (0,) for g in network.graph.groups()}
    pruned = remove_channels(network.model, wrong, channels)
    with pytest.raises(ModelError, match=r"^body\.conv2: removing its channels changes the network's function"):
        verify_removal(network.model, pruned, wrong, channels, torch.randn(2, 30, 8))


def test_a_network_that_does_not_run_is_refused(zoo) -> None:
    network = zoo["tdnn"]
    pruned = remove_channels(network.model, network.graph, {"body.0": (0,)})
    pruned.body[3] = copy.deepcopy(network.model.body[3])
    with pytest.raises(ModelError, match=r"^body\.0: removing its channels"):
        verify_removal(network.model, pruned, network.graph, {"body.0": (0,)}, torch.randn(2, 30, 8))


def test_a_drifted_statistic_is_refused(zoo) -> None:
    network = zoo["tdnn"]
    pruned = remove_channels(network.model, network.graph, {"body.0": (0,)})
    pruned.get_buffer("body.2.running_mean").add_(1e-4)
    with pytest.raises(ModelError, match=r"^body\.0: removing its channels"):
        verify_removal(network.model, pruned, network.graph, {"body.0": (0,)}, torch.randn(2, 30, 8))


def test_features_that_prove_nothing_are_refused(zoo) -> None:
    network = zoo["tdnn"]
    dead = copy.deepcopy(network.model)
    assert isinstance(dead.embedding, nn.Linear)
    dead.embedding.weight.data.zero_()
    pruned = remove_channels(dead, network.graph, {"body.0": (0,)})
    with pytest.raises(ModelError, match="the channels to remove have no effect on these features"):
        verify_removal(dead, pruned, network.graph, {"body.0": (0,)}, torch.randn(2, 30, 8))


class Several(nn.Module):
    """Results in a dictionary, nested, beside None."""

    def __init__(self, float32: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.float32 = nn.Linear(8, 6), nn.Linear(6, 3), float32

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.last(torch.relu(self.first(x.float() if self.float32 else x)))
        return {"frames": (y, None), "embedding": [y.mean(1)]}


def test_every_tensor_of_a_nested_result_is_compared() -> None:
    model, features = Several(), torch.randn(2, 5, 8)
    graph = trace(model, features)
    report = verify_removal(model, remove_channels(model, graph, {"first": [0]}), graph, {"first": [0]}, features)
    assert report.effect > 1e-6
    assert len(output(model, features)) == 2 * 5 * 3 + 2 * 3


def test_a_network_that_needs_float32_is_refused() -> None:
    model, features = Several(float32=True), torch.randn(2, 5, 8)
    graph = trace(model, features)
    pruned = remove_channels(model, graph, {"first": [0]})
    with pytest.raises(ModelError, match="cannot be checked: Several does not run in float64"):
        verify_removal(model, pruned, graph, {"first": [0]}, features)


def test_the_networks_are_left_as_they_are(zoo) -> None:
    network = zoo["tdnn"]
    model = copy.deepcopy(network.model).train()
    pruned = remove_channels(model, network.graph, {"body.0": (0,)})
    verify_removal(model, pruned, network.graph, {"body.0": (0,)}, torch.randn(2, 30, 8))
    assert model.training
    assert pruned.training
    assert next(pruned.parameters()).dtype == torch.float32
