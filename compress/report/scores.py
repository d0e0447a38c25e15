"""Trial scores of one variant, and the curves the report draws from them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.verification import det_curve

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TrialScores:
    """Scores of one variant on the trial list: labels (trials,), scores (trials,) and the decision threshold.

    A label is True for a target trial. A trial is accepted when its score is at or above the threshold.
    """

    labels: NDArray[np.bool_]
    scores: NDArray[np.floating]
    threshold: float

    def __post_init__(self) -> None:
        if self.labels.shape != self.scores.shape or self.labels.ndim != 1:
            raise ValueError(f"labels {self.labels.shape} and scores {self.scores.shape} must both be (trials,)")

    @property
    def targets(self) -> Floats:
        """Scores of the target trials, in float64."""
        return self.scores[self.labels].astype(np.float64)

    @property
    def nontargets(self) -> Floats:
        """Scores of the non-target trials, in float64."""
        return self.scores[~self.labels].astype(np.float64)

    @property
    def drawable(self) -> bool:
        """Whether there are trials of both kinds and every score is a finite number."""
        return bool(self.labels.any() and not self.labels.all() and np.isfinite(self.scores).all())


def det_points(trials: TrialScores, max_points: int = 300) -> tuple[Floats, Floats]:
    """Thin the detection error trade-off curve for drawing.

    Points with a rate of 0 or 1 lie at infinity on normal-deviate axes and are left out, so a variant without
    errors has no point. The points kept are evenly spaced along the drawn curve.

    Returns:
        FPR and FNR as fractions, FPR falling, at most ``max_points`` of each.
    """
    _, fnr, fpr = det_curve(trials.labels, trials.scores)
    inside = (fnr > 0) & (fnr < 1) & (fpr > 0) & (fpr < 1)
    fpr, fnr = fpr[inside], fnr[inside]
    if fpr.size <= max_points:
        return fpr, fnr
    # log-odds space the points almost as normal deviates do, and are cheaper
    steps = np.abs(np.diff(_log_odds(fpr))) + np.abs(np.diff(_log_odds(fnr)))
    length = np.concatenate([[0.0], np.cumsum(steps)])
    kept = np.unique(np.searchsorted(length, np.linspace(0.0, length[-1], max_points)))
    return fpr[kept], fnr[kept]


def _log_odds(rates: Floats) -> Floats:
    return np.asarray(np.log(rates / (1 - rates)), np.float64)


def error_rates(trials: TrialScores) -> tuple[float, float]:
    """Compute FPR and FNR at the variant's own threshold."""
    fpr = float(np.mean(trials.nontargets >= trials.threshold))
    fnr = float(np.mean(trials.targets < trials.threshold))
    return fpr, fnr


def bin_edges(variants: Iterable[TrialScores], bins: int = 60) -> Floats:
    """Divide the range of all variants' scores into equal bins, so that their histograms compare.

    Returns:
        Edges (bins + 1,).
    """
    ranges = [(trials.scores.min(), trials.scores.max(), trials.threshold) for trials in variants]
    low, high = float(np.min(ranges)), float(np.max(ranges))
    if low == high:  # all scores equal: one bin's width around them
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1)


def histogram(scores: Floats, edges: Floats) -> Floats:
    """Count the share of the scores in each bin; the shares sum to 1."""
    return np.histogram(scores, edges)[0] / scores.size
