from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compress.errors import InputError, ModelError, SettingError
from compress.verification import (
    CHUNK_TRIALS,
    cosine_scores,
    cost_interval,
    decision_flips,
    det_curve,
    eer,
    eer_difference_interval,
    eer_interval,
    min_dcf,
)

Trials = tuple[NDArray[np.bool_], NDArray[np.float64]]
SpokenTrials = tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.intp], NDArray[np.intp]]

QUICK = settings(deadline=None, max_examples=60)  # no deadline: a busy machine is no failure


@st.composite
def trials(draw: st.DrawFn) -> Trials:
    """Trials of both kinds with few distinct scores, so that ties within and between the kinds are common."""
    values = st.integers(-draw(st.integers(0, 12)), draw(st.integers(0, 12)))
    targets = draw(st.lists(values, min_size=1, max_size=30))
    nontargets = draw(st.lists(values, min_size=1, max_size=30))
    labels = np.array([True] * len(targets) + [False] * len(nontargets))
    order = draw(st.permutations(range(len(labels))))
    return labels[list(order)], np.array(targets + nontargets)[list(order)] / 16


def operating_points(labels: NDArray[np.bool_], scores: NDArray[np.floating[Any]]) -> list[tuple[Fraction, Fraction]]:
    """Exact (FNR, FPR) at every threshold, by counting each one's errors from scratch."""
    targets, nontargets = scores[labels].tolist(), scores[~labels].tolist()
    return [
        (
            Fraction(sum(not score >= threshold for score in targets), len(targets)),
            Fraction(sum(score >= threshold for score in nontargets), len(nontargets)),
        )
        for threshold in [*sorted({*targets, *nontargets}), float("inf")]
    ]


def brute_force_eer(labels: NDArray[np.bool_], scores: NDArray[np.floating[Any]]) -> Fraction:
    """Cut every segment of the DET polyline with the diagonal, in exact fractions."""
    points = operating_points(labels, scores)
    crossings = set()
    for (x0, y0), (x1, y1) in pairwise(points):
        if (x0 - y0) * (x1 - y1) <= 0:
            # Cramer's rule for the line through both points and the line x = y.
            crossings.add((x0 * y1 - x1 * y0) / ((x0 - x1) - (y0 - y1)))
    (crossing,) = crossings
    return crossing


def synthetic_trials(speakers: int, utterances: int, shift: float, seed: int) -> SpokenTrials:
    """All pairs of the utterances of some speakers; target scores lie higher, and speakers differ in how much."""
    generator = np.random.default_rng(seed)
    speaker_of = np.repeat(np.arange(speakers), utterances)
    enroll, test = np.triu_indices(len(speaker_of), k=1)
    labels = speaker_of[enroll] == speaker_of[test]
    ease = generator.normal(0, 0.7, speakers)
    scores = generator.normal(size=len(labels)) + labels * (shift + ease[speaker_of[enroll]])
    return labels, scores, speaker_of[enroll], speaker_of[test]


