"""Pictures of a fitted decision: ROC, DET and score histograms, by matplotlib."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import norm

from compress.decision import Doubles
from compress.errors import MachineError
from compress.evaluation.thresholds import Fit
from compress.verification import Labels, Scores, det_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = ("roc.png", "det.png", "scores.png")
RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6)  # marks of the axes of a DET picture
INCHES = 5.0


def prepare(folder: Path) -> None:
    """Make a folder for pictures, and look whether they can be drawn.

    Raises:
        MachineError: If matplotlib is missing or the folder cannot be made.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MachineError('pictures need matplotlib: pip install "speech-compress[plots]".') from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder} cannot be made for pictures ({error.strerror}). Name another folder.") from error


def normal_deviates(labels: Labels, scores: Scores) -> tuple[Doubles, Doubles]:
    """FPR and FNR of every operating point on normal-deviate axes: of normal scores of equal variance, a line.

    Points with a rate of 0 or 1 lie at infinity and are left out.

    Source: A. Martin et al., "The DET curve in assessment of detection task performance", Eurospeech 1997.
    """
    _, fnr, fpr = det_curve(labels, scores)
    inside = (fnr > 0) & (fnr < 1) & (fpr > 0) & (fpr < 1)
    return norm.ppf(fpr[inside]), norm.ppf(fnr[inside])


def draw(fit: Fit, folder: Path) -> list[Path]:
    """Write the pictures ``NAMES`` into a folder.

    Raises:
        MachineError: As :func:`prepare`.
    """
    prepare(folder)
    from matplotlib.figure import Figure  # not pyplot: no windows, no state

    paths = [folder / name for name in NAMES]
    for path, fill in zip(paths, (_roc, _det, _histogram), strict=True):
        figure = Figure(figsize=(INCHES, INCHES), layout="constrained")
        axes = figure.add_subplot()
        fill(axes, fit)
        figure.savefig(path, dpi=150)
    return paths


def _roc(axes: "Axes", fit: Fit) -> None:
    for stage in fit.stages:
        _, fnr, fpr = det_curve(fit.labels, stage.scores)
        axes.plot(100 * fpr, 100 * (1 - fnr), label=stage.name)
    axes.set(xlabel="false acceptances (%)", ylabel="targets accepted (%)", title="ROC")
    axes.legend(loc="lower right")


def _det(axes: "Axes", fit: Fit) -> None:
    for stage in fit.stages:
        axes.plot(*normal_deviates(fit.labels, stage.scores), label=stage.name)
    for point in fit.decision.points:
        if 0 < point.fpr < 1 and 0 < point.fnr < 1:
            place = norm.ppf(point.fpr), norm.ppf(point.fnr)
            axes.plot(*place, "k.")
            axes.annotate(point.name, place, xytext=(4, 4), textcoords="offset points", fontsize="small")
    marks, names = [float(norm.ppf(rate)) for rate in RATES], [f"{100 * rate:g}" for rate in RATES]
    axes.set(
        xlabel="false acceptances (%)",
        ylabel="misses (%)",
        title="DET",
        xlim=(marks[0], marks[-1]),
        ylim=(marks[0], marks[-1]),
    )
    axes.set_xticks(marks, names)
    axes.set_yticks(marks, names)
    axes.legend(loc="upper right")


def _histogram(axes: "Axes", fit: Fit) -> None:
    llrs = fit.stages[-1].llrs
    low, high = map(float, np.quantile(llrs, [0.001, 0.999]))
    edges = np.linspace(low, high, 80).tolist()
    for kind, name in ((fit.labels, "targets"), (~fit.labels, "non-targets")):
        axes.hist(llrs[kind], edges, density=True, alpha=0.6, label=name)
    for number, point in enumerate(fit.decision.points):  # one below the other: some lie close together
        axes.axvline(point.llr, color="k", linewidth=0.8)
        axes.annotate(point.name, (point.llr, 0.75 - 0.06 * number), xycoords=("data", "axes fraction"), va="top")
    axes.set(xlabel="log-likelihood ratio", ylabel="density", title=f"Scores: {fit.stages[-1].name}, calibrated")
    axes.legend()
