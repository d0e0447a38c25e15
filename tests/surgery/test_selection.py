"""Selection: the asked fraction of parameters, in permitted widths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import SettingError
from compress.surgery import choose_channels, count_parameters, l1_scores, parameters_after, remove_channels


@pytest.fixture(scope="module")
def scores(campplus):
    return l1_scores(campplus.model, campplus.graph)


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_full_size_campplus_hits_the_ratio(full_campplus, scope, ratio: float) -> None:
    graph, model = full_campplus.graph, full_campplus.model
    selection = choose_channels(graph, l1_scores(model, graph), ratio, scope)
    assert abs(selection.achieved - ratio) < 0.001
    assert selection.parameters_before == count_parameters(model) == 6848544
    assert selection.parameters_after == parameters_after(graph, selection.channels)
    assert selection.parameters_after == count_parameters(remove_channels(model, graph, selection.channels))


@pytest.mark.parametrize("scope", ["uniform", "global"])
@settings(max_examples=15, deadline=None)
@given(ratio=st.floats(0.02, 0.75))
def test_every_narrowed_width_is_permitted_and_the_ratio_hit(campplus, scores, scope, ratio: float) -> None:
    selection = choose_channels(campplus.graph, scores, ratio, scope)
    assert abs(selection.achieved - ratio) < 0.01
    for name, (before, after) in selection.widths.items():
        quantum = 16 if name.startswith("head") else 8
        assert after == before or (after % quantum == 0 and after >= quantum)
        assert before - after == len(selection.channels.get(name, ()))


def test_uniform_takes_the_same_fraction_everywhere(full_campplus) -> None:
    selection = choose_channels(full_campplus.graph, l1_scores(full_campplus.model, full_campplus.graph), 0.4)
    fractions = [1 - after / before for before, after in selection.widths.values() if before >= 128]
    assert max(fractions) - min(fractions) <= 2 * 8 / 128


def test_the_lowest_scores_go(campplus, scores) -> None:
    selection = choose_channels(campplus.graph, scores, 0.3, "global")
    for name, gone in selection.channels.items():
        stay = np.delete(scores[name], gone)
        assert scores[name][list(gone)].max() <= stay.min()


def test_widths_that_round_to_eight_allows_are_multiples_of_eight_and_round_to_one_allows_others(zoo) -> None:
    network = zoo["tdnn"]
    scores = l1_scores(network.model, network.graph)
    coarse = choose_channels(network.graph, scores, 0.3)
    fine = choose_channels(network.graph, scores, 0.3, round_to=1, min_width=1)
    assert all(after % 8 == 0 for _, after in coarse.widths.values())
    assert any(after % 8 for _, after in fine.widths.values())
    assert abs(fine.achieved - 0.3) < 0.02


def test_round_to_holds_for_every_group(campplus, scores) -> None:
    selection = choose_channels(campplus.graph, scores, 0.3, round_to=4, min_width=4)
    assert all(after % 4 == 0 for _, after in selection.widths.values())


def test_ratio_zero_removes_nothing(campplus, scores) -> None:
    selection = choose_channels(campplus.graph, scores, 0.0)
    assert selection.channels == {}
    assert selection.achieved == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\).*got 1\.0"),
        ({"ratio": -0.1}, r"ratio must be in \[0, 1\).*got -0\.1"),
        ({"ratio": 0.99}, r"ratio 0\.99 cannot be reached: .* 0\.\d+ of the parameters"),
        ({"ratio": 0.5, "scope": "layer"}, "scope must be one of uniform, global, got 'layer'"),
        ({"ratio": 0.5, "round_to": 0}, "round_to must be at least 1, got 0"),
        ({"ratio": 0.5, "min_width": 0}, "min_width must be at least 1, got 0"),
    ],
)
def test_a_wrong_setting_is_named(campplus, scores, setting, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        choose_channels(campplus.graph, scores, **setting)
