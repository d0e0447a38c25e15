"""Verification of a data folder: embeddings in order, figures against a baseline, and unusable audio named."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.artifact import Artifact
from compress.data import DataFolder, Trials
from compress.errors import InputError
from compress.evaluation.speakers import Figures, Verification, measure, typical_waveform
from compress.progress import Silent
from compress.runners import OnnxRuntimeRunner, TorchRunner
from compress.verification import eer, min_dcf

T = TypeVar("T")


class Recorder:
    """Keeps what progress it was told of."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tracked: list[tuple[str, int | None, int]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        count = 0
        for count, item in enumerate(items, 1):  # noqa: B007
            yield item
        self.tracked.append((description, total, count))


def random_trials(seed: int, speakers: int = 8, each: int = 3) -> tuple[Verification, np.ndarray]:
    """All pairs of random embeddings that speakers share a part of."""
    rng = np.random.default_rng(seed)
    names = np.repeat([f"s{i}" for i in range(speakers)], each)
    embeddings = rng.standard_normal((speakers, 6)).repeat(each, 0) + rng.standard_normal((speakers * each, 6))
    enroll, test = np.triu_indices(len(names), 1)
    trials = Trials(tuple(f"u{i}" for i in range(len(names))), names[enroll] == names[test], enroll, test)
    return Verification(DataFolder(Path(), {}), trials, names[enroll], names[test]), embeddings.astype(np.float32)


def test_each_utterance_is_embedded_once_in_the_order_of_the_list(
    verification: Verification, runner: OnnxRuntimeRunner
) -> None:
    recorder = Recorder()
    embeddings = verification.embed(runner, recorder, "embedding")
    one_by_one = [runner.embed(verification.folder.waveform(u, 16000), 16000) for u in verification.trials.utterances]
    np.testing.assert_array_equal(embeddings, np.stack(one_by_one))
    assert recorder.tracked == [("embedding", 18, 18)]


def test_speakers_are_those_of_the_trials(verification: Verification) -> None:
    assert ((verification.enroll_speakers == verification.test_speakers) == verification.trials.labels).all()


def test_figures_are_those_of_the_scores(verification: Verification, runner: OnnxRuntimeRunner) -> None:
    embeddings = verification.embed(runner, Silent(), "")
    scores = verification.scores(embeddings)
    figures = measure(verification, embeddings)
    assert (figures.eer, figures.threshold) == eer(verification.trials.labels, scores)
    assert figures.min_dcf == min_dcf(verification.trials.labels, scores)
    assert figures.n_trials == len(verification.trials) == 153
    assert figures.eer_ci95 is not None
    assert figures.eer_ci95[0] <= figures.eer <= figures.eer_ci95[1]
    compared = (
        figures.decision_flips,
        figures.cosine_mean,
        figures.cosine_min,
        figures.eer_rise,
        figures.eer_rise_ci95,
    )
    assert compared == (None,) * 5


@given(seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_baseline_does_not_differ_from_itself(seed: int) -> None:
    data, embeddings = random_trials(seed)
    figures = measure(data, embeddings, embeddings)
    assert (figures.decision_flips, figures.eer_rise, figures.eer_rise_ci95) == (0, 0, (0, 0))
    assert figures.cosine_mean == pytest.approx(1)
    assert figures.cosine_min == pytest.approx(1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), lengths=st.lists(st.floats(0.01, 100), min_size=24, max_size=24))
def test_the_length_of_embeddings_does_not_matter(seed: int, lengths: list[float]) -> None:
    data, embeddings = random_trials(seed)
    scaled = embeddings * np.array(lengths, np.float32)[:, None]
    before, after = measure(data, embeddings), measure(data, scaled, embeddings)
    assert after.eer == pytest.approx(before.eer)
    assert after.threshold == pytest.approx(before.threshold, abs=1e-6)
    assert after.cosine_min == pytest.approx(1, abs=1e-6)


@given(seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_rotation_changes_the_cosine_but_no_decision(seed: int) -> None:
    data, embeddings = random_trials(seed)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((6, 6)))
    rotated = (embeddings @ rotation).astype(np.float32)
    figures = measure(data, rotated, embeddings)
    assert figures.eer_rise == pytest.approx(0, abs=1e-9)
    assert figures.cosine_min is not None
    assert figures.cosine_min < 0.99


