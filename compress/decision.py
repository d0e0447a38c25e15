"""From two embeddings to a decision: cosine score, normalization by a cohort, log-odds, operating points.

What is applied in use lies here; what is fitted on trials lies in ``compress.evaluation.thresholds``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError, ModelError, SettingError, unknown_name
from compress.files import sha256_of
from compress.verification import length_normalize

Array: TypeAlias = NDArray[np.floating[Any]]
Doubles: TypeAlias = NDArray[np.float64]

QUALITIES = ("duration", "magnitude")  # of an utterance: seconds of audio, length of its embedding


@dataclass(frozen=True, eq=False)
class Cohort:
    """Voices that are nobody's in the trials, against which scores are normalized.

    Attributes:
        embeddings: (speakers, embedding_size), of length 1: the direction of the mean over a speaker's utterances.
        top_n: Of the cohort's scores of an utterance, so many highest count.
        data: Where the voices are from.
    """

    embeddings: NDArray[np.float32]
    top_n: int
    data: str

    @property
    def file_name(self) -> str:
        """Of the embeddings beside ``artifact.json``: others lie in another file, so neither replaces the other."""
        return _cohort_file(self.embeddings)

    def __post_init__(self) -> None:
        speakers = len(self.embeddings)
        if not 2 <= self.top_n <= speakers:
            raise SettingError(f"top_n must be in 2..{speakers}, the cohort's speakers; got {self.top_n}.")

    def statistics(self, embeddings: Array) -> tuple[Doubles, Doubles]:
        """Mean and standard deviation of the ``top_n`` highest cohort scores of each of (utterances, embedding_size).

        Raises:
            ModelError: If an embedding has no direction, or the scores do not differ.
        """
        scores = length_normalize(embeddings.astype(np.float64)) @ self.embeddings.astype(np.float64).T
        highest = np.partition(scores, -self.top_n, axis=1)[:, -self.top_n :]
        mean, deviation = highest.mean(axis=1), highest.std(axis=1)
        if not (deviation > 1e-9).all():  # cosines of equal voices differ by rounding
            raise ModelError(f"the cohort of {self.data} gives {self.top_n} equal scores. Choose one of other voices.")
        return mean, deviation


def as_norm(scores: Array, enroll: tuple[Array, Array], test: tuple[Array, Array]) -> Doubles:
    """Adaptive symmetric normalization: the mean of the two sides' standard scores.

    Args:
        scores: (trials,).
        enroll: Mean and deviation of the cohort's scores of each trial's enrollment, :meth:`Cohort.statistics`.
        test: The same of each trial's test utterance.

    Source: P. Matejka et al., "Analysis of score normalization in multilingual speaker recognition", Interspeech 2017
    (adaptive S-norm 1).
    """
    sides = [(scores - mean) / deviation for mean, deviation in (enroll, test)]
    result: Doubles = 0.5 * (sides[0] + sides[1])
    return result


@dataclass(frozen=True)
class LogOdds:
    """From score to the natural logarithm of the likelihood ratio of one speaker over two: affine.

    Attributes:
        slope: Of the score.
        offset: Added.
        quality: By name, the weights of the logarithm of a quality of the trial's two utterances: of the lower and of
            the higher, so that the two sides may be exchanged.
        prior: The part of target trials that the fit was weighted for.
    """

    slope: float
    offset: float
    quality: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    prior: float = 0.5

    def of(self, scores: Array, columns: Array) -> Doubles:
        """Log-likelihood ratios of scores (trials,) with :func:`quality_columns` (trials, 2 * qualities)."""
        weights = np.array([weight for pair in self.quality.values() for weight in pair], np.float64)
        result: Doubles = self.slope * scores + self.offset + columns @ weights
        return result

    def score_at(self, llr: float) -> float | None:
        """The score that has this log-likelihood ratio; None where qualities shift it from trial to trial."""
        return None if self.quality else (llr - self.offset) / self.slope


def quality_columns(sides: Mapping[str, tuple[Array, Array]], trials: int) -> Doubles:
    """The logarithms of qualities of both sides, the lower before the higher: (trials, 2 * qualities)."""
    columns: list[Doubles] = []
    for pair in sides.values():
        logarithms = np.log(np.maximum(pair, 1e-6))
        columns += [logarithms.min(axis=0), logarithms.max(axis=0)]
    return np.stack(columns, axis=1) if columns else np.empty((trials, 0))


@dataclass(frozen=True)
class Point:
    """An operating point: two utterances are taken for one speaker from a log-likelihood ratio on.

    Attributes:
        name: To choose it by.
        rule: How it was found, in words.
        llr: The threshold, a natural logarithm.
        score: The same threshold as a score; None where qualities shift it from trial to trial.
        fpr: Of speakers that took no part in finding it, by cross-validation; fraction.
        fnr: Likewise.
        fpr_ci95: By bootstrap over speakers; None with too few.
        fnr_ci95: Likewise.
    """

    name: str
    rule: str
    llr: float
    score: float | None
    fpr: float
    fnr: float
    fpr_ci95: tuple[float, float] | None = None
    fnr_ci95: tuple[float, float] | None = None


@dataclass(frozen=True)
class Verdict:
    """What two utterances give.

    Attributes:
        accepted: Whether they are taken for one speaker.
        cosine: Of the two embeddings.
        score: The cosine, or the cosine normalized by the cohort.
        llr: Log-likelihood ratio of one speaker over two, natural logarithm. With the logarithm of the prior odds
            added it is the log-odds.
        point: The operating point.
    """

    accepted: bool
    cosine: float
    score: float
    llr: float
    point: Point

    @property
    def probability(self) -> float:
        """That it is one speaker, when half of such pairs are."""
        e = math.exp(-abs(self.llr))  # without overflow
        return 1 / (1 + e) if self.llr >= 0 else e / (1 + e)


@dataclass(frozen=True, eq=False)
class Decision:
    """How an artifact decides, and what that was fitted on.

    Attributes:
        points: Operating points.
        preset: Name of the point that is taken where none is named.
        log_odds: From score to log-likelihood ratio.
        cohort: To normalize scores by; None: the score is the cosine.
        trials: Name of the trial list.
        data: Name of the data folder.
        runtime: That computed the embeddings.
        figures: What was measured, before and after: rows of ``evaluation.thresholds.StageFigures``.
    """

    points: tuple[Point, ...]
    preset: str
    log_odds: LogOdds
    cohort: Cohort | None
    trials: str
    data: str
    runtime: str
    figures: Sequence[Mapping[str, Any]] = ()

    def point(self, name: str | None = None) -> Point:
        """An operating point by name; without one, the preset.

        Raises:
            SettingError: If there is none of that name.
        """
        wanted = self.preset if name is None else name
        known = {point.name: point for point in self.points}
        if wanted not in known:
            raise unknown_name("preset", wanted, known)
        return known[wanted]

    def decide(
        self,
        enroll: Array,
        test: Array,
        durations_s: tuple[float, float] | None = None,
        preset: str | None = None,
    ) -> Verdict:
        """Decide whether two embeddings (embedding_size,) are of one speaker.

        Args:
            enroll: Of the known speaker.
            test: Of the other utterance.
            durations_s: Seconds of audio of both, where the log-odds depend on them.
            preset: Name of the operating point; None takes the artifact's own.

        Raises:
            ModelError: If an embedding has no direction.
            SettingError: For an unknown point.
            InputError: If the durations are needed and not given.
        """
        point, pair = self.point(preset), np.stack([enroll, test]).astype(np.float64)
        directions = length_normalize(pair)
        cosine = float(np.clip(directions[0] @ directions[1], -1.0, 1.0))
        score = np.array([cosine])
        if self.cohort is not None:
            mean, deviation = self.cohort.statistics(pair)
            score = as_norm(score, (mean[:1], deviation[:1]), (mean[1:], deviation[1:]))
        if "duration" in self.log_odds.quality and durations_s is None:
            raise InputError("the log-odds of this artifact depend on how long both utterances are: give durations_s.")
        known = {"duration": np.array(durations_s or (1.0, 1.0)), "magnitude": np.linalg.norm(pair, axis=1)}
        sides = {name: (known[name][:1], known[name][1:]) for name in self.log_odds.quality}
        llr = float(self.log_odds.of(score, quality_columns(sides, 1))[0])
        return Verdict(llr >= point.llr, cosine, float(score[0]), llr, point)

    def record(self) -> dict[str, Any]:
        """Everything but the cohort's embeddings, as JSON holds it."""
        cohort = self.cohort and {
            "file": self.cohort.file_name,
            "speakers": len(self.cohort.embeddings),
            "top_n": self.cohort.top_n,
            "data": self.cohort.data,
        }
        return {
            "points": [asdict(point) for point in self.points],
            "preset": self.preset,
            "log_odds": asdict(self.log_odds),
            "cohort": cohort,
            "trials": self.trials,
            "data": self.data,
            "runtime": self.runtime,
            "figures": [dict(row) for row in self.figures],
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any], embeddings: NDArray[np.float32] | None) -> "Decision":
        """What :meth:`record` wrote, with the cohort's embeddings.

        Raises:
            KeyError, TypeError, ValueError: If it is damaged.
        """
        about, fitted = record["cohort"], record["log_odds"]
        if about is not None and (embeddings is None or _cohort_file(embeddings) != about["file"]):
            raise ValueError(f"{about['file']} does not hold the cohort that the thresholds were fitted with")
        quality = {name: (float(low), float(high)) for name, (low, high) in fitted["quality"].items()}
        return cls(
            points=tuple(_point_of(point) for point in record["points"]),
            preset=record["preset"],
            log_odds=LogOdds(fitted["slope"], fitted["offset"], quality, fitted["prior"]),
            cohort=None if about is None or embeddings is None else Cohort(embeddings, about["top_n"], about["data"]),
            trials=record["trials"],
            data=record["data"],
            runtime=record["runtime"],
            figures=tuple(record["figures"]),
        )


def _cohort_file(embeddings: NDArray[np.float32]) -> str:
    return f"cohort-{sha256_of(np.ascontiguousarray(embeddings).tobytes())[:8]}.npy"


def _point_of(record: Mapping[str, Any]) -> Point:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Point(**fields)
