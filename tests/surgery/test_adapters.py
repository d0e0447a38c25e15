"""Requests: channels and masks chosen elsewhere become channels of groups, and what stays is told."""

import copy
import json
import pickle
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError, InputError, SettingError
from compress.surgery import (
    Role,
    channels_of_lists,
    channels_of_masks,
    l1_scores,
    mask_channels,
    read_request,
    remove_channels,
)
from compress.surgery.adapters import level_bundles


def masks_of(network, channels) -> dict[str, dict[str, torch.Tensor]]:
    """The masks that a pruner would give for these channels: on every weight that makes them, and on its bias."""
    tensors = dict(network.model.named_parameters())
    masks: dict[str, dict[str, torch.Tensor]] = {}
    for group in network.graph.all_groups:
        for member in group.members:
            layer, _, leaf = member.name.rpartition(".")
            if leaf not in ("weight", "bias") or member.dim or member.role is Role.CONSUMER:
                continue
            if not isinstance(network.model.get_submodule(layer), torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Linear):
                continue
            mask = masks.setdefault(layer, {}).setdefault(leaf, torch.ones_like(tensors[member.name]))
            for channel in channels.get(group.name, ()):
                mask[list(member.indices[channel])] = 0
    return masks


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_masks_give_back_the_channels_they_were_made_of(zoo, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["tdnn", "gated", "depthwise", "grouped", "image", "shared", "tied", "res2net"]))
    network = zoo[name]
    channels = {
        group.name: tuple(sorted(data.draw(st.sets(st.integers(0, group.width - 1), max_size=group.width - 1))))
        for group in network.graph.groups()
    }
    found = channels_of_masks(network.graph, masks_of(network, channels))
    assert found.channels == {name: gone for name, gone in channels.items() if gone}
    assert found.dropped == ()


