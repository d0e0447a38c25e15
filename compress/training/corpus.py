"""Training audio in memory: 16-bit samples, a quarter of what float64 would take."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress.audio import read_audio
from compress.data import DataFolder, read_scp
from compress.errors import InputError
from compress.features import SAMPLE_RATE
from compress.files import sha256_of
from compress.progress import Progress
from compress.training.augment import PCM


def load_speech(folder: DataFolder, progress: Progress) -> tuple[list[PCM], NDArray[np.int64]]:
    """Decode all utterances of a folder.

    Returns:
        The utterances (samples,) at 16 kHz, and their speakers numbered from 0 in sorted order of name.

    Raises:
        InputError: If an utterance has no speaker or unusable audio, or there is only one speaker.
    """
    names = [folder.speaker(utterance) for utterance in folder.utterances]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    if len(numbers) < 2:
        raise InputError(f"{folder.root} has {len(numbers)} speaker; training needs two or more in utt2spk.")
    decoded = progress.track(folder.utterances, "reading speech")
    utterances = [to_pcm(folder.waveform(utterance, SAMPLE_RATE)) for utterance in decoded]
    return utterances, np.array([numbers[name] for name in names])


def load_noise(scp: Path | None, progress: Progress) -> list[PCM]:
    """Decode the recordings of a list in the form of ``wav.scp``; None gives none."""
    if scp is None:
        return []
    return [to_pcm(read_audio(path, SAMPLE_RATE)) for _, path in progress.track(read_scp(scp), "reading noise")]


def fingerprint(folder: DataFolder, noise: Path | None) -> str:
    """Hash the names of utterances, their speakers and the noise recordings: what a checkpoint was trained on."""
    names = [f"{utterance} {folder.speaker(utterance)}" for utterance in folder.utterances]
    names += [name for name, _ in read_scp(noise)] if noise else []
    return sha256_of("\n".join(names).encode())


def to_pcm(waveform: NDArray[np.float32]) -> PCM:
    """Round samples in [-1, 1) to 16 bits."""
    return np.clip(np.round(waveform * 32768), -32768, 32767).astype(np.int16)
