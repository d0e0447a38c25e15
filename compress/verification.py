"""Speaker-verification metrics: cosine scores, DET curve, EER, minDCF and what a bootstrap over speakers says of them.

A trial pairs an enrollment with a test embedding; a threshold accepts it where score >= threshold.
Arrays over trials are one-dimensional: ``labels`` bool (True for target), ``scores`` floating point.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError, ModelError, SettingError

Labels = NDArray[np.bool_]
Scores = NDArray[np.floating[Any]]
Indices = NDArray[np.integer[Any]]
Rates = NDArray[np.float64]

CHUNK_TRIALS = 2048  # two gathered chunks of 192 floats then stay in the level 2 or 3 cache
MAX_RESAMPLES = 500
MIN_RESAMPLES = 100
WEIGHTED_TRIALS = 100_000_000  # trials x resamples that automatic resamples allow: about half a second of CPU time


def cosine_scores(embeddings: Scores, enroll: Indices, test: Indices) -> Scores:
    """Score trials by the cosine between their two embeddings.

    Args:
        embeddings: (utterances, embedding_size), of any length; float64 is scored in float64, the rest in float32.
        enroll: (trials,) row of each trial's enrollment embedding.
        test: (trials,) row of each trial's test embedding.

    Returns:
        (trials,) scores in [-1, 1].

    Raises:
        ModelError: If an embedding is all zeros or holds NaN or infinite values; names the first such row.
    """
    if enroll.shape != test.shape or enroll.ndim != 1:
        raise ValueError(f"enroll and test must be two (trials,) arrays, got shapes {enroll.shape} and {test.shape}.")
    if len(enroll) and min(enroll.min(), test.min()) < 0:
        raise IndexError("enroll and test hold a negative row number.")
    directions = length_normalize(embeddings)
    scores = np.empty(len(enroll), directions.dtype)
    for start in range(0, len(enroll), CHUNK_TRIALS):
        part = slice(start, start + CHUNK_TRIALS)
        np.einsum("ij,ij->i", directions[enroll[part]], directions[test[part]], out=scores[part])
    np.clip(scores, -1.0, 1.0, out=scores)
    return scores


def length_normalize(embeddings: Scores) -> Scores:
    """Scale each row of (utterances, embedding_size) to unit length.

    Raises:
        ModelError: As :func:`cosine_scores`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.einsum("ij,ij->i", embeddings, embeddings, dtype=np.float64))
    unusable = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
    if len(unusable):
        row = int(unusable[0])
        fault = "is all zeros" if lengths[row] == 0 else "holds NaN or infinite values"
        raise ModelError(
            f"embedding in row {row} {fault} ({len(unusable)} of {len(embeddings)} rows are unusable), so its trials "
            "have no cosine score. Check the model's weights and the audio of that utterance."
        )
    directions = np.empty(embeddings.shape, np.float64 if embeddings.dtype == np.float64 else np.float32)
    np.divide(embeddings, lengths[:, None], out=directions, casting="same_kind")
    return directions


class ErrorCurve(NamedTuple):
    """The operating points of a trial list, from accepting every trial to rejecting every one.

    All three arrays are (distinct scores + 1,); thresholds ascend and end with infinity.
    """

    thresholds: Rates
    fnr: Rates
    fpr: Rates


def det_curve(labels: Labels, scores: Scores) -> ErrorCurve:
    """Compute FNR and FPR at every distinct threshold; tied scores are accepted or rejected together.

    Raises:
        InputError: If there are no target or no non-target trials, or a score is not finite.
    """
    points = _operating_points(labels, scores)
    targets, nontargets = points.targets_below[-1], points.nontargets_below[-1]
    return ErrorCurve(
        thresholds=np.append(scores[points.order[points.starts]].astype(np.float64), np.inf),
        fnr=points.targets_below / targets,
        fpr=(nontargets - points.nontargets_below) / nontargets,
    )