class TestCosineScores:
    @given(seed=st.integers(0, 99), trials_over_a_chunk=st.integers(-1, 1))
    @settings(deadline=None, max_examples=20)
    def test_equals_the_definition(self, seed: int, trials_over_a_chunk: int) -> None:
        generator = np.random.default_rng(seed)
        embeddings = generator.normal(size=(30, 7)) * 10.0 ** generator.integers(-12, 12, (30, 1))
        enroll, test = generator.integers(30, size=(2, CHUNK_TRIALS + trials_over_a_chunk))
        expected = [
            np.dot(embeddings[i], embeddings[j]) / np.linalg.norm(embeddings[i]) / np.linalg.norm(embeddings[j])
            for i, j in zip(enroll, test, strict=True)
        ]
        scores = cosine_scores(embeddings, enroll, test)
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, expected, atol=1e-14)
        single = cosine_scores(embeddings.astype(np.float32), enroll, test)
        assert single.dtype == np.float32
        np.testing.assert_allclose(single, expected, atol=1e-6)

    def test_swapping_enrollment_and_test_gives_the_same_bits(self) -> None:
        generator = np.random.default_rng(0)
        embeddings = generator.normal(size=(50, 192)).astype(np.float32)
        enroll, test = generator.integers(50, size=(2, 5000))
        np.testing.assert_array_equal(cosine_scores(embeddings, enroll, test), cosine_scores(embeddings, test, enroll))

    def test_an_utterance_matches_itself_with_1_and_its_negative_with_minus_1(self) -> None:
        embeddings = np.random.default_rng(0).normal(size=(100, 192)).astype(np.float32)
        rows = np.arange(100)
        scores = cosine_scores(np.concatenate([embeddings, -embeddings]), np.tile(rows, 2), np.arange(200))
        np.testing.assert_allclose(scores, np.repeat([1.0, -1.0], 100), atol=1e-6)
        assert np.abs(scores).max() <= 1

    def test_no_trials_give_no_scores(self) -> None:
        none = np.array([], np.intp)
        assert cosine_scores(np.ones((2, 3), np.float32), none, none).shape == (0,)

    def test_zero_embedding_is_named(self) -> None:
        embeddings = np.ones((5, 4), np.float32)
        embeddings[3] = 0
        with pytest.raises(ModelError, match=r"row 3 is all zeros \(1 of 5 rows"):
            cosine_scores(embeddings, np.array([0]), np.array([1]))

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_embedding_that_is_not_finite_is_named(self, value: float) -> None:
        embeddings = np.ones((5, 4), np.float32)
        embeddings[2:4, 1] = value
        with pytest.raises(ModelError, match=r"row 2 holds NaN or infinite values \(2 of 5 rows"):
            cosine_scores(embeddings, np.array([0]), np.array([1]))

    def test_rows_that_do_not_exist_are_a_bug(self) -> None:
        embeddings = np.ones((5, 4), np.float32)
        with pytest.raises(IndexError):
            cosine_scores(embeddings, np.array([0]), np.array([5]))
        with pytest.raises(IndexError):
            cosine_scores(embeddings, np.array([-1]), np.array([0]))
        with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\)"):
            cosine_scores(embeddings, np.array([0]), np.array([0, 1]))


class TestDetCurve:
    @given(trials())
    @QUICK
    def test_equals_counting_each_threshold(self, labelled: Trials) -> None:
        thresholds, fnr, fpr = det_curve(*labelled)
        assert list(thresholds) == [*sorted(set(labelled[1])), float("inf")]
        assert list(zip(fnr, fpr, strict=True)) == [(float(x), float(y)) for x, y in operating_points(*labelled)]

    @given(trials())
    @QUICK
    def test_runs_from_accepting_all_to_rejecting_all(self, labelled: Trials) -> None:
        thresholds, fnr, fpr = det_curve(*labelled)
        assert (fnr[0], fpr[0], fnr[-1], fpr[-1]) == (0, 1, 1, 0)
        assert (np.diff(thresholds) > 0).all()
        assert (np.diff(fnr) >= 0).all()
        assert (np.diff(fpr) <= 0).all()

    def test_order_of_the_trials_does_not_matter(self) -> None:
        generator = np.random.default_rng(0)
        labels, scores = generator.random(2000) < 0.3, generator.integers(0, 200, 2000) / 8
        shuffled = generator.permutation(2000)
        for before, after in zip(det_curve(labels, scores), det_curve(labels[shuffled], scores[shuffled]), strict=True):
            np.testing.assert_array_equal(before, after)


