"""Fitting a decision to trials: operating points and log-odds, judged on speakers that took no part in the fit."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from compress.audio import probe
from compress.data import DataFolder
from compress.decision import QUALITIES, Array, Cohort, Decision, Doubles, LogOdds, Point, as_norm, quality_columns
from compress.errors import InputError, SettingError, unknown_name
from compress.evaluation.log_odds import (
    actual_dcf,
    bayes_threshold,
    cllr,
    decision_costs,
    fit_log_odds,
    llr_costs,
    min_cllr,
)
from compress.evaluation.speakers import Verification, embed, interval_or_none
from compress.progress import Progress
from compress.runners import Runner
from compress.verification import Labels, cost_interval, det_curve, eer, eer_interval, length_normalize, min_dcf

FOLDS = 5  # parts of the speakers, in cross-validation
MIN_SPEAKERS = 6  # three parts of two: two parts are judged by what was fitted on the third
MIN_COHORT = 10  # speakers
TOP_N = 200  # of the cohort, or all of it
SURE_ERRORS = 30  # false acceptances from which an FPR is known to about 30 % of itself, with 90 % confidence

# Name -> part of target trials, cost of a miss, cost of a false acceptance, and what that is for.
PRESETS = {
    "high-security": (0.01, 1.0, 1.0, "1 in 100 is the true speaker; opening a door"),
    "general": (0.5, 1.0, 1.0, "both errors alike"),
    "screening": (0.5, 10.0, 1.0, "a miss costs ten false alarms; a person looks at what is found"),
}


@dataclass(frozen=True)
class Wanted:
    """What is to be fitted.

    Attributes:
        fpr: Of the point ``fpr``, fraction.
        prior: Part of target trials, for which the log-odds are weighted and the point ``cost`` is set.
        costs: Of a miss and of a false acceptance, of the point ``cost``; None without one.
        quality: Of ``decision.QUALITIES``, on which the log-odds depend.
        preset: The point that is taken where none is named.
    """

    fpr: float = 0.01
    prior: float = 0.5
    costs: tuple[float, float] | None = None
    quality: tuple[str, ...] = ()
    preset: str = "general"

    def __post_init__(self) -> None:
        for name, value in (("fpr", self.fpr), ("prior", self.prior)):
            if not 0 < value < 1:
                raise SettingError(f"{name} must be between 0 and 1, both excluded, got {value}.")
        if self.costs is not None and not all(0 < cost < math.inf for cost in self.costs):
            raise SettingError(f"costs must be positive and finite, got {self.costs[0]:g} and {self.costs[1]:g}.")
        for name in self.quality:
            if name not in QUALITIES:
                raise unknown_name("quality", name, QUALITIES)
        names = [rule.name for rule in self.rules]
        if self.preset not in names:
            raise unknown_name("preset", self.preset, names)

    @property
    def rules(self) -> tuple["Rule", ...]:
        """How each operating point is found."""
        costs = dict(PRESETS)
        if self.costs is not None:
            costs["cost"] = (self.prior, *self.costs, "as asked for")
        return (
            Rule("eer", "as many false acceptances as misses", lambda labels, llrs: eer(labels, llrs)[1]),
            Rule("fpr", f"FPR of at most {100 * self.fpr:g} %", lambda labels, llrs: at_fpr(labels, llrs, self.fpr)),
            *(_cost_rule(name, *values) for name, values in costs.items()),
        )


@dataclass(frozen=True)
class Rule:
    """A way to find a threshold: its name, in words, and as a function of labels and log-likelihood ratios."""

    name: str
    text: str
    find: Callable[[Labels, Array], float]


def _cost_rule(name: str, prior: float, c_miss: float, c_fa: float, why: str) -> Rule:
    threshold = bayes_threshold(prior, c_miss, c_fa)
    return Rule(name, f"{why}: prior {prior:g}, costs {c_miss:g} and {c_fa:g}", lambda *_: threshold)


def at_fpr(labels: Labels, scores: Array, fpr: float) -> float:
    """The lowest threshold with an FPR of at most ``fpr``.

    Raises:
        InputError: If it would reject every trial.
    """
    thresholds, _, rates = det_curve(labels, scores)
    threshold = float(thresholds[np.argmax(rates <= fpr)])
    if not np.isfinite(threshold):
        raise InputError(
            f"no score has an FPR of {100 * fpr:g} % or less: the highest ones are tied with non-target trials."
            " Give a higher --fpr, or look at the labels of the trial list."
        )
    return threshold


def check_enough(labels: Labels, fpr: float, folds: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> None:
    """Refuse trials that cannot tell an FPR of 0 from ``fpr``.

    Raises:
        InputError: Saying how many non-target trials are needed.
    """
    fewest = min(int((fitted & ~labels).sum()) for fitted, _ in folds)
    nontargets, least = int((~labels).sum()), math.ceil(round(1 / fpr, 6))
    if fewest < least:
        raise InputError(
            f"{nontargets} non-target trials cannot show an FPR of {100 * fpr:g} %: about"
            f" {math.ceil(least * nontargets / fewest):,} are needed, so that {least:,} are left in every part of the"
            f" cross-validation; better {SURE_ERRORS * least:,}. Add trials of two speakers, or give a higher --fpr."
        )


@dataclass(frozen=True)
class StageFigures:
    """Measured figures of one way to score: before calibration, and calibrated on other speakers.

    Attributes:
        scores: What was scored: ``cosine``, ``AS-Norm``, and the qualities used.
        eer: Fraction.
        eer_ci95: By bootstrap over speakers, as all intervals here; None with too few.
        min_dcf: p_target 0.01, costs 1 and 1.
        act_dcf_before: Of the score taken for a log-likelihood ratio.
        act_dcf: At the Bayes threshold of the same costs.
        min_cllr: In bits.
        cllr_before: Of the score taken for a log-likelihood ratio.
        cllr: Calibrated.
        cllr_ci95: Of ``cllr``.
        act_dcf_ci95: Of ``act_dcf``.
    """

    scores: str
    eer: float
    eer_ci95: tuple[float, float] | None
    min_dcf: float
    act_dcf_before: float
    act_dcf: float
    act_dcf_ci95: tuple[float, float] | None
    min_cllr: float
    cllr_before: float
    cllr: float
    cllr_ci95: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class Stage:
    """One way to score the trials.

    Attributes:
        name: Of it.
        scores: (trials,) that rank the trials; with qualities, the log-likelihood ratios below.
        llrs: (trials,) log-likelihood ratios, each from a fit to other speakers.
        accepted: By rule, (trials,) whether the trial is accepted at the threshold found on other speakers.
        figures: Of both.
    """

    name: str
    scores: Array
    llrs: Doubles
    accepted: dict[str, NDArray[np.bool_]]
    figures: StageFigures


@dataclass(frozen=True, eq=False)
class Fit:
    """A decision and what it was judged by; the last stage is the one that the decision uses."""

    decision: Decision
    labels: Labels
    stages: tuple[Stage, ...]
    warnings: tuple[str, ...]


def make_cohort(
    folder: DataFolder,
    trials: Verification,
    runner: Runner,
    progress: Progress,
    per_speaker: int,
    top_n: int | None = None,
) -> Cohort:
    """Embed utterances of a folder's speakers, spread evenly over each one's list, and take each speaker's mean.

    Raises:
        InputError: If there are too few speakers, or one of them or an audio file is in the trials, too.
        SettingError: If ``top_n`` is more than there are.
    """
    of_speaker: dict[str, list[str]] = {}
    for utterance in folder.utterances:
        of_speaker.setdefault(folder.speaker(utterance), []).append(utterance)
    if len(of_speaker) < MIN_COHORT:
        raise InputError(
            f"the cohort {folder.root} has {len(of_speaker)} speakers; {MIN_COHORT} are needed, better 100."
        )
    known = {trials.folder.speaker(utterance) for utterance in trials.trials.utterances}
    shared = sorted(known & of_speaker.keys())
    if shared:
        raise InputError(
            f"the cohort {folder.root} has {len(shared)} speakers of the trials ({shared[0]}): their scores would be"
            " normalized by themselves. Give other speakers, or rename them if they are."
        )
    kept = [utterances[i] for utterances in of_speaker.values() for i in _spread(len(utterances), per_speaker)]
    twice = folder.subset(kept).shared_with(trials.folder.subset(trials.trials.utterances))
    if twice:
        raise InputError(
            f"{twice[0]} is in the trials and in the cohort, as it is or as a copy ({len(twice)} files are)."
        )
    wanted = min(TOP_N, len(of_speaker)) if top_n is None else top_n
    if wanted > len(of_speaker):
        raise SettingError(f"top_n must be in 2..{len(of_speaker)}, the cohort's speakers; got {wanted}.")
    embeddings = embed(folder, kept, runner, progress, f"{runner.runtime}: embedding the cohort")
    directions = length_normalize(embeddings.astype(np.float64))
    speakers = np.array([folder.speaker(utterance) for utterance in kept])
    means = np.stack([directions[speakers == speaker].mean(axis=0) for speaker in of_speaker])
    return Cohort(length_normalize(means).astype(np.float32), wanted, _label(folder))


def _spread(count: int, wanted: int) -> list[int]:
    taken = min(count, wanted)
    return [i * count // taken for i in range(taken)]


def _label(folder: DataFolder) -> str:
    return "/".join(folder.root.resolve().parts[-2:])


def fit_decision(
    data: Verification, trials: str, embeddings: Array, cohort: Cohort | None, wanted: Wanted, runtime: str
) -> Fit:
    """Fit log-odds and operating points to the trials; each figure told is of speakers that were left out of its fit.

    Args:
        data: The trials.
        trials: Name of the list.
        embeddings: (utterances, embedding_size), of ``data.trials.utterances``.
        cohort: To normalize by.
        wanted: What is fitted.
        runtime: Name of that which embedded.

    Raises:
        InputError: If there are too few speakers or trials, or the scores tell nothing.
    """
    labels, listed = data.trials.labels, data.trials
    cosines = data.scores(embeddings)
    ways: list[tuple[str, Array, tuple[str, ...]]] = [("cosine", cosines, ())]
    if cohort is not None:
        mean, deviation = cohort.statistics(embeddings)
        enroll, test = ((mean[side], deviation[side]) for side in (listed.enroll, listed.test))
        ways.append(("AS-Norm", as_norm(cosines, enroll, test), ()))
    if wanted.quality:
        name, scores, _ = ways[-1]
        ways.append((", ".join([name, *wanted.quality]), scores, wanted.quality))
    names = wanted.quality
    qualities = {name: _quality(name, data, embeddings) for name in names}
    sides = {name: (values[listed.enroll], values[listed.test]) for name, values in qualities.items()}
    columns = quality_columns(sides, len(labels))
    folds = list(held_out(labels, data.enroll_speakers, data.test_speakers))
    check_enough(labels, wanted.fpr, folds)
    stages = tuple(
        _judge(data, way, scores, columns if used else columns[:, :0], used, wanted, folds)
        for way, scores, used in ways
    )
    final = ways[-1][1]
    log_odds = fit_log_odds(labels, final, columns, names, wanted.prior)
    llrs = log_odds.of(final, columns)
    points = tuple(
        _point(rule, labels, rule.find(labels, llrs), log_odds, stages[-1].accepted[rule.name], data)
        for rule in wanted.rules
    )
    figures = tuple(asdict(stage.figures) for stage in stages)
    decision = Decision(points, wanted.preset, log_odds, cohort, trials, _label(data.folder), runtime, figures)
    return Fit(decision, labels, stages, tuple(_warnings(labels, wanted, stages)))


def _quality(name: str, data: Verification, embeddings: Array) -> Doubles:
    """A quality of each utterance, (utterances,)."""
    if name == "magnitude":
        return np.asarray(np.linalg.norm(embeddings.astype(np.float64), axis=1))
    return np.array([probe(data.folder.path(utterance)).duration_s for utterance in data.trials.utterances])


def held_out(
    labels: Labels, enroll_speakers: NDArray[np.str_], test_speakers: NDArray[np.str_]
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Split trials for cross-validation, so that no speaker is on both sides: (fitted, judged), bool (trials,) each.

    Speakers are dealt into parts. The trials between two parts, or within one, are judged by what was fitted on the
    trials within the others. Every trial is judged once.

    Raises:
        InputError: If there are too few speakers.
    """
    names = sorted({*enroll_speakers.tolist(), *test_speakers.tolist()})
    parts = min(FOLDS, len(names) // 2)
    if len(names) < MIN_SPEAKERS:
        raise InputError(
            f"the trials have {len(names)} speakers; {MIN_SPEAKERS} are needed to judge log-odds by speakers that they"
            " were not fitted on. Use a list with more."
        )
    dealt = np.random.default_rng(0).permutation(len(names)) % parts
    part_of = dict(zip(names, dealt.tolist(), strict=True))
    sides = [np.array([part_of[s] for s in side.tolist()]) for side in (enroll_speakers, test_speakers)]
    low, high = np.minimum(*sides), np.maximum(*sides)
    for first in range(parts):
        for second in range(first, parts):
            judged = (low == first) & (high == second)
            fitted = ~np.isin(low, (first, second)) & ~np.isin(high, (first, second))
            if not judged.any():
                continue
            if not labels[fitted].any() or labels[fitted].all():
                raise InputError(
                    f"without two of {parts} parts of the speakers the list has trials of one kind alone, so log-odds"
                    " cannot be cross-validated. Use a list with more speakers."
                )
            yield fitted, judged


def _judge(
    data: Verification,
    name: str,
    scores: Array,
    columns: Doubles,
    names: tuple[str, ...],
    wanted: Wanted,
    folds: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_]]],
) -> Stage:
    """Cross-validate log-odds and thresholds of one way to score."""
    labels = data.trials.labels
    llrs = np.empty(len(labels))
    accepted = {rule.name: np.empty(len(labels), np.bool_) for rule in wanted.rules}
    for fitted, judged in folds:
        log_odds = fit_log_odds(labels[fitted], scores[fitted], columns[fitted], names, wanted.prior)
        known, llrs[judged] = log_odds.of(scores[fitted], columns[fitted]), log_odds.of(scores[judged], columns[judged])
        for rule in wanted.rules:
            accepted[rule.name][judged] = llrs[judged] >= rule.find(labels[fitted], known)
    ranking = llrs if names else scores
    sides = data.enroll_speakers, data.test_speakers
    figures = StageFigures(
        scores=name,
        eer=eer(labels, ranking)[0],
        eer_ci95=interval_or_none(eer_interval, labels, ranking, *sides),
        min_dcf=min_dcf(labels, ranking),
        act_dcf_before=actual_dcf(labels, scores),
        act_dcf=actual_dcf(labels, llrs),
        act_dcf_ci95=interval_or_none(cost_interval, labels, decision_costs(labels, llrs), *sides),
        min_cllr=min_cllr(labels, ranking),
        cllr_before=cllr(labels, scores),
        cllr=cllr(labels, llrs),
        cllr_ci95=interval_or_none(cost_interval, labels, llr_costs(labels, llrs), *sides),
    )
    return Stage(name, ranking, llrs, accepted, figures)


