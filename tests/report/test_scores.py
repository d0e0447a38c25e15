import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.report import TrialScores
from compress.report.scores import bin_edges, det_points, error_rates, histogram


@settings(max_examples=30)
@given(seed=st.integers(0, 99), decimals=st.integers(1, 6))
def test_det_points_are_error_rates_at_some_threshold(seed: int, decimals: int) -> None:
    random = np.random.default_rng(seed)
    labels = np.arange(400) % 3 == 0
    scores = np.round(random.normal(labels * 0.5, 0.4), decimals)
    fpr, fnr = det_points(TrialScores(labels, scores, 0.0), max_points=50)
    possible = {error_rates(TrialScores(labels, scores, float(threshold))) for threshold in scores}
    drawn = np.round(np.stack([fpr, fnr], axis=1), 9)
    assert fpr.size <= 50
    assert {tuple(point) for point in drawn.tolist()} <= {tuple(np.round(point, 9).tolist()) for point in possible}
    assert (np.diff(fpr) <= 0).all()
    assert (np.diff(fnr) >= 0).all()


def test_separated_scores_have_no_point_on_normal_deviate_axes() -> None:
    fpr, fnr = det_points(TrialScores(np.array([True, False]), np.array([0.9, 0.1]), 0.5))
    assert fpr.size == fnr.size == 0


@given(seed=st.integers(0, 99))
def test_histogram_shares_sum_to_one(seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=100).astype(np.float32)
    trials = TrialScores(np.arange(100) % 2 == 0, scores, 3.0)
    edges = bin_edges([trials])
    assert edges[0] <= scores.min()
    assert edges[-1] >= 3.0
    assert histogram(trials.targets, edges).sum() == pytest.approx(1)


def test_misshaped_scores_are_a_bug() -> None:
    with pytest.raises(ValueError, match=r"labels \(2,\) and scores \(3,\)"):
        TrialScores(np.zeros(2, bool), np.zeros(3), 0.0)