class TestEER:
    @given(trials())
    @QUICK
    def test_equals_brute_force_on_scores_with_ties(self, labelled: Trials) -> None:
        assert eer(*labelled)[0] == pytest.approx(float(brute_force_eer(*labelled)), abs=1e-12)

    def test_equals_brute_force_on_many_random_scores(self) -> None:
        generator = np.random.default_rng(1)
        for _ in range(20):
            labels = generator.random(300) < 0.4
            scores = np.round(generator.normal(size=300) + labels, 2).astype(np.float32)
            assert eer(labels, scores)[0] == pytest.approx(float(brute_force_eer(labels, scores)), abs=1e-12)

    @given(trials())
    @QUICK
    def test_threshold_is_a_score_nearest_to_equal_errors(self, labelled: Trials) -> None:
        labels, scores = labelled
        threshold = eer(labels, scores)[1]
        assert threshold in scores
        gaps = {
            value: abs(fnr - fpr)
            for value, (fnr, fpr) in zip(sorted(set(scores)), operating_points(labels, scores), strict=False)
        }
        assert gaps[threshold] == min(gaps.values())

    @given(trials(), st.floats(0.1, 10), st.floats(-3, 3))
    @QUICK
    def test_rising_transform_changes_nothing_and_carries_the_threshold(
        self, labelled: Trials, scale: float, offset: float
    ) -> None:
        labels, scores = labelled
        transformed = np.arctan(scale * scores + offset)
        rate, threshold = eer(labels, scores)
        assert eer(labels, transformed) == (rate, transformed[np.flatnonzero(scores == threshold)[0]])
        assert min_dcf(labels, transformed) == min_dcf(labels, scores)

    @given(trials())
    @QUICK
    def test_swapped_labels_and_negated_scores_give_the_same(self, labelled: Trials) -> None:
        labels, scores = labelled
        assert eer(~labels, -scores)[0] == pytest.approx(eer(labels, scores)[0], abs=1e-12)

    @given(trials())
    @QUICK
    def test_negated_scores_give_the_complement(self, labelled: Trials) -> None:
        labels, scores = labelled
        assert eer(labels, -scores)[0] == pytest.approx(1 - eer(labels, scores)[0], abs=1e-12)

    @given(trials(), st.integers(2, 4))
    @QUICK
    def test_listing_every_trial_several_times_changes_nothing(self, labelled: Trials, times: int) -> None:
        labels, scores = labelled
        assert eer(np.tile(labels, times), np.tile(scores, times)) == pytest.approx(eer(labels, scores), abs=1e-12)

    def test_perfect_separation_is_0_and_decides_every_trial_rightly(self) -> None:
        labels, scores = np.array([True, False, True, False]), np.array([0.7, 0.2, 0.9, 0.3])
        rate, threshold = eer(labels, scores)
        assert rate == 0
        np.testing.assert_array_equal(scores >= threshold, labels)

    def test_perfect_confusion_is_1(self) -> None:
        assert eer(np.array([True, False]), np.array([0.0, 1.0]))[0] == 1

    @given(targets=st.integers(1, 50), nontargets=st.integers(1, 50))
    @QUICK
    def test_all_scores_tied_is_a_half(self, targets: int, nontargets: int) -> None:
        labels = np.array([True] * targets + [False] * nontargets)
        assert eer(labels, np.full(len(labels), 0.3))[0] == 0.5

    def test_gaussian_scores_give_the_known_rate(self) -> None:
        generator = np.random.default_rng(0)
        labels = np.arange(400_000) < 100_000
        rate, threshold = eer(labels, generator.normal(size=400_000) + 2.0 * labels)
        assert rate == pytest.approx(0.158655, abs=0.002)  # the normal distribution below -1
        assert threshold == pytest.approx(1.0, abs=0.02)

    def test_single_precision_scores_and_their_threshold_agree_on_every_decision(self) -> None:
        generator = np.random.default_rng(0)
        labels = generator.random(5000) < 0.5
        scores = (generator.normal(size=5000) + labels).astype(np.float32)
        rate, threshold = eer(labels, scores)
        wrong = (scores >= np.float64(threshold)) != labels
        assert wrong[labels].mean() == pytest.approx(rate, abs=1e-3)
        assert wrong[~labels].mean() == pytest.approx(rate, abs=1e-3)

    @pytest.mark.parametrize(("label", "kind"), [(False, "a target"), (True, "a non-target")])
    def test_trials_of_one_kind_are_refused(self, label: bool, kind: str) -> None:
        with pytest.raises(InputError, match=f"none of the 3 trials is {kind}, so no EER"):
            eer(np.full(3, label), np.arange(3.0))

    def test_score_that_is_not_finite_is_named(self) -> None:
        with pytest.raises(InputError, match=r"trial 2 \(counted from 0\) has the score nan \(1 of 3"):
            eer(np.array([True, False, True]), np.array([0.1, 0.2, np.nan]))

    def test_labels_must_be_bool(self) -> None:
        with pytest.raises(TypeError, match="bool array"):
            eer(np.array([1, 0]), np.array([0.1, 0.2]))

    def test_labels_must_match_scores(self) -> None:
        with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
            eer(np.array([True, False]), np.arange(3.0))