def eer(labels: Labels, scores: Scores) -> tuple[float, float]:
    """Compute the equal error rate and the threshold that comes nearest to it.

    The EER is where the straight lines between neighbouring operating points (FPR, FNR) cross FNR = FPR. On such a
    line lie the error rates of drawing lots between its two thresholds, so a tie has the same EER whatever order the
    tied trials are listed in: all scores tied give 0.5. No convex hull is taken.

    Returns:
        The EER as a fraction, and of the two thresholds next to the crossing that with the smaller |FNR - FPR|
        (the lower one where equal). It is one of the scores: the decisions there are those of a real operating point.

    Raises:
        InputError: As :func:`det_curve`.
    """
    thresholds, fnr, fpr = det_curve(labels, scores)
    point, rate = _equal_error(len(thresholds), lambda k: (float(fnr[k]), float(fpr[k])))
    lower_is_nearer = fpr[point - 1] - fnr[point - 1] <= fnr[point] - fpr[point]
    return rate, float(thresholds[point - 1 if lower_is_nearer else point])


def min_dcf(labels: Labels, scores: Scores, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0) -> float:
    """Compute the minimum of the normalised detection cost over all thresholds, in [0, 1].

    1 is the cost of the better of accepting all trials and rejecting all trials.

    Raises:
        InputError: As :func:`det_curve`.
        SettingError: If p_target is outside (0, 1) or a cost is not positive.

    Source: NIST 2016 Speaker Recognition Evaluation Plan (cost model and its normalisation).
    """
    if not 0 < p_target < 1:
        raise SettingError(f"p_target must be between 0 and 1, both excluded, got {p_target}.")
    if not (c_miss > 0 and c_fa > 0):
        raise SettingError(f"c_miss and c_fa must be positive, got {c_miss} and {c_fa}.")
    _, fnr, fpr = det_curve(labels, scores)
    miss_cost, fa_cost = c_miss * p_target, c_fa * (1 - p_target)
    return float(np.min(miss_cost * fnr + fa_cost * fpr) / min(miss_cost, fa_cost))


def decision_flips(scores_a: Scores, threshold_a: float, scores_b: Scores, threshold_b: float) -> int:
    """Count the trials that one system accepts and the other rejects, each at its own threshold."""
    if scores_a.shape != scores_b.shape:
        raise ValueError(f"two systems' scores of the same trials differ in shape: {scores_a.shape}, {scores_b.shape}.")
    # np.float64 and not float: NumPy would round a plain float to the scores' precision before it compares.
    return int(np.count_nonzero((scores_a >= np.float64(threshold_a)) != (scores_b >= np.float64(threshold_b))))


