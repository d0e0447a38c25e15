"""Scores: what a channel's weights, batch norm, activations or gradients say of it."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.surgery import activation_scores, bn_scale_scores, l1_scores, l2_scores, taylor_scores, trace


def test_score_is_the_sum_of_magnitudes_over_the_mean_of_the_group(zoo) -> None:
    network = zoo["tdnn"]
    weights = {name: p.detach().double().abs() for name, p in network.model.named_parameters()}
    total = (
        weights["body.0.weight"].sum((1, 2))
        + weights["body.0.bias"]
        + weights["body.2.weight"]
        + weights["body.2.bias"]
        + weights["body.3.weight"].sum((0, 2))
    ).numpy()
    np.testing.assert_allclose(l1_scores(network.model, network.graph)["body.0"], total / total.mean())


def test_scores_have_mean_one(campplus) -> None:
    scores = l1_scores(campplus.model, campplus.graph)
    assert scores.keys() == {group.name for group in campplus.graph.groups()}
    assert all(abs(score.mean() - 1) < 1e-12 for score in scores.values())


def test_scaling_a_channel_down_puts_it_last(zoo) -> None:
    network = zoo["image"]
    model = copy.deepcopy(network.model)
    with torch.no_grad():
        for name in ("body.conv1.weight", "body.bn1.weight", "body.bn1.bias"):
            model.get_parameter(name)[5] *= 1e-3
    features = [torch.randn(2, 30, 8)]
    speakers = [(torch.randn(6, 30, 8), torch.tensor([0, 0, 1, 1, 2, 2]))]
    for scores in (
        l1_scores(model, network.graph),
        l2_scores(model, network.graph),
        bn_scale_scores(model, network.graph),
        activation_scores(model, network.graph, features),
        taylor_scores(model, network.graph, speakers),
    ):
        assert scores["body.conv1"].argmin() == 5


@pytest.fixture
def two_layers() -> nn.Module:
    """Features of 2 bins -> 2 channels with batch norm -> an embedding of 2; every number is chosen."""
    model = nn.Sequential(nn.Linear(2, 2), Norm(), nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        model[0].bias.copy_(torch.tensor([0.5, -1.0]))
        model[1].norm.weight.copy_(torch.tensor([-0.5, 2.0]))
        model[1].norm.bias.copy_(torch.tensor([0.0, 1.0]))
        model[1].norm.running_var.fill_(1 - model[1].norm.eps)
        model[2].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 2.0]]))
    return model


class Norm(nn.Module):
    """Mean over frames, then batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.mean(1))
        return y


def test_scores_computed_by_hand(two_layers) -> None:
    graph = trace(two_layers, torch.randn(2, 3, 2))
    assert [group.name for group in graph.groups()] == ["0"]
    # Rows 3 and 7, biases 0.5 and 1, scales 0.5 and 2, offsets 0 and 1, columns 2 and 2.
    np.testing.assert_allclose(l1_scores(two_layers, graph, "none")["0"], [6, 13])
    np.testing.assert_allclose(l1_scores(two_layers, graph, "max")["0"], [6 / 13, 1])
    squares = [1 + 4 + 0.25 + 0.25 + 0 + 1 + 1, 9 + 16 + 1 + 4 + 1 + 0 + 4]
    np.testing.assert_allclose(l2_scores(two_layers, graph, "none")["0"], np.sqrt(squares))
    np.testing.assert_allclose(bn_scale_scores(two_layers, graph)["0"], [0.5 / 1.25, 2 / 1.25])
    # Frames (1, 0) and (0, 1) give 1.5, 2 and -1.5, 3.
    features = [torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])]
    np.testing.assert_allclose(activation_scores(two_layers, graph, features, "none")["0"], [1.5, 2.5])