class TestMinDCF:
    @given(trials(), st.floats(0.001, 0.999), st.floats(0.1, 10), st.floats(0.1, 10))
    @QUICK
    def test_equals_brute_force_and_is_in_0_to_1(
        self, labelled: Trials, p_target: float, c_miss: float, c_fa: float
    ) -> None:
        costs = [
            c_miss * p_target * float(fnr) + c_fa * (1 - p_target) * float(fpr)
            for fnr, fpr in operating_points(*labelled)
        ]
        expected = min(costs) / min(c_miss * p_target, c_fa * (1 - p_target))
        cost = min_dcf(*labelled, p_target=p_target, c_miss=c_miss, c_fa=c_fa)
        assert cost == pytest.approx(expected, abs=1e-12)
        assert 0 <= cost <= 1 + 1e-12

    def test_perfect_separation_is_0_and_no_information_is_1(self) -> None:
        labels = np.array([True, False, False])
        assert min_dcf(labels, np.array([1.0, 0.0, 0.5])) == 0
        assert min_dcf(labels, np.zeros(3)) == 1

    @pytest.mark.parametrize("p_target", [0.0, 1.0, -0.1, 2.0])
    def test_prior_out_of_range_names_the_range(self, p_target: float) -> None:
        with pytest.raises(SettingError, match="p_target must be between 0 and 1"):
            min_dcf(np.array([True, False]), np.array([1.0, 0.0]), p_target=p_target)

    def test_cost_must_be_positive(self) -> None:
        with pytest.raises(SettingError, match=r"c_miss and c_fa must be positive, got 0 and 1\.0"):
            min_dcf(np.array([True, False]), np.array([1.0, 0.0]), c_miss=0)


class TestDecisionFlips:
    @given(trials(), st.floats(-1, 1))
    @QUICK
    def test_a_system_never_differs_from_itself(self, labelled: Trials, threshold: float) -> None:
        assert decision_flips(labelled[1], threshold, labelled[1], threshold) == 0

    @given(trials(), st.integers(0, 99))
    @QUICK
    def test_equals_counting_them_and_does_not_depend_on_the_order(self, labelled: Trials, seed: int) -> None:
        scores = labelled[1]
        others = np.random.default_rng(seed).permutation(scores)
        flips = sum((a >= 0.1) != (b >= -0.2) for a, b in zip(scores, others, strict=True))
        assert decision_flips(scores, 0.1, others, -0.2) == decision_flips(others, -0.2, scores, 0.1) == flips

    def test_threshold_between_two_neighbouring_floats_is_not_rounded_onto_them(self) -> None:
        low = np.float32(0.5)
        high = np.nextafter(low, np.float32(1))
        scores = np.array([low, high], np.float32)
        assert decision_flips(scores, float(low) + 1e-10, scores, float(high)) == 0

    def test_other_trials_are_a_bug(self) -> None:
        with pytest.raises(ValueError, match="differ in shape"):
            decision_flips(np.zeros(2), 0.0, np.zeros(3), 0.0)