def _point(
    rule: Rule, labels: Labels, llr: float, log_odds: LogOdds, accepted: NDArray[np.bool_], data: Verification
) -> Point:
    sides = data.enroll_speakers, data.test_speakers
    alarms, misses = (accepted & ~labels).astype(np.float64), (~accepted & labels).astype(np.float64)
    return Point(
        rule.name,
        rule.text,
        llr,
        log_odds.score_at(llr),
        fpr=float(alarms[~labels].mean()),
        fnr=float(misses[labels].mean()),
        fpr_ci95=interval_or_none(cost_interval, labels, alarms, *sides),
        fnr_ci95=interval_or_none(cost_interval, labels, misses, *sides),
    )


def _warnings(labels: Labels, wanted: Wanted, stages: Sequence[Stage]) -> Iterator[str]:
    """What to know before relying on it."""
    nontargets, needed = int((~labels).sum()), math.ceil(round(SURE_ERRORS / wanted.fpr, 6))
    if nontargets < needed:
        yield (
            f"{nontargets:,} non-target trials show an FPR of {100 * wanted.fpr:g} % but roughly; {needed:,} would give"
            f" {SURE_ERRORS} false acceptances."
        )
    first, last = stages[0].figures, stages[-1].figures
    if last.eer > first.eer:
        yield f"the EER of {last.scores} is higher than that of {first.scores} on these trials."
