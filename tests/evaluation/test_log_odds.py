"""Log-odds: the logistic fit against closed forms, costs against brute force."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.decision import quality_columns
from compress.errors import InputError
from compress.evaluation.log_odds import (
    actual_dcf,
    bayes_threshold,
    cllr,
    decision_costs,
    fit_log_odds,
    llr_costs,
    logit,
    min_cllr,
)
from compress.verification import min_dcf


def gaussian(trials: int = 200_000, low: float = 0.1, high: float = 0.6, deviation: float = 0.2, seed: int = 0):
    """Scores of two normal distributions of equal variance; every fourth trial is target."""
    rng = np.random.default_rng(seed)
    labels = np.arange(trials) % 4 == 0
    return labels, np.where(labels, high, low) + deviation * rng.standard_normal(trials)


@pytest.mark.parametrize("prior", [0.1, 0.5, 0.9])
def test_normal_scores_of_equal_variance_have_the_known_line(prior: float) -> None:
    labels, scores = gaussian()
    fitted = fit_log_odds(labels, scores, prior=prior)
    slope, offset = 0.5 / 0.2**2, (0.1**2 - 0.6**2) / (2 * 0.2**2)
    assert fitted.slope == pytest.approx(slope, rel=0.03)
    assert fitted.offset == pytest.approx(offset, rel=0.03)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), scale=st.floats(0.01, 100), shift=st.floats(-5, 5))
def test_a_line_before_the_fit_changes_nothing(seed: int, scale: float, shift: float) -> None:
    labels, scores = gaussian(400, seed=seed)
    first, second = fit_log_odds(labels, scores), fit_log_odds(labels, scale * scores + shift)
    none = np.empty((400, 0))
    np.testing.assert_allclose(first.of(scores, none), second.of(scale * scores + shift, none), atol=1e-4)


def test_the_fit_is_where_no_neighbour_costs_less() -> None:
    labels, scores = gaussian(2000)
    fitted = fit_log_odds(labels, scores)
    best = cllr(labels, fitted.slope * scores + fitted.offset)
    for slope, offset in ((0.99, 0), (1.01, 0), (1, -0.05), (1, 0.05)):
        assert cllr(labels, slope * fitted.slope * scores + fitted.offset + offset) > best


def test_a_quality_that_shifts_the_scores_is_found() -> None:
    labels, scores = gaussian(100_000)
    rng = np.random.default_rng(1)
    durations = np.exp(rng.uniform(0, 2, (2, len(labels))))
    columns = quality_columns({"duration": (durations[0], durations[1])}, len(labels))
    fitted = fit_log_odds(labels, scores - 0.1 * columns[:, 0], columns, ("duration",))
    low, high = fitted.quality["duration"]
    assert low == pytest.approx(0.1 * fitted.slope, rel=0.06)
    assert high == pytest.approx(0, abs=0.06)


@pytest.mark.parametrize("seconds", [3.0, 1 + 1e-7 * np.arange(600) / 600], ids=["equal", "equal but for rounding"])
def test_a_quality_that_all_trials_share_has_no_weight(seconds: np.ndarray | float) -> None:
    """Its mean is off by rounding, so its deviation is not 0."""
    labels, scores = gaussian(600)
    columns = quality_columns({"duration": (np.full(600, seconds), np.full(600, seconds))}, 600)
    fitted = fit_log_odds(labels, scores, columns, ["duration"])
    assert fitted.quality == {"duration": (0.0, 0.0)}
    assert fitted.slope == pytest.approx(fit_log_odds(labels, scores).slope, rel=1e-3)


def test_scores_that_separate_the_trials_have_a_finite_line() -> None:
    labels = np.array([True, True, False, False])
    fitted = fit_log_odds(labels, np.array([0.9, 0.8, 0.2, 0.1]))
    assert 0 < fitted.slope < 1e4
    assert fitted.slope * 0.8 + fitted.offset > 0 > fitted.slope * 0.2 + fitted.offset


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.3, 0.3, 0.3, 0.3], "all trials have the same score"),
        ([0.3, np.nan, 0.3, 0.1], "is not finite"),
        ([0.1, 0.2, 0.8, 0.9], "target trials have no higher scores than non-target trials"),
    ],
)
def test_scores_that_tell_nothing_are_refused(scores: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_log_odds(np.array([True, True, False, False]), np.array(scores))


def test_cllr_of_known_values() -> None:
    labels = np.array([True, False, False])
    assert cllr(labels, np.zeros(3)) == pytest.approx(1)
    assert cllr(labels, np.array([800.0, -800, -800])) == 0
    # a target told to be as likely as 3 to 1, non-targets 1 to 3: log2(4/3) each
    assert cllr(labels, math.log(3) * np.array([1.0, -1, -1])) == pytest.approx(math.log2(4 / 3))


def brute_force_min_cllr(labels: np.ndarray, scores: np.ndarray) -> float:
    """Merge neighbouring groups of trials until the share of targets rises, one merge at a time."""
    groups = [[int((labels & (scores == v)).sum()), int((scores == v).sum())] for v in sorted(set(scores.tolist()))]
    while True:
        falls = [i for i in range(len(groups) - 1) if groups[i][0] * groups[i + 1][1] > groups[i + 1][0] * groups[i][1]]
        if not falls:
            break
        i = falls[0]
        groups[i : i + 2] = [[groups[i][0] + groups[i + 1][0], groups[i][1] + groups[i + 1][1]]]
    targets, nontargets = labels.sum(), (~labels).sum()
    cost = 0.0
    for hits, count in groups:
        misses = count - hits
        ratio = (hits / targets) / (misses / nontargets) if misses else math.inf
        cost += hits / targets * math.log2(1 + 1 / ratio) if hits else 0
        cost += misses / nontargets * math.log2(1 + ratio) if misses else 0
    return cost / 2


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), trials=st.integers(4, 40))
def test_min_cllr_is_that_of_pooled_neighbours_and_no_fit_is_better(seed: int, trials: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.arange(trials) % 2 == 0
    scores = np.round(rng.standard_normal(trials) + labels, 1)
    least = min_cllr(labels, scores)
    assert least == pytest.approx(brute_force_min_cllr(labels, scores))
    assert least <= cllr(labels, scores) + 1e-12
    assert min_cllr(labels, np.exp(scores)) == pytest.approx(least)


def test_the_bayes_threshold_of_known_costs() -> None:
    assert bayes_threshold(0.5) == 0
    assert bayes_threshold(0.01) == pytest.approx(-logit(0.01)) == pytest.approx(math.log(99))
    assert bayes_threshold(0.5, c_miss=10) == pytest.approx(-math.log(10))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), p_target=st.floats(0.01, 0.99))
def test_no_decision_costs_less_than_min_dcf(seed: int, p_target: float) -> None:
    labels, scores = gaussian(60, seed=seed)
    llrs = 10 * (scores - 0.35)
    assert actual_dcf(labels, llrs, p_target) >= min_dcf(labels, llrs, p_target) - 1e-12
    counted = sum(
        (p_target if target else 1 - p_target) / (labels.sum() if target else (~labels).sum())
        for target, llr in zip(labels, llrs, strict=True)
        if (llr >= bayes_threshold(p_target)) != target
    )
    assert actual_dcf(labels, llrs, p_target) == pytest.approx(counted / min(p_target, 1 - p_target))


def test_costs_of_trials_add_up() -> None:
    labels, scores = gaussian(100)
    for costs, whole in (
        (llr_costs(labels, scores), cllr(labels, scores)),
        (decision_costs(labels, scores), actual_dcf(labels, scores)),
    ):
        assert costs[labels].mean() + costs[~labels].mean() == pytest.approx(whole)
