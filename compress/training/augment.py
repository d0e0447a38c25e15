"""Augmentation for training: speed, filters, rooms, noise, babble and codecs; bands and masks of the features.

What is random about a crop is drawn before anything is computed, so that a process can pass over the crops of another
one's share and still have its own crops as if it had made them all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import scipy.signal
import soxr
from numpy.typing import NDArray

from compress.errors import SettingError
from compress.training.codecs import CODECS, check_codecs, through_codec

Array = NDArray[np.float32]
PCM = NDArray[np.int16]
Change: TypeAlias = Callable[[Array], Array]  # what is left to do when all is drawn


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
    p_codec: float = 0.0
    codecs: tuple[str, ...] = ("band8k", "mulaw", "alaw")
    p_bands: float = 0.0  # FilterAugment
    bands: tuple[int, int] = (2, 5)
    band_db: tuple[float, float] = (-6.0, 6.0)
    p_masks: float = 0.0  # SpecAugment
    masks: int = 1  # over time, and as many over frequency
    mask_frames: int = 10  # at most
    mask_bins: int = 8  # at most

    def __post_init__(self) -> None:
        for name in ("p_filter", "p_room", "p_noise", "p_babble", "p_codec", "p_bands", "p_masks"):
            check_bounds(f"augmentation: {name}", getattr(self, name), 0.0, 1.0)
        for name, low, high in _PAIRS:
            check_pair(f"augmentation: {name}", getattr(self, name), low, high)
        for name, low, high in (("masks", 1, 100), ("mask_frames", 1, 10000), ("mask_bins", 1, 79)):
            check_bounds(f"augmentation: {name}", getattr(self, name), low, high)
        check_codecs(self.codecs)


_PAIRS = (
    ("snr_db", -50.0, 100.0),
    ("babble_snr_db", -50.0, 100.0),
    ("rt60_s", 0.01, 10.0),
    ("bands", 1, 79),
    ("band_db", -50.0, 50.0),
)


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
    return draw_crop(samples, length, speed, rng)()


def draw_crop(samples: PCM, length: int, speed: float, rng: np.random.Generator) -> Callable[[], Array]:
    """Draw the place of a crop as :func:`random_crop` cuts; of ``samples`` only the length is looked at."""
    needed = int(np.ceil(length * speed))
    times = max(1, -(-needed // len(samples)))
    start = int(rng.integers(len(samples) * times - needed + 1))

    def cut() -> Array:
        whole = samples if times == 1 else np.tile(samples, times)
        crop = whole[start : start + needed].astype(np.float32) / 32768.0
        if speed == 1.0:
            return crop
        slowed: Array = soxr.resample(crop, 16000 * speed, 16000, quality="MQ").astype(np.float32)
        return np.resize(slowed, length)

    return cut


def augment(
    crop: Array, settings: Augmentation, noises: Sequence[PCM], speech: Sequence[PCM], rng: np.random.Generator
) -> Array:
    """Disturb a crop (samples,): what :func:`draw_changes` draws, done."""
    return changed(crop, draw_changes(len(crop), settings, noises, speech, rng))


def changed(values: Array, changes: Sequence[Change]) -> Array:
    """Do what was drawn, in its order."""
    for change in changes:
        values = change(values)
    return values


def draw_changes(
    length: int, settings: Augmentation, noises: Sequence[PCM], speech: Sequence[PCM], rng: np.random.Generator
) -> list[Change]:
    """Draw what is to be done to a crop: filter, room, then noise or babble, another level, and a codec.

    Args:
        length: Of the crop: mono samples in [-1, 1).
        settings: Probabilities and ranges.
        noises: Recordings to add; may be empty.
        speech: Utterances of which three to five are summed to babble.
        rng: The only source of randomness.
    """
    changes: list[Change] = []
    if rng.random() < settings.p_filter:
        changes.append(draw_filter(rng))
    if rng.random() < settings.p_room:
        changes.append(draw_room(rng.uniform(*settings.rt60_s), rng))
    if noises and rng.random() < settings.p_noise:
        noise = draw_crop(noises[int(rng.integers(len(noises)))], length, 1.0, rng)
        changes.append(draw_addition([noise], settings.snr_db, rng))
    elif rng.random() < settings.p_babble:
        talkers = rng.integers(len(speech), size=rng.integers(3, 6))
        babble = [draw_crop(speech[i], length, 1.0, rng) for i in talkers]
        changes.append(draw_addition(babble, settings.babble_snr_db, rng))
    changes.append(draw_level(rng))
    if settings.p_codec and rng.random() < settings.p_codec:
        changes.append(draw_codec(settings.codecs, rng))
    return changes


def draw_addition(
    noises: Sequence[Callable[[], Array]], snr_db: tuple[float, float], rng: np.random.Generator
) -> Change:
    """Draw the ratio at which the sum of noises is added."""
    ratio = rng.uniform(*snr_db)
    return lambda speech: at_snr(speech, np.sum([noise() for noise in noises], axis=0), ratio)


def draw_level(rng: np.random.Generator) -> Change:
    """Draw a gain of -10 to 6 dB; what would be clipped is made less loud."""
    gain = 10.0 ** (rng.uniform(-10.0, 6.0) / 20.0)

    def change(speech: Array) -> Array:
        peak = float(np.abs(speech).max())
        return speech * np.float32(min(gain, 0.99 / peak) if peak > 0 else 1.0)

    return change


def draw_codec(names: Sequence[str], rng: np.random.Generator) -> Change:
    """Draw a codec of some, and its bit rate."""
    name = names[int(rng.integers(len(names)))]
    bit_rate = CODECS[name].bit_rates[int(rng.integers(len(CODECS[name].bit_rates)))]
    return lambda speech: through_codec(speech, name, bit_rate)


def at_snr(speech: Array, noise: Array, snr_db: float) -> Array:
    """Add noise to speech, both (samples,), at a signal-to-noise ratio in decibels over the whole crop."""
    noise_power = float(np.mean(np.square(noise)))
    if noise_power < 1e-10:
        return speech
    speech_power = float(np.mean(np.square(speech)))
    return speech + noise * np.float32(np.sqrt(speech_power / noise_power / 10.0 ** (snr_db / 10.0)))


def draw_room(rt60_s: float, rng: np.random.Generator) -> Change:
    """Draw a synthetic room: a direct path and exponentially decaying noise 60 dB down after ``rt60_s``."""
    length = int(rt60_s * 16000)
    noise = rng.standard_normal(length)
    strength = rng.uniform(0.1, 0.6)

    def change(speech: Array) -> Array:
        impulse = noise * np.exp(-6.9078 * np.arange(length) / length)
        impulse *= strength / np.sqrt(np.sum(np.square(impulse)))
        impulse[: int(0.002 * 16000)] = 0.0
        impulse[0] = 1.0
        convolved: Array = scipy.signal.fftconvolve(speech, impulse.astype(np.float32)).astype(np.float32)
        return convolved[: len(speech)]

    return change


def draw_filter(rng: np.random.Generator) -> Change:
    """Draw a smooth channel: gains of up to 10 dB at eight frequencies, and at times a narrow band."""
    gains = rng.uniform(-10.0, 10.0, 8)
    telephone = rng.random() < 0.15

    def change(speech: Array) -> Array:
        spectrum = np.fft.rfft(speech)
        hertz = np.linspace(0.0, 8000.0, len(spectrum))
        gain_db = np.interp(hertz, np.linspace(0.0, 8000.0, 8), gains)
        if telephone:
            gain_db -= 40.0 * ((hertz < 300.0) | (hertz > 3400.0))
        return np.fft.irfft(spectrum * 10.0 ** (gain_db / 20.0), n=len(speech)).astype(np.float32)

    return change


def draw_feature_changes(frames: int, bins: int, settings: Augmentation, rng: np.random.Generator) -> list[Change]:
    """Draw what is to be done to log-mel features (frames, bins) minus their mean."""
    changes: list[Change] = []
    if settings.p_bands and rng.random() < settings.p_bands:
        changes.append(draw_bands(bins, settings, rng))
    if settings.p_masks and rng.random() < settings.p_masks:
        changes.append(draw_masks(frames, bins, settings, rng))
    return changes


def draw_bands(bins: int, settings: Augmentation, rng: np.random.Generator) -> Change:
    """Draw bands of mel bins, each with a gain of its own for the whole crop.

    It comes after the mean is taken off, which would take a constant gain off with it.

    Source: H. Nam et al., "FilterAugment: An Acoustic Environmental Data Augmentation Method", ICASSP 2022 (the step
    type).
    """
    count = int(rng.integers(settings.bands[0], settings.bands[1] + 1))
    edges = [0, *np.sort(rng.choice(np.arange(1, bins), count - 1, replace=False)), bins]
    gains = np.repeat(rng.uniform(*settings.band_db, count), np.diff(edges)) * math.log(10.0) / 10.0
    return lambda features: features + gains.astype(np.float32)


def draw_masks(frames: int, bins: int, settings: Augmentation, rng: np.random.Generator) -> Change:
    """Draw stretches of time and of frequency whose features become 0, their mean; of time at most half is masked.

    Source: D. Park et al., "SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition",
    Interspeech 2019 (without time warping).
    """
    longest = min(settings.mask_frames, frames // (2 * settings.masks))
    times = [draw_stretch(frames, longest, rng) for _ in range(settings.masks)]
    bands = [draw_stretch(bins, settings.mask_bins, rng) for _ in range(settings.masks)]

    def change(features: Array) -> Array:
        masked = features.copy()
        for time in times:
            masked[time] = 0.0
        for band in bands:
            masked[:, band] = 0.0
        return masked

    return change


def draw_stretch(length: int, longest: int, rng: np.random.Generator) -> slice:
    """Draw a stretch of 0 to ``longest`` out of ``length``."""
    width = int(rng.integers(longest + 1))
    start = int(rng.integers(length - width + 1))
    return slice(start, start + width)