def test_noise_raises_the_error_rate_and_the_interval_says_so() -> None:
    data, embeddings = random_trials(0, speakers=20)
    noisy = embeddings + 3 * np.random.default_rng(1).standard_normal(embeddings.shape).astype(np.float32)
    figures = measure(data, noisy, embeddings)
    assert figures.eer_rise is not None
    assert figures.eer_rise > 0
    assert figures.eer_rise_ci95 is not None
    assert figures.eer_rise_ci95[0] <= figures.eer_rise <= figures.eer_rise_ci95[1]
    assert figures.decision_flips


def test_too_few_speakers_give_no_interval() -> None:
    data, embeddings = random_trials(0, speakers=2)
    figures = measure(data, embeddings, embeddings)
    assert (figures.eer_ci95, figures.eer_rise_ci95) == (None, None)
    assert isinstance(figures, Figures)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 3.0])
def test_a_typical_waveform_is_real_speech_of_the_asked_length(verification: Verification, seconds: float) -> None:
    utterances = verification.trials.utterances
    waveform = typical_waveform(verification.folder, utterances, seconds, 16000)
    speech = verification.folder.waveform(utterances[0], 16000)
    assert len(waveform) == seconds * 16000
    common = min(len(waveform), len(speech))
    np.testing.assert_array_equal(waveform[:common], speech[:common])


def write(samples: int, value: float) -> Callable[[Path], None]:
    return lambda path: soundfile.write(path, np.full(samples, value, np.float32), 16000, subtype="FLOAT")


HEADER = {
    "missing": (Path.unlink, r" no such audio file \(1 of the trial list's 18 are missing\)\. `compress data check "),
    "empty": (lambda path: path.write_bytes(b""), r" is an empty file \(0 bytes\)"),
    "not audio": (lambda path: path.write_bytes(b"hello" * 99), r" cannot be decoded \("),
    "truncated": (lambda path: os.truncate(path, 9000), r" is truncated: its last \d+ bytes are missing"),
    "no samples": (write(0, 0.1), r": waveform has 0 samples; "),
    "too short": (write(399, 0.1), r": waveform has 399 samples; "),
}
CONTENT = {
    "silent": (write(16000, 0), r" is digital silence throughout"),
    "NaN": (write(16000, np.nan), r" holds NaN or infinite samples"),
}


@pytest.mark.parametrize("kind", HEADER)
def test_what_a_header_tells_is_said_before_any_work(own_speech: Path, kind: str) -> None:
    damage, message = HEADER[kind]
    path = sorted((own_speech / "wav").iterdir())[5]
    damage(path)
    with pytest.raises(InputError, match=re.escape(str(path)) + ":?" + message):
        Verification.read(DataFolder.read(own_speech))


@pytest.mark.parametrize("kind", CONTENT)
def test_unusable_samples_are_named_while_embedding(own_speech: Path, kind: str, runner: OnnxRuntimeRunner) -> None:
    damage, message = CONTENT[kind]
    path = sorted((own_speech / "wav").iterdir())[5]
    damage(path)
    data = Verification.read(DataFolder.read(own_speech))
    with pytest.raises(InputError, match=re.escape(str(path)) + message):
        data.embed(runner, Silent(), "")


def test_an_utterance_too_short_for_the_network_is_named(own_speech: Path, small_campplus: Artifact) -> None:
    path = sorted((own_speech / "wav").iterdir())[5]
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 400), 16000)  # one frame: no deviation over time
    data = Verification.read(DataFolder.read(own_speech))
    with pytest.raises(InputError, match=re.escape(str(path)) + r": .*a waveform of 0\.025 s"):
        data.embed(TorchRunner(small_campplus, 1), Silent(), "")


def test_utterances_need_speakers(own_speech: Path) -> None:
    table = own_speech / "utt2spk"
    first = table.read_text().splitlines()[0].split()[0]
    table.write_text("".join(line for line in table.read_text().splitlines(True) if not line.startswith(first)))
    with pytest.raises(InputError, match=rf"utt2spk: utterance '{first}' has no speaker"):
        Verification.read(DataFolder.read(own_speech))
    table.unlink()
    with pytest.raises(InputError, match=r"has no utt2spk"):
        Verification.read(DataFolder.read(own_speech))
