"""Selection: the asked fraction of parameters or multiply-accumulates, in permitted widths."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import SettingError
from compress.models import ARCHITECTURES
from compress.surgery import (
    ByteCounter,
    MacsCounter,
    ParameterCounter,
    Sensitivity,
    choose_channels,
    count_macs,
    count_parameters,
    kept_groups,
    l1_scores,
    parameters_after,
    remove_channels,
    trace,
)
from compress.surgery.selection import convex_rises, meet, predicted_loss, schedule_of


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


@pytest.fixture(scope="module")
def macs(campplus) -> MacsCounter:
    return MacsCounter(campplus.model, campplus.graph, campplus.graph.groups(), torch.randn(1, 60, 80))


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_a_fraction_of_the_multiply_accumulates_is_met(campplus, scores, macs, scope, ratio: float) -> None:
    selection = choose_channels(campplus.graph, scores, ratio, scope, counter=macs)
    pruned = remove_channels(campplus.model, campplus.graph, selection.channels)
    features = torch.randn(1, 60, 80)
    assert abs(selection.achieved - ratio) < 0.01
    assert selection.achieved == pytest.approx(1 - count_macs(pruned, features) / count_macs(campplus.model, features))
    assert selection.parameters_after == count_parameters(pruned)


def test_a_fraction_of_the_bytes_is_met(campplus, scores) -> None:
    counter = ByteCounter(campplus.graph, campplus.graph.groups())
    selection = choose_channels(campplus.graph, scores, 0.3, counter=counter)
    pruned = remove_channels(campplus.model, campplus.graph, selection.channels)
    elements = [sum(tensor.numel() for tensor in m.state_dict().values()) for m in (campplus.model, pruned)]
    assert selection.achieved == pytest.approx(1 - elements[1] / elements[0])
    assert abs(selection.achieved - 0.3) < 0.01


@settings(max_examples=15, deadline=None)
@given(ratios=st.tuples(st.floats(0.05, 0.7), st.floats(0.05, 0.7)), scope=st.sampled_from(["uniform", "global"]))
def test_more_asked_is_more_removed(campplus, scores, ratios: tuple[float, float], scope) -> None:
    less, more = sorted(ratios)
    first, second = (choose_channels(campplus.graph, scores, ratio, scope) for ratio in (less, more))
    assert second.parameters_after <= first.parameters_after + 0.0004 * first.parameters_before


@settings(max_examples=10, deadline=None)
@given(data=st.data(), scope=st.sampled_from(["uniform", "global", "sensitivity"]))
def test_the_schedule_only_ever_narrows(zoo, data: st.DataObject, scope) -> None:
    network = zoo[data.draw(st.sampled_from(sorted(zoo)))]
    scores, losses = l1_scores(network.model, network.graph), rising_losses(network.graph, data.draw(st.integers(0, 9)))
    schedule = schedule_of(network.graph, scores, scope, 1, 1, sensitivity=losses)
    counter = ParameterCounter(network.graph, network.graph.groups())
    counts = [counter.count(schedule.removed(schedule.after(steps))) for steps in range(len(schedule.order) + 1)]
    assert all(a > b for a, b in itertools.pairwise(counts))
    assert (schedule.after(len(schedule.order)) == schedule.end).all()


def rising_losses(graph, seed: int) -> Sensitivity:
    """Made-up losses that rise, some early and some late."""
    rng = np.random.default_rng(seed)
    losses = {group.name: np.cumsum(rng.exponential(size=3) ** 3) / 10 for group in graph.groups()}
    return Sensitivity((0.25, 0.5, 0.75), {name: tuple(loss.tolist()) for name, loss in losses.items()})


def test_groups_of_a_bundle_lose_equally_many(zoo) -> None:
    network = zoo["blstm"]
    scores = l1_scores(network.model, network.graph)
    for scope in ("uniform", "global", "sensitivity"):
        selection = choose_channels(
            network.graph, scores, 0.4, scope, round_to=1, min_width=1, sensitivity=rising_losses(network.graph, 1)
        )
        lost: dict[str, set[int]] = {}
        for group in network.graph.groups():
            lost.setdefault(group.bundle or group.name, set()).add(len(selection.channels.get(group.name, ())))
        assert any(group.bundle for group in network.graph.groups())
        assert all(len(counts) == 1 for counts in lost.values())
        remove_channels(network.model, network.graph, selection.channels)


def test_kept_groups_stay_and_the_others_go_further(campplus, scores) -> None:
    keep = kept_groups(campplus.graph, ["xvector.block2"])
    selection = choose_channels(campplus.graph, scores, 0.3, keep=keep)
    everywhere = choose_channels(campplus.graph, scores, 0.3)
    assert abs(selection.achieved - 0.3) < 0.01
    assert not keep & selection.channels.keys()
    assert keep & everywhere.channels.keys()
    with pytest.raises(SettingError, match=r"ratio 0\.9 cannot be reached: with all \d+ prunable groups"):
        choose_channels(campplus.graph, scores, 0.9, keep=kept_groups(campplus.graph, ["xvector.block*"]))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), ratio=st.floats(0.05, 0.7))
def test_by_sensitivity_the_predicted_loss_is_never_above_that_of_a_uniform_choice(
    campplus, scores, seed: int, ratio: float
) -> None:
    losses = rising_losses(campplus.graph, seed)
    chosen = choose_channels(campplus.graph, scores, ratio, "sensitivity", sensitivity=losses)
    uniform = choose_channels(campplus.graph, scores, ratio)
    assert abs(chosen.achieved - ratio) < 0.01

    def loss(selection) -> float:
        return sum(
            float(losses.losses_at(name, 1 - after / before)) for name, (before, after) in selection.widths.items()
        )

    assert loss(chosen) <= loss(uniform)


def test_by_sensitivity_channels_go_where_they_cost_nothing(campplus, scores) -> None:
    free = {group.name for group in campplus.graph.groups() if ".block2." in group.name}
    losses = {group.name: (0.0,) * 3 if group.name in free else (0.1, 0.2, 0.3) for group in campplus.graph.groups()}
    sensitivity = Sensitivity((0.25, 0.5, 0.75), losses)
    selection = choose_channels(campplus.graph, scores, 0.2, "sensitivity", sensitivity=sensitivity)
    assert free >= selection.channels.keys()
    assert abs(selection.achieved - 0.2) < 0.01


def test_sensitivity_is_weighed_against_what_is_saved(campplus, scores, macs) -> None:
    even = Sensitivity((0.5,), {group.name: (0.1,) for group in campplus.graph.groups()})
    narrowed = {
        counter.unit: choose_channels(campplus.graph, scores, 0.2, "sensitivity", counter=counter, sensitivity=even)
        for counter in (ParameterCounter(campplus.graph, campplus.graph.groups()), macs)
    }
    front = {unit: [n for n in found.channels if n.startswith("head")] for unit, found in narrowed.items()}
    # The 2-D front has few parameters and many multiply-accumulates.
    assert front["parameters"] == []
    assert len(front["multiply-accumulates"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "campplus"])
def test_every_registered_network_hits_its_targets_with_the_widths_that_runtimes_want(name: str) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build().eval()
    features = torch.zeros(1, 120, 400 if name == "fsmn_vad" else 80)
    graph = trace(model, features)
    scores = l1_scores(model, graph)
    for counter in (
        ParameterCounter(graph, graph.groups()),
        ByteCounter(graph, graph.groups()),
        MacsCounter(model, graph, graph.groups(), features),
    ):
        for scope in ("uniform", "global", "sensitivity"):
            for ratio in (0.2, 0.4, 0.6):
                selection = choose_channels(
                    graph, scores, ratio, scope, counter=counter, sensitivity=rising_losses(graph, 0)
                )
                assert abs(selection.achieved - ratio) < 0.01
    pruned = remove_channels(model, graph, selection.channels)
    assert selection.parameters_after == count_parameters(pruned)
    assert selection.achieved == pytest.approx(1 - count_macs(pruned, features) / count_macs(model, features))


def test_the_polished_target_is_near_even_with_one_step_a_group(full_campplus) -> None:
    scores = l1_scores(full_campplus.model, full_campplus.graph)
    counter = ParameterCounter(full_campplus.graph, full_campplus.graph.groups())
    schedule = schedule_of(full_campplus.graph, scores, "uniform", round_to=64)
    positions = meet(schedule, counter, 0.3, "")
    left = counter.counts(schedule.removed(np.stack([schedule.start, positions])))
    assert abs(left[1] / left[0] - 0.7) < 0.005


def test_a_convex_hull_is_taken_of_losses() -> None:
    assert convex_rises([0, 1, 2, 3], [0, 3, 3, 3]) == pytest.approx([1, 1, 1])
    assert convex_rises([0, 1, 2, 4], [0, 1, 4, 16]) == pytest.approx([1, 3, 12])
    assert convex_rises([0], [0]) == []


def test_predicted_loss_is_the_sum_over_groups(zoo) -> None:
    network = zoo["tdnn"]
    losses = Sensitivity((0.5,), {"body.0": (0.1,), "body.3": (0.3,)})
    schedule = schedule_of(network.graph, l1_scores(network.model, network.graph), sensitivity=losses)
    assert predicted_loss(schedule, np.array([1, 1]), losses) == pytest.approx(0.1 * 2 / 3 + 0.3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\).*got 1\.0"),
        ({"ratio": -0.1}, r"ratio must be in \[0, 1\).*got -0\.1"),
        ({"ratio": 0.99}, r"ratio 0\.99 cannot be reached: .* 0\.\d+ of the parameters"),
        ({"ratio": 0.5, "scope": "layer"}, "scope must be one of uniform, global, sensitivity, got 'layer'"),
        ({"ratio": 0.5, "scope": "sensitivity"}, "scope sensitivity needs the losses of measure_sensitivity"),
        (
            {"ratio": 0.99, "words": "params 9"},
            r"params 9 cannot be reached: .* \([\d,]+ of [\d,]+ stay\)",
        ),
        ({"ratio": 0.5, "round_to": 0}, "round_to must be at least 1, got 0"),
        ({"ratio": 0.5, "min_width": 0}, "min_width must be at least 1, got 0"),
    ],
)
def test_a_wrong_setting_is_named(campplus, scores, setting, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        choose_channels(campplus.graph, scores, **setting)
