"""Decisions: cohort statistics and AS-Norm by hand, log-odds, thresholds, and what is stored of them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.decision import Cohort, Decision, LogOdds, Point, as_norm, quality_columns
from compress.errors import InputError, ModelError, SettingError


def cohort(speakers: int = 12, top_n: int = 5, seed: int = 0) -> Cohort:
    directions = np.random.default_rng(seed).standard_normal((speakers, 6))
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return Cohort(unit.astype(np.float32), top_n, "others")


def decision(**changes: object) -> Decision:
    points = (
        Point("general", "both alike", 0.0, 0.5, 0.1, 0.2, (0.05, 0.15), None),
        Point("strict", "FPR of at most 1 %", 3.0, 0.8, 0.01, 0.4),
    )
    fields = {
        "points": points,
        "preset": "general",
        "log_odds": LogOdds(10.0, -5.0),
        "cohort": None,
        "trials": "trials",
        "data": "mine",
        "runtime": "torch",
        "figures": ({"scores": "cosine", "eer": 0.1},),
    }
    return Decision(**(fields | changes))  # type: ignore[arg-type]


def at_cosine(value: float) -> tuple[np.ndarray, np.ndarray]:
    """Two embeddings of this cosine, of different lengths."""
    return np.array([3.0, 0.0], np.float32), 5 * np.array([value, math.sqrt(1 - value**2)], np.float32)


def test_as_norm_of_numbers_computed_by_hand() -> None:
    one = np.array([1.0])
    # (0.5 - 0.1) / 0.2 = 2 and (0.5 - 0.2) / 0.1 = 3
    assert as_norm(0.5 * one, (0.1 * one, 0.2 * one), (0.2 * one, 0.1 * one)) == pytest.approx([2.5])


def test_cohort_statistics_are_of_the_highest_scores() -> None:
    voices = Cohort(np.eye(4, dtype=np.float32), 2, "others")
    mean, deviation = voices.statistics(np.array([[6.0, 0.0, 8.0, 0.0], [0.0, -8.0, 0.0, 6.0]]))
    assert mean == pytest.approx([0.7, 0.3])  # of 0.8 and 0.6; of 0.6 and 0
    assert deviation == pytest.approx([0.1, 0.3])


def test_a_cohort_of_equal_scores_is_refused() -> None:
    same = Cohort(np.tile(np.eye(3, dtype=np.float32)[:1], (4, 1)), 4, "others")
    with pytest.raises(ModelError, match="the cohort of others gives 4 equal scores"):
        same.statistics(np.ones((1, 3)))


@pytest.mark.parametrize("top_n", [1, 13])
def test_top_n_is_of_the_cohort(top_n: int) -> None:
    with pytest.raises(SettingError, match=rf"top_n must be in 2\.\.12, the cohort's speakers; got {top_n}"):
        cohort(top_n=top_n)


@given(seed=st.integers(0, 99), scale=st.floats(0.01, 100))
def test_neither_the_order_of_the_two_nor_their_lengths_matter(seed: int, scale: float) -> None:
    a, b = np.random.default_rng(seed).standard_normal((2, 6))
    judge = decision(cohort=cohort())
    first, second = judge.decide(a, b), judge.decide(b, scale * a)
    assert first.score == pytest.approx(second.score)
    assert first.llr == pytest.approx(second.llr)


@given(value=st.floats(-0.99, 0.99))
def test_the_verdict_is_the_threshold_on_the_score(value: float) -> None:
    for name in ("general", "strict"):
        found = decision().decide(*at_cosine(value), preset=name)
        assert found.cosine == pytest.approx(value, abs=1e-6)
        assert found.llr == pytest.approx(10 * found.score - 5)
        assert found.accepted == (found.score >= decision().log_odds.score_at(found.point.llr))


def test_the_probability_is_that_of_the_log_odds() -> None:
    found = decision().decide(*at_cosine(0.7))
    assert found.probability == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-6)
    assert decision(log_odds=LogOdds(5000.0, 0.0)).decide(*at_cosine(-0.9)).probability == 0.0
    assert decision(log_odds=LogOdds(5000.0, 0.0)).decide(*at_cosine(0.9)).probability == 1.0


def test_qualities_are_of_the_lower_and_the_higher_side() -> None:
    sides = {"duration": (np.array([1.0, math.e]), np.array([math.e**2, 1.0]))}
    assert quality_columns(sides, 2) == pytest.approx(np.array([[0.0, 2.0], [0.0, 1.0]]))
    assert quality_columns({}, 3).shape == (3, 0)


def test_longer_utterances_shift_the_log_odds() -> None:
    judge = decision(log_odds=LogOdds(10.0, -5.0, {"duration": (0.5, 0.25), "magnitude": (0.0, 1.0)}))
    found = judge.decide(*at_cosine(0.7), durations_s=(math.e**2, math.e))
    assert found.llr == pytest.approx(2 + 0.5 * 1 + 0.25 * 2 + math.log(5), abs=1e-5)
    assert judge.log_odds.score_at(0.0) is None
    with pytest.raises(InputError, match="depend on how long both utterances are: give durations_s"):
        judge.decide(*at_cosine(0.7))


def test_an_unknown_preset_offers_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"unknown preset 'strikt'\. Did you mean 'strict'"):
        decision().decide(*at_cosine(0.7), preset="strikt")


def test_an_embedding_without_direction_is_refused() -> None:
    with pytest.raises(ModelError, match="row 1 is all zeros"):
        decision().decide(np.ones(2), np.zeros(2))


def test_what_is_stored_decides_alike() -> None:
    judge = decision(cohort=cohort(), log_odds=LogOdds(1.5, -2.0, {"magnitude": (0.1, 0.2)}, 0.01))
    assert judge.cohort is not None
    again = Decision.of_record(json.loads(json.dumps(judge.record())), judge.cohort.embeddings)
    a, b = np.random.default_rng(0).standard_normal((2, 6))
    assert again.decide(a, b) == judge.decide(a, b)
    assert again.record() == judge.record()
    for other in (None, judge.cohort.embeddings[:-1], judge.cohort.embeddings[::-1]):
        with pytest.raises(ValueError, match=r"npy does not hold the cohort that the thresholds were fitted with"):
            Decision.of_record(judge.record(), other)
