"""Fitting a decision: thresholds equal brute force, no trial is judged by its own speakers, bad material is refused."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data import DataFolder, Trials
from compress.decision import Cohort
from compress.errors import InputError, SettingError
from compress.evaluation.log_odds import cllr
from compress.evaluation.speakers import Verification
from compress.evaluation.thresholds import Fit, Wanted, at_fpr, fit_decision, held_out, make_cohort
from compress.progress import Silent
from compress.runners import OnnxRuntimeRunner
from compress.verification import eer, min_dcf


def material(speakers: int = 12, each: int = 4, noise: float = 1.0, seed: int = 0) -> tuple[Verification, np.ndarray]:
    """All pairs of random embeddings that speakers share a part of."""
    rng = np.random.default_rng(seed)
    names = np.repeat([f"s{i:02}" for i in range(speakers)], each)
    voices = rng.standard_normal((speakers, 8)).repeat(each, 0)
    embeddings = voices + noise * rng.standard_normal((speakers * each, 8))
    enroll, test = np.triu_indices(len(names), 1)
    trials = Trials(tuple(f"u{i}" for i in range(len(names))), names[enroll] == names[test], enroll, test)
    folder = DataFolder(Path("corpus/dev"), {}, dict(zip(trials.utterances, names.tolist(), strict=True)))
    return Verification(folder, trials, names[enroll], names[test]), embeddings.astype(np.float32)


def others(count: int = 30, seed: int = 1) -> Cohort:
    voices = np.random.default_rng(seed).standard_normal((count, 8))
    return Cohort((voices / np.linalg.norm(voices, axis=1, keepdims=True)).astype(np.float32), 20, "corpus/train")


def fit(cohort: Cohort | None = None, wanted: Wanted | None = None, **settings_of: float) -> Fit:
    data, embeddings = material(**settings_of)  # type: ignore[arg-type]
    return fit_decision(data, "trials", embeddings, cohort, wanted or Wanted(fpr=0.05), "torch")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), fpr=st.sampled_from([0.05, 0.1, 0.3, 0.5]))
def test_the_threshold_of_an_fpr_is_that_of_brute_force(seed: int, fpr: float) -> None:
    rng = np.random.default_rng(seed)
    labels = np.arange(60) % 3 == 0
    scores = np.round(rng.standard_normal(60) + labels, 1)
    allowed = [value for value in scores if np.mean(scores[~labels] >= value) <= fpr]
    if not allowed:
        with pytest.raises(InputError, match="no score has an FPR"):
            at_fpr(labels, scores, fpr)
    else:
        assert at_fpr(labels, scores, fpr) == min(allowed)


def test_a_lower_fpr_never_has_a_lower_threshold() -> None:
    rng = np.random.default_rng(0)
    labels, scores = np.arange(3000) % 3 == 0, rng.standard_normal(3000)
    thresholds = [at_fpr(labels, scores, fpr) for fpr in (0.5, 0.1, 0.02, 0.01, 0.001)]
    assert thresholds == sorted(thresholds)


def test_too_few_trials_for_an_fpr_say_how_many_are_needed() -> None:
    # 6 speakers of 3: 135 non-target trials, of which 9 are within a part of two speakers
    with pytest.raises(InputError, match="135 non-target trials cannot show an FPR of 5 %: about 300 are needed, so t"):
        fit(speakers=6, each=3, noise=0.3)
    assert fit(wanted=Wanted(fpr=0.1), speakers=6, each=4, noise=0.3).decision.point("fpr").llr


@pytest.mark.parametrize("speakers", [6, 7, 10, 23])
def test_every_trial_is_judged_once_and_by_other_speakers(speakers: int) -> None:
    data, _ = material(speakers)
    times = np.zeros(len(data.trials), int)
    for fitted, judged in held_out(data.trials.labels, data.enroll_speakers, data.test_speakers):
        times += judged
        known = {*data.enroll_speakers[fitted], *data.test_speakers[fitted]}
        assert not known & {*data.enroll_speakers[judged], *data.test_speakers[judged]}
    assert (times == 1).all()


def test_the_decision_is_fitted_on_all_trials_and_judged_on_others() -> None:
    found = fit()
    point = found.decision.point("eer")
    stage = found.stages[-1]
    assert point.score == pytest.approx(eer(found.labels, stage.scores)[1])
    accepted = stage.accepted["eer"]
    assert point.fpr == accepted[~found.labels].mean()
    assert point.fnr == 1 - accepted[found.labels].mean()
    assert point.fpr_ci95 is not None
    assert point.fpr_ci95[0] <= point.fpr <= point.fpr_ci95[1]


def test_calibrated_scores_are_numbers_that_mean_what_they_say() -> None:
    found = fit(others(), speakers=30)
    for stage in found.stages:
        figures = stage.figures
        assert figures.cllr == pytest.approx(cllr(found.labels, stage.llrs))
        assert figures.min_cllr <= figures.cllr < figures.cllr_before
        assert figures.cllr < figures.min_cllr + 0.1
        assert min_dcf(found.labels, stage.llrs) <= figures.act_dcf
        assert figures.cllr_ci95 is not None
        assert figures.cllr_ci95[0] < figures.cllr < figures.cllr_ci95[1]


def test_the_stored_decision_gives_the_scores_that_were_fitted() -> None:
    data, embeddings = material()
    found = fit_decision(data, "trials", embeddings, others(), Wanted(fpr=0.05, quality=("magnitude",)), "torch")
    pairs = zip(data.trials.enroll, data.trials.test, strict=True)
    llrs = [found.decision.decide(embeddings[i], embeddings[j]).llr for i, j in pairs]
    assert min(abs(np.array(llrs) - found.decision.point("eer").llr)) < 1e-9  # a threshold is one of the scores
    assert eer(found.labels, np.array(llrs))[1] == pytest.approx(found.decision.point("eer").llr)
    assert [stage.name for stage in found.stages] == ["cosine", "AS-Norm", "AS-Norm, magnitude"]
    assert found.decision.point("eer").score is None


def test_presets_are_where_their_costs_say() -> None:
    points = {point.name: point for point in fit(wanted=Wanted(fpr=0.05, prior=0.1, costs=(2.0, 1.0))).decision.points}
    assert list(points) == ["eer", "fpr", "high-security", "general", "screening", "cost"]
    assert points["high-security"].llr == pytest.approx(np.log(99))
    assert points["general"].llr == 0
    assert points["screening"].llr == pytest.approx(-np.log(10))
    assert points["cost"].llr == pytest.approx(np.log(9 / 2))
    by_threshold = sorted(points.values(), key=lambda point: point.llr)
    rates = [(-point.fpr, point.fnr) for point in by_threshold if point.name not in ("eer", "fpr")]
    assert rates == sorted(rates)


def test_as_norm_helps_where_utterances_differ_in_how_near_they_are_to_all() -> None:
    data, embeddings = material(speakers=20, noise=0.8)
    common = np.random.default_rng(2).standard_normal(8).astype(np.float32)  # what some utterances share, as a channel
    shares = np.random.default_rng(3).uniform(0, 4, (len(embeddings), 1)).astype(np.float32)
    voices = np.random.default_rng(4).standard_normal((200, 8)) + 2 * common
    cohort = Cohort((voices / np.linalg.norm(voices, axis=1, keepdims=True)).astype(np.float32), 100, "others")
    before, after = (
        stage.figures.eer
        for stage in fit_decision(data, "trials", embeddings + shares * common, cohort, Wanted(fpr=0.05), "x").stages
    )
    assert after < before - 0.02


def test_few_non_targets_are_warned_of() -> None:
    assert any(
        "1,056 non-target trials show an FPR of 2 % but roughly; 1,500 would" in w
        for w in fit(wanted=Wanted(0.02)).warnings
    )
    assert fit().warnings == ()


def test_too_few_speakers_are_refused() -> None:
    with pytest.raises(InputError, match="the trials have 5 speakers; 6 are needed"):
        fit(speakers=5)


def test_constant_scores_are_refused() -> None:
    data, embeddings = material()
    with pytest.raises(InputError, match="all trials have the same score"):
        fit_decision(data, "trials", np.ones_like(embeddings), None, Wanted(fpr=0.05), "torch")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"fpr": 0.0}, "fpr must be between 0 and 1, both excluded, got 0.0"),
        ({"prior": 1.0}, "prior must be between 0 and 1"),
        ({"costs": (1.0, 0.0)}, "costs must be positive and finite, got 1 and 0"),
        ({"costs": (1.0, math.nan)}, "costs must be positive and finite, got 1 and nan"),
        ({"costs": (math.inf, 1.0)}, "costs must be positive and finite, got inf and 1"),
        ({"quality": ("duratoin",)}, "unknown quality 'duratoin'. Did you mean 'duration'"),
        ({"preset": "generall"}, "unknown preset 'generall'. Did you mean 'general'"),
        ({"preset": "cost"}, "unknown preset 'cost'"),
    ],
)
def test_wrong_settings_name_what_is_needed(wanted: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Wanted(**wanted)


def dealt(folder: DataFolder, speakers: int) -> DataFolder:
    """The same audio under the names of so many other speakers."""
    copied = {f"copy-{u}": folder.path(u) for u in folder.utterances}
    return DataFolder(folder.root, copied, {u: f"other{i % speakers}" for i, u in enumerate(copied)})


def test_the_cohort_may_not_hold_speakers_of_the_trials(verification: Verification, runner: OnnxRuntimeRunner) -> None:
    ten = {utterance: f"new{i % 10}" for i, utterance in enumerate(verification.folder.utterances)}
    first = verification.folder.utterances[0]
    ten[first] = verification.folder.speaker(first)
    shared = DataFolder(verification.folder.root, verification.folder.paths, ten)
    with pytest.raises(InputError, match=rf"has 1 speakers of the trials \({ten[first]}\)"):
        make_cohort(shared, verification, runner, Silent(), 5)


def test_the_cohort_may_not_hold_audio_of_the_trials(
    verification: Verification, runner: OnnxRuntimeRunner, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"is in the trials and in the cohort, as it is"):
        make_cohort(dealt(verification.folder, 10), verification, runner, Silent(), 5)
    copies = dealt(verification.folder, 10)
    paths = {name: Path(shutil.copy(path, tmp_path / f"{name}.wav")) for name, path in copies.paths.items()}
    with pytest.raises(InputError, match=r"in the cohort, as it is or as a copy \(18 files are\)"):
        make_cohort(DataFolder(tmp_path, paths, copies.speakers), verification, runner, Silent(), 5)
    next(iter(paths.values())).unlink()
    with pytest.raises(InputError, match=r"\.wav: no such audio file"):
        make_cohort(DataFolder(tmp_path, paths, copies.speakers), verification, runner, Silent(), 5)
    with pytest.raises(InputError, match="has 9 speakers; 10 are needed, better 100"):
        make_cohort(dealt(verification.folder, 9), verification, runner, Silent(), 5)


def test_a_cohort_is_the_mean_direction_of_each_speaker(verification: Verification, runner: OnnxRuntimeRunner) -> None:
    heard = verification.folder
    nobody = Verification(DataFolder(heard.root, {}), Trials((), *(np.empty(0, np.intp),) * 3), *(np.empty(0),) * 2)
    cohort = make_cohort(dealt(heard, 10), nobody, runner, Silent(), 2)
    assert (cohort.embeddings.shape, cohort.top_n) == ((10, 24), 10)
    pair = np.stack([runner.embed(heard.waveform(heard.utterances[i], 16000), 16000) for i in (0, 10)])
    mean = (pair / np.linalg.norm(pair, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(cohort.embeddings[0], mean / np.linalg.norm(mean), atol=1e-6)
    with pytest.raises(SettingError, match=r"top_n must be in 2\.\.10"):
        make_cohort(dealt(heard, 10), nobody, runner, Silent(), 2, top_n=11)
