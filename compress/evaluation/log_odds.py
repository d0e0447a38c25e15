"""Log-likelihood ratios of trials: fitting them to scores, and how good they are as numbers.

``llrs`` (trials,) are natural logarithms of the likelihood of one speaker over that of two; ``labels`` bool (trials,),
True for target. A "prior" is the part of target trials that a figure is weighted for, whatever it is in the list.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import isotonic_regression, minimize

from compress.decision import Array, Doubles, LogOdds
from compress.errors import InputError
from compress.verification import Labels

RIDGE = 1e-6  # on standardised columns: keeps the slope finite where the scores separate the trials perfectly

LEAST_SPREAD = 1e-5  # of the logarithm of a quality: less is rounding


def logit(probability: float) -> float:
    """Natural logarithm of the odds."""
    return math.log(probability / (1 - probability))


def fit_log_odds(
    labels: Labels, scores: Array, columns: Array | None = None, names: Sequence[str] = (), prior: float = 0.5
) -> LogOdds:
    """Fit the affine map from scores to log-likelihood ratios by prior-weighted logistic regression.

    Args:
        labels: (trials,), with both kinds.
        scores: (trials,).
        columns: (trials, 2 * names) of ``decision.quality_columns``; None: the score alone.
        names: Of the qualities.
        prior: The operating region that the fit is weighted for.

    Raises:
        InputError: If scores are not finite or constant, or do not rise from non-targets to targets.

    Source: N. Brümmer and J. du Preez, "Application-independent evaluation of speaker detection", Computer Speech and
    Language 20, 2006; N. Brümmer, "Focal: tools for fusion and calibration of automatic speaker detection systems".
    """
    sides = np.empty((len(scores), 0)) if columns is None else columns
    table = np.column_stack([scores.astype(np.float64), sides])
    if not np.isfinite(table).all():
        raise InputError("a score or a quality of a trial is not finite, so no log-odds can be fitted.")
    mean, deviation, spread = table.mean(axis=0), table.std(axis=0), np.ptp(table, axis=0)
    if spread[0] == 0:
        raise InputError("all trials have the same score, so no log-odds can be fitted.")
    deviation[1:][spread[1:] < LEAST_SPREAD] = np.inf  # a quality that all trials share says nothing: weight 0
    standard = np.column_stack([(table - mean) / deviation, np.ones(len(table))])
    weights = np.where(labels, prior / labels.sum(), (1 - prior) / (~labels).sum())
    signs = np.where(labels, 1.0, -1.0)
    shift = logit(prior)

    def loss(x: Doubles) -> tuple[float, Doubles]:
        margins = signs * (standard @ x + shift)
        penalised = np.append(x[:-1], 0.0)
        value = weights @ np.logaddexp(0, -margins) + 0.5 * RIDGE * penalised @ penalised
        slopes = -weights * signs * np.exp(-np.logaddexp(0, margins))
        return float(value), slopes @ standard + RIDGE * penalised

    start = np.zeros(standard.shape[1])
    found = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 500}).x
    factors = found[:-1] / deviation
    slope, offset = float(factors[0]), float(found[-1] - factors @ mean)
    if slope <= 0:
        raise InputError(
            "target trials have no higher scores than non-target trials, so scores give no log-odds."
            " Check the labels of the trial list and the model."
        )
    pairs = {name: (float(factors[1 + 2 * i]), float(factors[2 + 2 * i])) for i, name in enumerate(names)}
    return LogOdds(slope, offset, pairs, prior)


def cllr(labels: Labels, llrs: Array) -> float:
    """Cost of log-likelihood ratios, in bits: 0 of perfect ones, 1 of those that always say 0.

    Source: Brümmer and du Preez, as :func:`fit_log_odds`.
    """
    costs = llr_costs(labels, llrs)
    return float(costs[labels].mean() + costs[~labels].mean())


def llr_costs(labels: Labels, llrs: Array) -> Doubles:
    """What each trial costs in :func:`cllr`, which is the mean over targets and that over non-targets, added."""
    costs: Doubles = np.logaddexp(0, np.where(labels, -llrs, llrs)) / (2 * math.log(2))
    return costs


def min_cllr(labels: Labels, scores: Array) -> float:
    """The least Cllr of any rising function of the scores, by pool adjacent violators: what calibration cannot mend."""
    order = np.argsort(scores, kind="stable")
    sorted_scores, sorted_labels = scores[order], labels[order]
    starts = np.flatnonzero(np.append(True, sorted_scores[1:] != sorted_scores[:-1]))  # tied trials share a value
    counts = np.diff(np.append(starts, len(scores)))
    targets = np.add.reduceat(sorted_labels.astype(np.float64), starts)
    rates = isotonic_regression(targets / counts, weights=counts.astype(np.float64)).x
    with np.errstate(divide="ignore"):
        llrs = np.log(rates) - np.log1p(-rates) - logit(labels.sum() / len(labels))
    return cllr(sorted_labels, np.repeat(llrs, counts))


def bayes_threshold(p_target: float, c_miss: float = 1.0, c_fa: float = 1.0) -> float:
    """The log-likelihood ratio from which accepting costs less on average than rejecting."""
    return math.log(c_fa * (1 - p_target) / (c_miss * p_target))


def actual_dcf(labels: Labels, llrs: Array, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0) -> float:
    """Normalised detection cost of deciding at the Bayes threshold; that of min_dcf is the least for any threshold."""
    costs = decision_costs(labels, llrs, p_target, c_miss, c_fa)
    return float(costs[labels].mean() + costs[~labels].mean())


def decision_costs(
    labels: Labels, llrs: Array, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> Doubles:
    """What each trial costs in :func:`actual_dcf`, the mean over targets and that over non-targets added."""
    wrong = (llrs >= bayes_threshold(p_target, c_miss, c_fa)) != labels
    miss_cost, fa_cost = c_miss * p_target, c_fa * (1 - p_target)
    costs: Doubles = wrong * np.where(labels, miss_cost, fa_cost) / min(miss_cost, fa_cost)
    return costs
