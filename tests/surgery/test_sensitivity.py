"""Sensitivity: what masking part of one group costs, measured, saved and read again."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import InputError
from compress.surgery import Sensitivity, cosine_loss, l1_scores, mask_channels, measure_sensitivity
from compress.surgery.sensitivity import masked, read_sensitivity, write_sensitivity

MADE_FROM = {"network": "ab12", "score": "l1", "loss": "cosine"}


def test_losses_are_those_of_the_masked_network(zoo) -> None:
    network = zoo["gated"]
    scores = l1_scores(network.model, network.graph)
    batches = [torch.randn(3, 30, 8), torch.randn(2, 20, 8)]
    names = [[group.name] for group in network.graph.groups()]
    table = measure_sensitivity(network.model, network.graph, scores, cosine_loss(network.model, batches), names)
    assert table.losses.keys() == {group.name for group in network.graph.groups()}
    for group in network.graph.groups():
        for fraction, loss in zip(table.fractions, table.losses[group.name], strict=True):
            lowest = np.argsort(scores[group.name], kind="stable")[: round(fraction * group.width)].tolist()
            other = mask_channels(network.model, network.graph, {group.name: lowest})
            with torch.no_grad():
                cosines = [torch.cosine_similarity(network.model(x), other(x)) for x in batches]
            assert loss == pytest.approx(1 - float(torch.cat(cosines).mean()), abs=1e-6)


def test_every_network_is_masked_and_restored(zoo) -> None:
    features = torch.randn(2, 30, 8)
    for network in zoo.values():
        before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
        bundles: dict[str, list[str]] = {}
        for group in network.graph.groups():
            bundles.setdefault(group.bundle or group.name, []).append(group.name)
        scores = l1_scores(network.model, network.graph)
        loss = cosine_loss(network.model, [features])
        table = measure_sensitivity(network.model, network.graph, scores, loss, bundles.values(), (0.5,))
        assert all(np.isfinite(losses).all() for losses in table.losses.values())
        assert max(losses[0] for losses in table.losses.values()) > 0
        after = network.model.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@torch.no_grad()
def test_masking_in_place_is_masking_in_a_copy(zoo) -> None:
    features = torch.randn(2, 30, 8)
    for network in zoo.values():
        first, *others = network.graph.groups()
        together = [first, *(group for group in others if group.bundle and group.bundle == first.bundle)]
        channels = {group.name: (0, 1) for group in together}
        expected = mask_channels(network.model, network.graph, channels)(features)
        with masked(network.model, network.graph, channels):
            torch.testing.assert_close(network.model(features), expected)


def test_a_failure_restores_the_weights(zoo) -> None:
    network = zoo["tdnn"]
    before = network.model.body[0].weight.clone()
    with suppress(KeyError), masked(network.model, network.graph, {"body.0": (0,)}):
        assert not torch.equal(network.model.body[0].weight, before)
        raise KeyError
    assert torch.equal(network.model.body[0].weight, before)


@given(losses=st.lists(st.floats(0, 2), min_size=1, max_size=4), fractions=st.lists(st.floats(0, 1), min_size=2))
def test_losses_never_fall_as_more_is_removed(losses: list[float], fractions: list[float]) -> None:
    known = tuple((i + 1) / (len(losses) + 1) for i in range(len(losses)))
    table = Sensitivity(known, {"layer": tuple(losses)})
    read = table.losses_at("layer", np.sort(fractions))
    assert (np.diff(read) >= -1e-12).all()
    assert table.losses_at("layer", np.array([0.0]))[0] == 0
    np.testing.assert_allclose(table.losses_at("layer", np.array(known)), np.maximum.accumulate(losses))


def test_a_table_is_saved_and_read(tmp_path: Path) -> None:
    table = Sensitivity((0.25, 0.5), {"a": (0.1, 0.2), "b": (0.0, 0.5)})
    path = tmp_path / "sensitivity.json"
    write_sensitivity(path, table, MADE_FROM)
    assert read_sensitivity(path, MADE_FROM, ["a", "b"]) == table
    assert read_sensitivity(path, MADE_FROM, ["b"]).losses == {"b": (0.0, 0.5)}
    assert [file.name for file in tmp_path.iterdir()] == ["sensitivity.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "table"}, r"is not a sensitivity table of this version \(schema 1\)\. Name another file, or remove"),
        ({"schema": 9}, "is not a sensitivity table of this version"),
        ({"network": "cd34"}, "was measured with network 'cd34', not 'ab12'. Name another file, or remove this one"),
        ({"score": "l2"}, "was measured with score 'l2', not 'l1'"),
        ({"losses": {"a": [0.1, 0.2]}}, r"is damaged \(KeyError: 'b'\)"),
        ({"losses": {"a": [0.1], "b": [0.1, 0.2]}}, "is damaged: its fractions and losses do not fit"),
        ({"losses": {"a": ["x", 0.1], "b": [0.1, 0.2]}}, r"is damaged \(ValueError"),
        ({"losses": {"a": [None, 0.1], "b": [0.1, 0.2]}}, r"is damaged \(TypeError"),
        ({"losses": 3}, r"is damaged \(TypeError"),
        ({"fractions": [0.5, 0.25]}, "is damaged: its fractions and losses do not fit"),
        ({"fractions": []}, "is damaged: its fractions and losses do not fit"),
    ],
)
def test_another_table_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "sensitivity.json"
    write_sensitivity(path, Sensitivity((0.25, 0.5), {"a": (0.1, 0.2), "b": (0.0, 0.5)}), MADE_FROM)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_sensitivity(path, MADE_FROM, ["a", "b"])


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text("{")
    with pytest.raises(InputError, match=r"sensitivity\.json is not valid JSON"):
        read_sensitivity(path, MADE_FROM, ["a"])
    path.write_text("[1]")
    with pytest.raises(InputError, match="is not a sensitivity table"):
        read_sensitivity(path, MADE_FROM, ["a"])