class TestEERInterval:
    def test_equals_repeating_the_trials_of_every_drawn_speaker(self) -> None:
        labels, scores, enroll, test = synthetic_trials(6, 4, 1.0, seed=3)
        scores = np.round(scores, 1)
        generator = np.random.default_rng(7)
        rates = []
        for _ in range(40):
            drawn = list(generator.integers(6, size=6))
            times = [
                drawn.count(a) if a == b else drawn.count(a) * drawn.count(b) for a, b in zip(enroll, test, strict=True)
            ]
            rates.append(eer(np.repeat(labels, times), np.repeat(scores, times))[0])
        expected = np.quantile(rates, [0.05, 0.95])
        interval = eer_interval(labels, scores, enroll, test, resamples=40, seed=7, level=0.9)
        np.testing.assert_allclose(interval, expected, rtol=1e-9)

    @given(seed=st.integers(0, 999))
    @settings(deadline=None, max_examples=15)
    def test_holds_the_eer_itself(self, seed: int) -> None:
        labels, scores, enroll, test = synthetic_trials(20, 5, 2.5, seed)
        low, high = eer_interval(labels, scores, enroll, test, resamples=200)
        assert 0 <= low < eer(labels, scores)[0] < high <= 1

    def test_same_seed_same_interval(self) -> None:
        spoken = synthetic_trials(10, 4, 1.5, seed=0)
        assert eer_interval(*spoken, seed=5) == eer_interval(*spoken, seed=5)
        assert eer_interval(*spoken, seed=5) != eer_interval(*spoken, seed=6)

    def test_narrows_with_more_speakers(self) -> None:
        def width(speakers: int) -> float:
            low, high = eer_interval(*synthetic_trials(speakers, 4, 2.0, seed=1), resamples=200)
            return high - low

        assert width(8) > width(32) > width(128)

    def test_widens_with_the_level(self) -> None:
        spoken = synthetic_trials(10, 4, 1.5, seed=0)
        low, high = eer_interval(*spoken, level=0.95)
        narrow_low, narrow_high = eer_interval(*spoken, level=0.5)
        assert low < narrow_low < narrow_high < high

    def test_names_do_as_well_as_numbers(self) -> None:
        labels, scores, enroll, test = synthetic_trials(12, 3, 1.5, seed=0)
        names = np.array([f"speaker-{number:02d}" for number in range(12)])
        by_name = eer_interval(labels, scores, names[enroll], names[test], resamples=50)
        assert by_name == eer_interval(labels, scores, enroll, test, resamples=50)

    def test_covers_the_true_rate_about_as_often_as_it_says(self) -> None:
        # The rate of these scores over endless speakers: shift + ease is normal(2, 0.7), the noise normal(0, 1), so
        # with threshold t the rates are Phi((t - 2) / sqrt(1.49)) and Phi(-t); equal at t = 2 / (1 + sqrt(1.49)).
        true_rate = 0.1839
        covered = 0
        for seed in range(100):
            low, high = eer_interval(*synthetic_trials(25, 4, 2.0, seed), resamples=100, level=0.9)
            covered += low <= true_rate <= high
        assert 78 <= covered <= 98

    def test_too_few_speakers_are_refused(self) -> None:
        labels = np.array([True, False, False])
        enroll, test = np.array([0, 0, 1]), np.array([0, 1, 2])
        with pytest.raises(InputError, match=r"of 500 bootstrap draws of the trials' 3 speakers hold no"):
            eer_interval(labels, np.array([0.9, 0.1, 0.2]), enroll, test)

    def test_settings_out_of_range_name_the_range(self) -> None:
        spoken = synthetic_trials(5, 3, 1.5, seed=0)
        with pytest.raises(SettingError, match="resamples must be at least 1, got 0"):
            eer_interval(*spoken, resamples=0)
        with pytest.raises(SettingError, match=r"level must be between 0 and 1, both excluded, got 95\."):
            eer_interval(*spoken, level=95.0)

    def test_trials_of_one_kind_are_refused(self) -> None:
        with pytest.raises(InputError, match="none of the 2 trials is a target"):
            eer_interval(np.zeros(2, bool), np.zeros(2), np.array([0, 1]), np.array([1, 2]))

    def test_dev_trials_stay_exact_at_full_size(self, bench_data: Path) -> None:
        """The real trial list's shape: 49,500 trials between 50 speakers, every one of them indexed by name."""
        folder = bench_data / "speechocean762" / "dev"
        speaker_of = dict(line.split() for line in (folder / "utt2spk").read_text().splitlines())
        rows = [line.split() for line in (folder / "trials_hard").read_text().splitlines()]
        labels = np.array([row[0] == "1" for row in rows])
        enroll, test = (np.array([speaker_of[row[column]] for row in rows]) for column in (1, 2))
        scores = np.random.default_rng(0).normal(size=len(rows)) + 3 * labels
        low, high = eer_interval(labels, scores, enroll, test, resamples=100)
        assert low < eer(labels, scores)[0] < high
        assert high - low < 0.02


