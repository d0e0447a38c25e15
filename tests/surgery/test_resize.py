"""Resizing: a pruned state dict loads into a freshly built network."""

import pytest
import torch
from torch import nn

from compress.errors import ModelError
from compress.models.campplus import CAMPPlus
from compress.surgery import choose_channels, l1_scores, remove_channels, resize_to, widths_stored_in


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@torch.no_grad()
def test_a_pruned_campplus_is_rebuilt_from_its_shapes(campplus) -> None:
    graph = campplus.graph
    pruned = remove_channels(
        campplus.model, graph, choose_channels(graph, l1_scores(campplus.model, graph), 0.4).channels
    )
    fresh = CAMPPlus(growth_rate=16, bn_size=2, init_channels=64).eval()
    rebuilt = resize_to(fresh, shapes_of(pruned))
    rebuilt.load_state_dict(pruned.state_dict())
    features = torch.randn(2, 101, 80)
    assert torch.equal(rebuilt(features), pruned(features))
    assert repr(rebuilt) == repr(pruned)
    assert shapes_of(fresh) == shapes_of(campplus.model)


@torch.no_grad()
def test_every_network_is_rebuilt_from_its_shapes(zoo) -> None:
    for network in zoo.values():
        pruned = remove_channels(network.model, network.graph, {g.name: [0, 2] for g in network.graph.groups()})
        rebuilt = resize_to(network.model, shapes_of(pruned), widths_stored_in(pruned, network.graph))
        rebuilt.load_state_dict(pruned.state_dict())
        features = torch.randn(2, 30, 8)
        assert torch.equal(rebuilt(features), pruned(features))


def test_tied_parameters_stay_tied(zoo) -> None:
    pruned = remove_channels(zoo["tied"].model, zoo["tied"].graph, {"body.first": range(4)})
    rebuilt = resize_to(zoo["tied"].model, shapes_of(pruned))
    assert rebuilt.get_parameter("body.left.weight") is rebuilt.get_parameter("body.right.weight")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"body.9.weight": (4,)}, r"body\.9\.weight: Pooled has no such tensor"),
        ({"body.0.weight": (24, 8)}, r"body\.0\.weight: Pooled has shape \(24, 8, 3\) there, .*\(24, 8\)"),
        ({"body.0.weight": (16, 8, 5)}, r"body\.0\.weight: .* cannot become \(16, 8, 5\)"),
        ({"body.0.weight": (0, 8, 3)}, r"body\.0\.weight: .* cannot become \(0, 8, 3\)"),
        ({"body.0.weight": (16, 8, 3)}, r"body\.0\.bias has 24 channels, but body\.0\.weight has 16"),
    ],
)
def test_a_shape_that_does_not_fit_names_its_key(zoo, shapes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resize_to(zoo["tdnn"].model, shapes)


def test_a_layer_that_cannot_be_resized_is_named() -> None:
    with pytest.raises(ModelError, match=r"0\.weight: the width of LayerNorm cannot be changed from \(8,\) to \(6,\)"):
        resize_to(nn.Sequential(nn.LayerNorm(8)), {"0.weight": (6,)})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"recurrent.weight_hh_l0": (64, 12)}, r"weight_\w+ has shape \(64, \d+\), but .* goes with .*weight_ih_l0"),
        ({"recurrent.bias_hh_l0": (48,)}, r"bias_hh_l0 has shape \(48,\), but \(64,\)"),
        ({"recurrent.weight_ih_l1": (64, 24)}, r"weight_ih_l1 has shape \(64, 24\), but \(64, 32\)"),
    ],
)
def test_the_tensors_of_an_lstm_must_agree(zoo, shapes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resize_to(zoo["blstm"].model.body, shapes)


@pytest.mark.parametrize(("name", "width"), [("body.breadth", 8), ("head.width", 8), ("body.width", 0), ("eps", 1)])
def test_an_attribute_that_is_no_width_is_named(zoo, name: str, width: int) -> None:
    with pytest.raises(ModelError, match=rf"{name}: Pooled has no such width to set to {width}"):
        resize_to(zoo["res2net with stored width"].model, {}, {name: width})


def test_tied_keys_with_different_shapes_are_refused(zoo) -> None:
    shapes = {"body.left.weight": (12, 12, 1), "body.right.weight": (12, 16, 1)}
    with pytest.raises(ModelError, match=r"body\.right\.weight shares its tensor with body\.left\.weight"):
        resize_to(zoo["tied"].model, shapes)
