"""Widths: the multiples that runtimes want, and layers that are left whole."""

import pytest

from compress.errors import SettingError
from compress.surgery.widths import kept_groups, least_width, multiple_for, permitted_widths


def group_named(graph, name: str):
    return next(group for group in graph.all_groups if group.name == name)


def test_channels_of_images_go_by_sixteen_and_others_by_eight(campplus) -> None:
    for group in campplus.graph.groups():
        assert multiple_for(campplus.graph, group) == (16 if group.name.startswith("head") else 8)


def test_the_multiple_suits_readers_too(zoo) -> None:
    assert multiple_for(zoo["image"].graph, group_named(zoo["image"].graph, "body.conv2")) == 16
    assert multiple_for(zoo["gated"].graph, group_named(zoo["gated"].graph, "body.squeeze")) == 8


def test_permitted_widths_go_down_to_the_floor(campplus) -> None:
    group = group_named(campplus.graph, "xvector.tdnn.linear")
    assert permitted_widths(campplus.graph, [group], None, None) == [64, 56, 48, 40, 32, 24, 16, 8]
    assert permitted_widths(campplus.graph, [group], 12, None) == [64, 60, 48, 36, 24, 12]
    assert permitted_widths(campplus.graph, [group], 16, 30) == [64, 48, 32]
    assert permitted_widths(campplus.graph, [group], 1, None) == list(range(64, 7, -1))
    assert permitted_widths(campplus.graph, [group], 1, 1) == list(range(64, 0, -1))
    assert permitted_widths(campplus.graph, [group], 100, None) == [64]


def test_a_kept_layer_keeps_rows_and_columns(zoo) -> None:
    graph = zoo["tdnn"].graph
    assert kept_groups(graph, []) == frozenset()
    assert kept_groups(graph, ["body.0"]) == {"body.0"}
    assert kept_groups(graph, ["body.3"]) == {"body.0", "body.3"}
    assert kept_groups(graph, ["embedding"]) == {"body.3", "embedding"}


def test_patterns_name_layers_or_what_contains_them(campplus) -> None:
    graph = campplus.graph
    whole = kept_groups(graph, ["head"])
    assert whole == kept_groups(graph, ["head.*"])
    assert {group.name for group in graph.groups() if group.name.startswith("head")} == whole
    assert kept_groups(graph, ["*.tdnnd1.linear1", "head"]) > whole


def test_a_shared_tensor_is_kept_under_any_of_its_names(zoo) -> None:
    graph = zoo["tied"].graph
    assert kept_groups(graph, ["body.right"]) == kept_groups(graph, ["body.left"]) != frozenset()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("xvector.tdn", r"keep: no layer matches 'xvector\.tdn'\. Near it are .*xvector\.tdnn"),
        ("*.tdnnd99.linear1", r"keep: no layer matches '\*\.tdnnd99\.linear1'\. Near it are"),
        ("zzzz", r"keep: no layer matches 'zzzz'\. A dry run lists the layers\."),
        ("xvector.tdnn.linear.weight", "keep: no layer matches"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(campplus, pattern: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        kept_groups(campplus.graph, ["head", pattern])


def test_an_lstm_keeps_more_units_than_projections(zoo) -> None:
    graph = zoo["lstm with projection"].graph
    units = [group for group in graph.groups() if group.bundle == "body.recurrent.hidden_size"]
    assert [least_width(graph, group) for group in units] == [9, 9]
    assert permitted_widths(graph, units, 1, 1) == list(range(16, 8, -1))
