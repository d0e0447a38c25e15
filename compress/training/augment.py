"""Waveform augmentation for training: speed, filters, rooms, noise and babble."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.signal
import soxr
from numpy.typing import NDArray

from compress.errors import SettingError

Array = NDArray[np.float32]
PCM = NDArray[np.int16]


@dataclass(frozen=True)
class Augmentation:
    """How often and how strongly a training crop is disturbed. Probabilities are in 0..1."""

    p_filter: float = 0.3
    p_room: float = 0.25
    p_noise: float = 0.5
    p_babble: float = 0.2
    snr_db: tuple[float, float] = (5.0, 25.0)
    babble_snr_db: tuple[float, float] = (10.0, 25.0)
    rt60_s: tuple[float, float] = (0.1, 0.5)

    def __post_init__(self) -> None:
        for name in ("p_filter", "p_room", "p_noise", "p_babble"):
            check_bounds(f"augmentation: {name}", getattr(self, name), 0.0, 1.0)
        for name, low, high in (("snr_db", -50.0, 100.0), ("babble_snr_db", -50.0, 100.0), ("rt60_s", 0.01, 10.0)):
            check_pair(f"augmentation: {name}", getattr(self, name), low, high)


def check_bounds(name: str, value: float, low: float, high: float) -> None:
    """Refuse a setting outside ``low..high``, NaN included.

    Raises:
        SettingError: Naming the setting and its bounds.
    """
    if not low <= value <= high:
        raise SettingError(f"recipe: {name} must be in {low:g}..{high:g}, got {value:g}.")


def check_pair(name: str, pair: Sequence[float], low: float, high: float) -> None:
    """Refuse what is not two values, the lower first, within ``low..high``.

    Raises:
        SettingError: Naming the setting and what is needed.
    """
    if len(pair) != 2 or not pair[0] <= pair[1]:
        raise SettingError(f"recipe: {name} must be two values, the lower first, got {list(pair)}.")
    for value in pair:
        check_bounds(name, value, low, high)


def random_crop(samples: PCM, length: int, speed: float, rng: np.random.Generator) -> Array:
    """Cut ``length`` samples as heard at ``speed``, from a random place; a shorter utterance is repeated.

    Speed perturbation changes tempo and pitch together, so a speaker at another speed is another speaker.
    """
    needed = int(np.ceil(length * speed))
    if len(samples) < needed:
        samples = np.tile(samples, -(-needed // len(samples)))
    start = int(rng.integers(len(samples) - needed + 1))
    crop = samples[start : start + needed].astype(np.float32) / 32768.0
    if speed == 1.0:
        return crop
    slowed: Array = soxr.resample(crop, 16000 * speed, 16000, quality="MQ").astype(np.float32)
    return np.resize(slowed, length)


def augment(
    crop: Array, settings: Augmentation, noises: Sequence[PCM], speech: Sequence[PCM], rng: np.random.Generator
) -> Array:
    """Disturb a crop (samples,): filter, room, then noise or babble; the level is drawn anew.

    Args:
        crop: Mono waveform in [-1, 1).
        settings: Probabilities and ranges.
        noises: Recordings to add; may be empty.
        speech: Utterances of which three to five are summed to babble.
        rng: The only source of randomness.
    """
    if rng.random() < settings.p_filter:
        crop = filtered(crop, rng)
    if rng.random() < settings.p_room:
        crop = reverberated(crop, rng.uniform(*settings.rt60_s), rng)
    if noises and rng.random() < settings.p_noise:
        noise = random_crop(noises[int(rng.integers(len(noises)))], len(crop), 1.0, rng)
        crop = at_snr(crop, noise, rng.uniform(*settings.snr_db))
    elif rng.random() < settings.p_babble:
        talkers = rng.integers(len(speech), size=rng.integers(3, 6))
        babble = np.sum([random_crop(speech[i], len(crop), 1.0, rng) for i in talkers], axis=0)
        crop = at_snr(crop, babble, rng.uniform(*settings.babble_snr_db))
    gain = 10.0 ** (rng.uniform(-10.0, 6.0) / 20.0)
    peak = float(np.abs(crop).max())
    return crop * np.float32(min(gain, 0.99 / peak) if peak > 0 else 1.0)


def at_snr(speech: Array, noise: Array, snr_db: float) -> Array:
    """Add noise to speech, both (samples,), at a signal-to-noise ratio in decibels over the whole crop."""
    noise_power = float(np.mean(np.square(noise)))
    if noise_power < 1e-10:
        return speech
    speech_power = float(np.mean(np.square(speech)))
    return speech + noise * np.float32(np.sqrt(speech_power / noise_power / 10.0 ** (snr_db / 10.0)))


def reverberated(speech: Array, rt60_s: float, rng: np.random.Generator) -> Array:
    """Convolve with a synthetic room: a direct path and exponentially decaying noise 60 dB down after ``rt60_s``."""
    length = int(rt60_s * 16000)
    decay = np.exp(-6.9078 * np.arange(length) / length)
    impulse = rng.standard_normal(length) * decay
    impulse *= rng.uniform(0.1, 0.6) / np.sqrt(np.sum(np.square(impulse)))
    impulse[: int(0.002 * 16000)] = 0.0
    impulse[0] = 1.0
    convolved: Array = scipy.signal.fftconvolve(speech, impulse.astype(np.float32)).astype(np.float32)
    return convolved[: len(speech)]


def filtered(speech: Array, rng: np.random.Generator) -> Array:
    """Pass through a random smooth channel: gains of up to 10 dB at eight frequencies, and at times a narrow band."""
    spectrum = np.fft.rfft(speech)
    hertz = np.linspace(0.0, 8000.0, len(spectrum))
    gain_db = np.interp(hertz, np.linspace(0.0, 8000.0, 8), rng.uniform(-10.0, 10.0, 8))
    if rng.random() < 0.15:  # a telephone line
        gain_db -= 40.0 * ((hertz < 300.0) | (hertz > 3400.0))
    return np.fft.irfft(spectrum * 10.0 ** (gain_db / 20.0), n=len(speech)).astype(np.float32)