@torch.no_grad()
def test_saved_masks_are_removed_by_the_engine(zoo, tmp_path: Path) -> None:
    network = zoo["gated"]
    scores = l1_scores(network.model, network.graph)
    channels = {name: tuple(sorted(score.argsort()[: len(score) // 2].tolist())) for name, score in scores.items()}
    path = tmp_path / "masks.pt"
    torch.save(defaultdict(dict, masks_of(network, channels)), path)  # the type that NNI gives
    found = read_request(path, network.graph)
    assert found.channels == channels
    features = torch.randn(2, 30, 8)
    pruned = remove_channels(network.model, network.graph, found.channels)
    torch.testing.assert_close(
        pruned(features), mask_channels(network.model, network.graph, channels)(features), atol=1e-5, rtol=1e-4
    )


def test_a_json_list_and_a_json_mask_say_the_same(zoo, tmp_path: Path) -> None:
    path = tmp_path / "channels.json"
    path.write_text(json.dumps({"body.0": [5, 2]}))
    as_list = read_request(path, zoo["tdnn"].graph)
    path.write_text(json.dumps({"body.0": [int(i not in (2, 5)) for i in range(24)]}))
    assert read_request(path, zoo["tdnn"].graph) == as_list
    assert as_list.channels == {"body.0": (2, 5)}


def test_coupled_layers_lose_what_all_of_them_give_up(zoo) -> None:
    found = channels_of_lists(zoo["image"].graph, {"body.conv2": [1, 2, 3], "body.shortcut": [2, 3, 9]})
    assert found.channels == {"body.conv2": (2, 3)}
    assert found.dropped == (
        "body.conv2: 1 of 3 channels stay: body.shortcut makes the same channels and keeps them",
        "body.shortcut: 1 of 3 channels stay: body.conv2 makes the same channels and keeps them",
    )


def test_a_coupled_layer_that_is_not_named_has_no_say(zoo) -> None:
    found = channels_of_lists(zoo["image"].graph, {"body.shortcut": [2, 3]})
    assert (found.channels, found.dropped) == ({"body.conv2": (2, 3)}, ())


def test_a_frozen_layer_stays_with_its_reason(zoo) -> None:
    found = channels_of_lists(zoo["tdnn"].graph, {"embedding": [0, 1], "body.0": [3]})
    assert found.channels == {"body.0": (3,)}
    assert found.dropped == ("embedding: 2 of 2 channels stay: it is an output of the network",)


def test_a_channel_of_several_rows_goes_only_with_all_of_them(zoo) -> None:
    graph = zoo["res2net"].graph
    group = next(g for g in graph.groups() if any(m.name == "body.enter.weight" and m.dim == 0 for m in g.members))
    member = next(m for m in group.members if m.name == "body.enter.weight" and m.dim == 0)
    rows = member.indices[1]
    assert len(rows) > 1
    assert channels_of_lists(graph, {"body.enter": list(rows)}).channels == {group.name: (1,)}
    part = channels_of_lists(graph, {"body.enter": list(rows[:-1])})
    assert part.channels == {}
    assert part.dropped[0].endswith("channels stay: a channel has several rows there, and not all of them were named")


def test_masks_with_scattered_zeros_are_told(zoo) -> None:
    network = zoo["tdnn"]
    masks = masks_of(network, {"body.0": (1,)})
    masks["body.0"]["weight"][4, 0] = 0
    found = channels_of_masks(network.graph, masks)
    assert found.channels == {"body.0": (1,)}
    assert found.dropped == ("body.0: 1 channels stay: their masks leave some of their weights",)


def test_layers_that_the_pruner_left_alone_stay(zoo) -> None:
    masks = {"body.0": {"weight": None, "bias": torch.zeros(24)}, "body.3": {}}
    assert channels_of_masks(zoo["tdnn"].graph, masks).channels == {}


def test_both_names_of_a_tied_weight_are_known(zoo) -> None:
    graph = zoo["tied"].graph
    assert channels_of_lists(graph, {"body.right": [3]}) == channels_of_lists(graph, {"body.left": [3]})


def test_a_bundle_loses_equally_many(zoo) -> None:
    graph = zoo["residual blstm"].graph
    bundle = [group for group in graph.groups() if group.bundle]
    assert bundle
    channels = {group.name: tuple(range(2 + i)) for i, group in enumerate(bundle)}
    dropped = level_bundles(graph, channels)
    assert {len(gone) for gone in channels.values()} == {2}
    assert len(dropped) == len(bundle) - 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"channels\.json is not valid JSON"),
        ("[1, 2]", r'channels\.json must map layers to channels, \{"layer": \[0, 5\]\}; it holds \[1, 2\]\.'),
        ('{"body.0": 3}', r"channels\.json: body\.0 must be a list of channel numbers, or of 0 and 1, got 3\."),
        ('{"body.0": ["a"]}', r"must be a list of channel numbers, or of 0 and 1, got \['a'\]\."),
        ('{"body.0": [0.5]}', r"must be a list of channel numbers"),
        ('{"body.0": [24]}', r"channels\.json: body\.0: channels are numbered 0\.\.23, got 24\."),
        ('{"body.0": [-1]}', r"numbered 0\.\.23, got -1\."),
        ('{"body.0": [1, 0, 1]}', r"names a channel twice; a mask of 0 and 1 would have 24 entries\."),
        ('{"body.00": [1]}', r"unknown layer 'body\.00'\. Did you mean 'body\.0'\?"),
    ],
)
def test_a_wrong_list_is_refused(zoo, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "channels.json"
    path.write_text(content)
    with pytest.raises(CompressError, match=message):
        read_request(path, zoo["tdnn"].graph)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([1], r"masks must map layers to masks, .* got \[1\]\."),
        ({"body.0": torch.ones(24)}, r"masks: body\.0 must have masks by name"),
        ({"body.0": {"weight": torch.ones(23, 8, 3)}}, r"mask of body\.0\.weight must have 24 rows, got \[23, 8, 3\]"),
        ({"body.0": {"weight": 1}}, r"mask of body\.0\.weight must have 24 rows, got 1"),
    ],
)
def test_wrong_masks_are_refused(zoo, masks, message: str) -> None:
    with pytest.raises(InputError, match=message):
        channels_of_masks(zoo["tdnn"].graph, masks)
    with pytest.raises(SettingError, match=r"unknown layer 'body\.1x'"):
        channels_of_masks(zoo["tdnn"].graph, {"body.1x": {"weight": torch.ones(24)}})


class Code:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_hold_no_tensors_are_refused(zoo, tmp_path: Path, capsys) -> None:
    path = tmp_path / "masks.pt"
    with pytest.raises(InputError, match=r"masks\.pt: no such file"):
        read_request(path, zoo["tdnn"].graph)
    for content in (b"", b"not a zip", pickle.dumps(Code())):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"masks\.pt holds no masks that can be read safely\. Give channels"):
            read_request(path, zoo["tdnn"].graph)
    torch.save({"body.0": Code()}, path)
    with pytest.raises(InputError, match="holds no masks that can be read safely"):
        read_request(path, zoo["tdnn"].graph)
    assert "executed" not in capsys.readouterr().out


def test_masks_of_the_pruner_itself_are_taken(zoo, tmp_path: Path) -> None:
    pruning = pytest.importorskip("nni.compression.pruning", reason="the extra nni is not installed")
    network = zoo["tdnn"]
    model = copy.deepcopy(network.model)
    _, masks = pruning.L1NormPruner(model, [{"op_names": ["body.0"], "sparse_ratio": 0.5}]).compress()
    torch.save(masks, tmp_path / "masks.pt")
    found = read_request(tmp_path / "masks.pt", network.graph)
    norms = network.model.body[0].weight.abs().sum((1, 2))
    assert found.channels == {"body.0": tuple(sorted(norms.argsort()[:12].tolist()))}
    assert found.dropped == ()
