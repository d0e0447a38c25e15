"""Speaker verification of a data folder: embeddings, scores, and what the table says of them."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec

import numpy as np
from numpy.typing import NDArray

from compress.audio import probe
from compress.data import DataFolder, Trials
from compress.errors import InputError
from compress.features import num_frames
from compress.machine import cores
from compress.progress import Progress
from compress.runners import Runner
from compress.verification import (
    cosine_scores,
    decision_flips,
    eer,
    eer_difference_interval,
    eer_interval,
    length_normalize,
    min_dcf,
)

Array = NDArray[np.float32]
P = ParamSpec("P")


def check_header(path: Path) -> None:
    """Look at an audio file without decoding it.

    Raises:
        InputError: If the file is missing, empty, cut short, no audio, or has less than one frame.
    """
    info = probe(path)
    try:
        num_frames(info.num_samples, info.sample_rate)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def embed(folder: DataFolder, utterances: Sequence[str], runner: Runner, progress: Progress, description: str) -> Array:
    """Embed utterances of a folder: (utterances, embedding_size).

    Utterances are embedded side by side, one on each core: that keeps all cores busy, where several threads on
    one utterance wait for each other. The runner should have been opened with one thread.

    Raises:
        InputError: If an audio file cannot be used; the file is named.
    """
    sample_rate = runner.artifact.front_end.sample_rate

    def embed_one(utterance: str) -> Array:
        waveform = folder.waveform(utterance, sample_rate)
        try:
            return runner.embed(waveform, sample_rate)
        except InputError as error:
            raise InputError(f"{folder.path(utterance)}: {error}") from error

    with ThreadPoolExecutor(cores()) as pool:
        try:
            rows = pool.map(embed_one, utterances)
            return np.stack(list(progress.track(rows, description, len(utterances))))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@dataclass(frozen=True, eq=False)
class Verification:
    """A trial list with its audio, ready to be embedded by any runner."""

    folder: DataFolder
    trials: Trials
    enroll_speakers: NDArray[np.str_]
    test_speakers: NDArray[np.str_]

    @classmethod
    def read(cls, folder: DataFolder, trials: Path | str | None = None) -> "Verification":
        """Read a trial list and the speakers of its utterances.

        Raises:
            InputError: As :meth:`DataFolder.trials`, or if an utterance has no speaker or no audio file, or one
                whose header tells that it cannot be used.
        """
        listed = folder.trials(trials)
        missing = [u for u in listed.utterances if not folder.path(u).is_file()]
        if missing:
            raise InputError(
                f"{folder.path(missing[0])}: no such audio file ({len(missing)} of the trial list's"
                f" {len(listed.utterances)} are missing). `compress data check {folder.root}` names them all."
            )
        for utterance in listed.utterances:
            check_header(folder.path(utterance))
        speakers = np.array([folder.speaker(utterance) for utterance in listed.utterances])
        return cls(folder, listed, speakers[listed.enroll], speakers[listed.test])

    def embed(self, runner: Runner, progress: Progress, description: str) -> Array:
        """Embed every utterance of the list, in the order of ``trials.utterances``, as :func:`embed`."""
        return embed(self.folder, self.trials.utterances, runner, progress, description)

    def scores(self, embeddings: Array) -> NDArray[np.float64]:
        """Cosine scores of the trials, (trials,)."""
        scores = cosine_scores(embeddings.astype(np.float64), self.trials.enroll, self.trials.test)
        return scores.astype(np.float64, copy=False)


@dataclass(frozen=True)
class Figures:
    """What verification says of one variant; the fields of the table of the same names."""

    eer: float
    eer_ci95: tuple[float, float] | None
    min_dcf: float
    threshold: float
    n_trials: int
    decision_flips: int | None = None
    cosine_mean: float | None = None
    cosine_min: float | None = None
    eer_rise: float | None = None  # over the baseline's, with the interval of the paired difference
    eer_rise_ci95: tuple[float, float] | None = None


def measure(data: Verification, embeddings: Array, baseline: Array | None = None) -> Figures:
    """Measure embeddings (utterances, embedding_size) on the trials, and against the baseline's."""
    labels, scores = data.trials.labels, data.scores(embeddings)
    rate, threshold = eer(labels, scores)
    figures: dict[str, object] = {}
    if baseline is not None:
        before = data.scores(baseline)
        rate_before, threshold_before = eer(labels, before)
        cosines = (length_normalize(embeddings.astype(np.float64)) * length_normalize(baseline.astype(np.float64))).sum(
            1
        )
        figures = {
            "decision_flips": decision_flips(before, threshold_before, scores, threshold),
            "cosine_mean": float(cosines.mean()),
            "cosine_min": float(cosines.min()),
            "eer_rise": rate - rate_before,
            "eer_rise_ci95": interval_or_none(
                eer_difference_interval, labels, before, scores, data.enroll_speakers, data.test_speakers
            ),
        }
    return Figures(
        eer=rate,
        eer_ci95=interval_or_none(eer_interval, labels, scores, data.enroll_speakers, data.test_speakers),
        min_dcf=min_dcf(labels, scores),
        threshold=threshold,
        n_trials=len(labels),
        **figures,  # type: ignore[arg-type]
    )


def interval_or_none(
    bootstrap: Callable[P, tuple[float, float]], *arguments: P.args, **options: P.kwargs
) -> tuple[float, float] | None:
    """A bootstrap interval, or None where the list has too few speakers for one."""
    try:
        return bootstrap(*arguments, **options)
    except InputError:
        return None


def typical_waveform(folder: DataFolder, utterances: Sequence[str], duration_s: float, sample_rate: int) -> Array:
    """Real speech of a fixed length for timing: the first utterance, repeated or cut to ``duration_s``."""
    return np.resize(folder.waveform(utterances[0], sample_rate), int(duration_s * sample_rate))