def eer_interval(
    labels: Labels,
    scores: Scores,
    enroll_speakers: NDArray[Any],
    test_speakers: NDArray[Any],
    *,
    resamples: int | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Compute a percentile bootstrap interval of the EER, drawing speakers and not trials.

    Trials that share a speaker are not independent, so drawing trials would give an interval far too narrow. Each
    resample draws as many speakers as there are, with replacement. A target trial then weighs as often as its speaker
    was drawn, a non-target trial the product of its two speakers' counts; of a trial between two draws of one speaker
    nothing is known, and it is left out. Draws without a target or without a non-target trial are left out too.

    Args:
        labels: (trials,).
        scores: (trials,).
        enroll_speakers: (trials,) speaker of each enrollment; numbers or names.
        test_speakers: (trials,) speaker of each test utterance, named alike.
        resamples: Number of draws; None takes 500, fewer beyond 200,000 trials, 100 for a million and more.
        seed: The same seed gives the same interval.
        level: Share of the draws between the two ends.

    Returns:
        Lower and upper end, fractions.

    Raises:
        InputError: As :func:`det_curve`, or if there are so few speakers that most draws lack targets or non-targets.
        SettingError: If resamples is under 1 or level outside (0, 1).

    Source: T. Snijders and S. Borgatti, "Non-parametric standard errors and tests for network measures",
    Connections 22(2), 1999 (the vertex bootstrap, without its filling of the diagonal).
    """
    speakers = _TrialSpeakers.number(enroll_speakers, test_speakers)
    trials = _SortedTrials.sort(labels, scores, speakers)
    return _bootstrap(trials.eer, speakers.num_speakers, _num_resamples(resamples, len(scores)), seed, level)


def eer_difference_interval(
    labels: Labels,
    scores_a: Scores,
    scores_b: Scores,
    enroll_speakers: NDArray[Any],
    test_speakers: NDArray[Any],
    *,
    resamples: int | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Compute a bootstrap interval of EER(b) - EER(a), both taken from the same draws of speakers.

    Two systems err on much the same trials, so this interval is narrower than their two intervals suggest. Where it
    holds 0, these trials do not show that the systems differ.

    Args, Returns, Raises: As :func:`eer_interval`, with the scores of two systems on the same trials.
    """
    speakers = _TrialSpeakers.number(enroll_speakers, test_speakers)
    trials_a, trials_b = (_SortedTrials.sort(labels, scores, speakers) for scores in (scores_a, scores_b))

    def difference(draws: Indices) -> float:
        return trials_b.eer(draws) - trials_a.eer(draws)

    return _bootstrap(difference, speakers.num_speakers, _num_resamples(resamples, 2 * len(labels)), seed, level)


def cost_interval(
    labels: Labels,
    costs: Rates,
    enroll_speakers: NDArray[Any],
    test_speakers: NDArray[Any],
    *,
    resamples: int | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Compute a bootstrap interval of the mean cost of target trials plus that of non-target trials.

    With a cost of 1 for each false acceptance and 0 for the rest it is that of the FPR.

    Args, Returns, Raises: As :func:`eer_interval`, with a cost of each trial, (trials,).
    """
    speakers = _TrialSpeakers.number(enroll_speakers, test_speakers)
    kinds = [(costs[kind], speakers.first[kind], speakers.second[kind]) for kind in (labels, ~labels)]

    def mean(draws: Indices) -> float:
        total = 0.0
        for values, first, second in kinds:
            weights = draws.take(first) * draws.take(second)
            if not weights.any():
                return float("nan")
            total += float(weights @ values / weights.sum())
        return total

    return _bootstrap(mean, speakers.num_speakers, _num_resamples(resamples, len(labels)), seed, level)


class _OperatingPoints(NamedTuple):
    """Trials in ascending order of score, and what each threshold rejects."""

    order: NDArray[np.intp]  # (trials,) indices that sort the scores
    starts: NDArray[np.intp]  # (distinct scores,) where in that order each distinct score begins
    targets_below: NDArray[np.intp]  # (distinct scores + 1,) target trials rejected
    nontargets_below: NDArray[np.intp]  # (distinct scores + 1,) non-target trials rejected


def _operating_points(labels: Labels, scores: Scores) -> _OperatingPoints:
    _check_trials(labels, scores)
    order = np.argsort(scores)
    ascending = scores[order]
    starts = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1]))
    rejected = np.append(starts, len(scores))
    targets_below = np.append(0, np.cumsum(labels[order]))[rejected]
    return _OperatingPoints(order, starts, targets_below, rejected - targets_below)


def _check_trials(labels: Labels, scores: Scores) -> None:
    if labels.dtype != np.bool_:
        raise TypeError(f"labels must be a bool array, True for target; got dtype {labels.dtype}.")
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"labels and scores must be two (trials,) arrays, got {labels.shape} and {scores.shape}.")
    if not labels.any():
        raise InputError(
            f"none of the {len(labels)} trials is a target, so no EER can be computed. Add trials of one speaker."
        )
    if labels.all():
        raise InputError(
            f"none of the {len(labels)} trials is a non-target, so no EER can be computed. Add trials of two speakers."
        )
    unusable = np.flatnonzero(~np.isfinite(scores))
    if len(unusable):
        raise InputError(
            f"trial {unusable[0]} (counted from 0) has the score {scores[unusable[0]]} ({len(unusable)} of "
            f"{len(scores)} scores are not finite). Check the embeddings it was made from."
        )


def _equal_error(num_points: int, rates: Callable[[int], tuple[float, float]]) -> tuple[int, float]:
    """Find the first operating point with FNR >= FPR and the EER on the line that leads to it.

    Args:
        num_points: Number of operating points; the first accepts all trials and the last rejects all.
        rates: FNR and FPR of operating point k; FNR never falls and FPR never rises with k.
    """

    def crossed(k: int) -> bool:
        fnr, fpr = rates(k)
        return fnr >= fpr

    point = bisect_left(range(num_points), True, key=crossed)
    (fnr_before, fpr_before), (fnr, fpr) = rates(point - 1), rates(point)
    short, past = fpr_before - fnr_before, fnr - fpr
    return point, fnr_before + short / (short + past) * (fnr - fnr_before)


class _TrialSpeakers(NamedTuple):
    """Speakers of each trial as numbers from 0.

    ``second`` is ``num_speakers`` where both are the same speaker: a stand-in drawn exactly once, so that the trial's
    weight is ``draws[first] * draws[second]`` for every kind of trial.
    """

    first: NDArray[np.intp]
    second: NDArray[np.intp]
    num_speakers: int

    @classmethod
    def number(cls, enroll_speakers: NDArray[Any], test_speakers: NDArray[Any]) -> "_TrialSpeakers":
        if enroll_speakers.shape != test_speakers.shape:
            raise ValueError(f"{len(enroll_speakers)} enrollment speakers do not match {len(test_speakers)} of tests.")
        # Sets and dictionaries, because np.unique sorts: seconds for a million names.
        sides = enroll_speakers.tolist(), test_speakers.tolist()
        numbers = {speaker: number for number, speaker in enumerate(sorted(set().union(*sides)))}
        first, second = (np.fromiter((numbers[speaker] for speaker in side), np.intp, len(side)) for side in sides)
        return cls(first, np.where(first == second, len(numbers), second), len(numbers))


@dataclass(frozen=True)
class _SortedTrials:
    """Trials sorted once by score, whose EER is then quick to compute for any draw of the speakers."""

    points: _OperatingPoints
    target_pairs: tuple[NDArray[np.intp], NDArray[np.intp]]
    nontarget_pairs: tuple[NDArray[np.intp], NDArray[np.intp]]

    @classmethod
    def sort(cls, labels: Labels, scores: Scores, speakers: _TrialSpeakers) -> "_SortedTrials":
        points = _operating_points(labels, scores)
        if speakers.first.shape != labels.shape:
            raise ValueError(f"{len(speakers.first)} speakers do not match {len(labels)} trials.")
        targets = points.order[labels[points.order]]
        nontargets = points.order[~labels[points.order]]
        return cls(
            points,
            (speakers.first[targets], speakers.second[targets]),
            (speakers.first[nontargets], speakers.second[nontargets]),
        )

    def eer(self, draws: Indices) -> float:
        """Compute the EER when speaker s was drawn ``draws[s]`` times; NaN where no trials of one kind are left."""
        misses = _cumulative_weights(self.target_pairs, draws)
        rejections = _cumulative_weights(self.nontarget_pairs, draws)
        targets, nontargets = int(misses[-1]), int(rejections[-1])
        if targets == 0 or nontargets == 0:
            return float("nan")

        def rates(k: int) -> tuple[float, float]:
            missed, rejected = misses[self.points.targets_below[k]], rejections[self.points.nontargets_below[k]]
            return int(missed) / targets, (nontargets - int(rejected)) / nontargets

        return _equal_error(len(self.points.targets_below), rates)[1]


def _cumulative_weights(pairs: tuple[NDArray[np.intp], NDArray[np.intp]], draws: Indices) -> NDArray[np.int64]:
    """Sum the weights of the first 0, 1, ... all trials: (trials + 1,)."""
    first, second = pairs
    # mode="clip" skips the bounds check; a fresh array for each product would cost more than the product.
    weights = draws.take(first, mode="clip")
    weights *= draws.take(second, mode="clip")
    sums = np.empty(len(first) + 1, np.int64)
    sums[0] = 0
    np.cumsum(weights, out=sums[1:])
    return sums


def _num_resamples(resamples: int | None, num_trials: int) -> int:
    if resamples is None:
        return max(MIN_RESAMPLES, min(MAX_RESAMPLES, WEIGHTED_TRIALS // num_trials))
    if resamples < 1:
        raise SettingError(f"resamples must be at least 1, got {resamples}.")
    return resamples


def _bootstrap(
    statistic: Callable[[Indices], float], num_speakers: int, resamples: int, seed: int, level: float
) -> tuple[float, float]:
    """Compute the percentile interval of a statistic of the number of times each speaker was drawn."""
    if not 0 < level < 1:
        raise SettingError(f"level must be between 0 and 1, both excluded, got {level}.")
    generator = np.random.default_rng(seed)
    values = np.empty(resamples)
    for index in range(resamples):
        drawn = generator.integers(num_speakers, size=num_speakers)
        draws = np.bincount(drawn, minlength=num_speakers)
        values[index] = statistic(np.append(draws, 1))  # the stand-in of _TrialSpeakers
    defined = values[~np.isnan(values)]
    if len(defined) < resamples / 2:
        raise InputError(
            f"{resamples - len(defined)} of {resamples} bootstrap draws of the trials' {num_speakers} speakers hold no "
            "target or no non-target trial, so there is no interval. Use a trial list with more speakers."
        )
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