def test_taylor_is_the_gradient_times_the_weight(two_layers) -> None:
    graph = trace(two_layers, torch.randn(2, 3, 2))
    features, speakers = torch.randn(4, 3, 2), torch.tensor([0, 1, 1, 0])
    score = taylor_scores(two_layers, graph, [(features, speakers)], "none")["0"]
    unit = nn.functional.normalize(two_layers(features))
    centroids = nn.functional.normalize(torch.stack([unit[[0, 3]].sum(0), unit[[1, 2]].sum(0)])).detach()
    nn.functional.cross_entropy(32 * unit @ centroids.T, speakers).backward()
    products = {name: (p * p.grad).abs() for name, p in two_layers.named_parameters()}
    expected = (
        products["0.weight"].sum(1)
        + products["0.bias"]
        + products["1.norm.weight"]
        + products["1.norm.bias"]
        + products["2.weight"].sum(0)
    )
    np.testing.assert_allclose(score, 4 * expected.detach().numpy(), rtol=1e-5)


def test_taylor_needs_two_speakers_and_changes_nothing(zoo) -> None:
    network = zoo["tdnn"]
    with pytest.raises(InputError, match="score taylor tells speakers apart; the utterances given are of fewer"):
        taylor_scores(network.model, network.graph, [(torch.randn(2, 30, 8), torch.tensor([1, 1]))])
    taylor_scores(network.model, network.graph, [(torch.randn(2, 30, 8), torch.tensor([0, 1]))])
    assert all(parameter.grad is None for parameter in network.model.parameters())


def test_taylor_of_two_batches_is_the_sum_over_utterances(zoo) -> None:
    network = zoo["gated"]
    features, speakers = torch.randn(4, 30, 8), torch.tensor([0, 1, 0, 1])
    one_by_one = [(features[i : i + 1], speakers[i : i + 1]) for i in range(4)]
    again = taylor_scores(network.model, network.graph, [*one_by_one, *one_by_one], "none")
    for name, score in taylor_scores(network.model, network.graph, one_by_one, "none").items():
        np.testing.assert_allclose(again[name], 2 * score, rtol=1e-4)


def test_activation_of_every_layer_that_makes_the_channels_counts(zoo) -> None:
    network = zoo["image"]
    features = torch.randn(2, 30, 8)
    outputs = {}
    for name in ("body.conv2", "body.shortcut"):
        network.model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: outputs.update({name: o}))
    score = activation_scores(network.model, network.graph, [features], "none")["body.conv2"]
    expected = sum(output.abs().mean((0, 2, 3)) for output in outputs.values())
    np.testing.assert_allclose(score, expected.detach().numpy(), rtol=1e-5)
    for name in outputs:
        network.model.get_submodule(name)._forward_hooks.clear()


def test_activation_of_a_recurrent_layer_is_that_of_its_units(zoo) -> None:
    network = zoo["residual blstm"]
    features = torch.randn(2, 30, 8)
    scores = activation_scores(network.model, network.graph, [features], "none")
    first, _ = network.model.body.first(features)
    second, _ = network.model.body.second(first)
    expected = (first.abs() + second.abs()).mean((0, 1)).detach().numpy()
    found = np.concatenate([scores[group.name] for group in network.graph.groups() if group.width == 16])
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=1e-4)


def test_groups_that_a_score_says_nothing_of_are_left_out(zoo) -> None:
    assert bn_scale_scores(zoo["gated"].model, zoo["gated"].graph) == {}
    inner = activation_scores(zoo["lstm"].model, zoo["lstm"].graph, [torch.randn(2, 30, 8)])
    assert inner.keys() <= {group.name for group in zoo["lstm"].graph.groups()}


def test_every_score_is_finite_and_not_negative(zoo) -> None:
    for network in zoo.values():
        for scores in (
            l1_scores(network.model, network.graph),
            l2_scores(network.model, network.graph),
            bn_scale_scores(network.model, network.graph),
            activation_scores(network.model, network.graph, [torch.randn(2, 30, 8)]),
            taylor_scores(network.model, network.graph, [(torch.randn(2, 30, 8), torch.tensor([0, 1]))]),
        ):
            for group in network.graph.groups():
                if group.name in scores:
                    assert scores[group.name].shape == (group.width,)
                    assert np.isfinite(scores[group.name]).all()
                    assert (scores[group.name] >= 0).all()