class TestEERDifferenceInterval:
    def test_a_system_does_not_differ_from_itself(self) -> None:
        labels, scores, enroll, test = synthetic_trials(10, 4, 1.5, seed=0)
        assert eer_difference_interval(labels, scores, scores, enroll, test) == (0, 0)

    def test_swapping_the_systems_mirrors_the_interval(self) -> None:
        labels, scores, enroll, test = synthetic_trials(10, 4, 1.5, seed=0)
        noisy = scores + np.random.default_rng(1).normal(size=len(scores))
        low, high = eer_difference_interval(labels, scores, noisy, enroll, test)
        assert eer_difference_interval(labels, noisy, scores, enroll, test) == pytest.approx((-high, -low), abs=1e-12)

    def test_shows_a_clear_rise_and_not_a_slight_one(self) -> None:
        labels, scores, enroll, test = synthetic_trials(25, 5, 2.5, seed=0)
        noise = np.random.default_rng(1).normal(size=len(scores))
        low, high = eer_difference_interval(labels, scores, scores + 2 * noise, enroll, test)
        assert 0 < low < high
        low, high = eer_difference_interval(labels, scores, scores + 1e-3 * noise, enroll, test)
        assert low <= 0 <= high

    def test_is_narrower_than_the_interval_of_either(self) -> None:
        labels, scores, enroll, test = synthetic_trials(25, 5, 2.5, seed=0)
        close = scores + 0.1 * np.random.default_rng(1).normal(size=len(scores))
        low, high = eer_difference_interval(labels, scores, close, enroll, test)
        for system in (scores, close):
            own_low, own_high = eer_interval(labels, system, enroll, test)
            assert high - low < (own_high - own_low) / 2


class TestCostInterval:
    def test_holds_the_mean_of_both_kinds_and_is_that_of_brute_force(self) -> None:
        labels, scores, enroll, test = synthetic_trials(8, 3, 1.0, 0)
        costs = np.abs(scores)
        low, high = cost_interval(labels, costs, enroll, test, resamples=50, seed=3)
        generator, means = np.random.default_rng(3), []
        for _ in range(50):
            counts = np.bincount(generator.integers(8, size=8), minlength=8)
            weights = np.where(labels, counts[enroll], counts[enroll] * counts[test])
            means.append(sum(np.average(costs[kind], weights=weights[kind]) for kind in (labels, ~labels)))
        assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
        assert low <= costs[labels].mean() + costs[~labels].mean() <= high

    def test_equal_costs_have_no_width(self) -> None:
        labels, _, enroll, test = synthetic_trials(8, 3, 1.0, 0)
        assert cost_interval(labels, np.full(len(labels), 0.25), enroll, test) == pytest.approx((0.5, 0.5))
