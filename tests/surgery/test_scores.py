"""Scores: the L1 norm of what a channel owns."""

import numpy as np
import torch

from compress.surgery import l1_scores


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
    kept = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    with torch.no_grad():
        for name in ("body.conv1.weight", "body.bn1.weight", "body.bn1.bias"):
            network.model.get_parameter(name)[5] *= 1e-3
    try:
        assert l1_scores(network.model, network.graph)["body.conv1"].argmin() == 5
    finally:
        network.model.load_state_dict(kept)
