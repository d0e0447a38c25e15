"""Kaldi-compatible log-mel Fbank with per-utterance mean normalisation, in numpy."""

from functools import lru_cache

import numpy as np
import scipy.fft
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from compress.errors import InputError

SAMPLE_RATE = 16000
NUM_MEL_BINS = 80
FRAME_LENGTH_MS = 25.0
FRAME_SHIFT_MS = 10.0
LOW_FREQ_HZ = 20.0
PREEMPHASIS = 0.97
LOG_FLOOR = 1.1920929e-07  # float32 epsilon, Kaldi's floor under the logarithm
BLOCK_FRAMES = 128  # at 16 kHz the buffers of one block (0.7 MB) stay in a 1 MB second-level cache

Array = NDArray[np.float32]


def num_frames(num_samples: int, sample_rate: int = SAMPLE_RATE) -> int:
    """Count the Fbank frames of a waveform, with edges snipped.

    Args:
        num_samples: Length of the mono waveform, in samples.
        sample_rate: In hertz.

    Returns:
        T of the (T, num_mel_bins) feature matrix.

    Raises:
        InputError: If the waveform is shorter than one window (Kaldi returns 0 there), or the rate is under 100 Hz.

    Source: Kaldi, feat/feature-window.cc, ``NumFrames`` with ``snip_edges=true``.
    """
    window, shift = window_and_shift(sample_rate)
    if num_samples < window:
        raise InputError(f"waveform has {num_samples} samples; one Fbank frame needs {window}.")
    return 1 + (num_samples - window) // shift


def fbank(waveform: Array, sample_rate: int = SAMPLE_RATE, num_mel_bins: int = NUM_MEL_BINS) -> Array:
    """Compute the log-mel filter-bank energies of a waveform.

    Args:
        waveform: (samples,) in [-1, 1), not scaled to the 16-bit range.
        sample_rate: In hertz.
        num_mel_bins: Number of triangular mel filters between 20 Hz and half the sample rate.

    Returns:
        (frames, num_mel_bins) natural logarithms, floored at log(1.1920929e-07).

    Raises:
        InputError: If the waveform is shorter than one window.

    Source: Kaldi ``compute-fbank-feats`` with dither 0, 25/10 ms Povey windows, pre-emphasis 0.97,
    DC removal per frame, power spectrum, no energy.
    """
    frames = num_frames(len(waveform), sample_rate)
    window, shift = window_and_shift(sample_rate)
    samples = np.ascontiguousarray(waveform, dtype=np.float32)
    emphasized = _preemphasize(samples)
    framed = sliding_window_view(samples, window)[::shift]
    framed_emphasized = sliding_window_view(emphasized, window)[::shift]
    # Both steps are linear: the mean taken off a frame before pre-emphasis is this much taken off it afterwards.
    offset = framed.mean(axis=1, keepdims=True) * np.float32(1.0 - PREEMPHASIS)
    first = framed[:, :1] * np.float32(1.0 - PREEMPHASIS)  # each frame's first sample is its own predecessor

    energies = np.empty((frames, num_mel_bins), dtype=np.float32)
    padded = np.zeros((min(frames, BLOCK_FRAMES), fft_size(window)), dtype=np.float32)
    for start in range(0, frames, BLOCK_FRAMES):
        block = slice(start, min(start + BLOCK_FRAMES, frames))
        count = block.stop - start
        windowed = padded[:count, :window]
        np.subtract(framed_emphasized[block], offset[block], out=windowed)
        np.subtract(first[block], offset[block], out=windowed[:, :1])
        windowed *= povey_window(window)
        power = _power_spectrum(padded[:count])
        np.matmul(power, mel_matrix(sample_rate, num_mel_bins), out=energies[block])
    np.maximum(energies, LOG_FLOOR, out=energies)
    result: Array = np.log(energies, out=energies)
    return result


def mean_normalize(features: Array) -> Array:
    """Subtract the mean over time (CMN): (frames, num_mel_bins) -> the same shape."""
    mean = features.mean(axis=0, dtype=np.float64)  # float32 sums drift over the frames of an hour
    result: Array = features - mean.astype(np.float32)
    return result


def fbank_cmn(waveform: Array, sample_rate: int = SAMPLE_RATE, num_mel_bins: int = NUM_MEL_BINS) -> Array:
    """Compute what the networks take: Fbank minus its mean over the utterance, (frames, num_mel_bins)."""
    return mean_normalize(fbank(waveform, sample_rate, num_mel_bins))


def window_and_shift(sample_rate: int) -> tuple[int, int]:
    """Length of a frame and the way to the next, in samples.

    Raises:
        InputError: If the rate is under 100 Hz.
    """
    if sample_rate < 1000 / FRAME_SHIFT_MS:
        raise InputError(f"sample rate {sample_rate} Hz has no sample in a frame shift of {FRAME_SHIFT_MS:g} ms.")
    return int(sample_rate * FRAME_LENGTH_MS / 1000), int(sample_rate * FRAME_SHIFT_MS / 1000)


def _preemphasize(samples: Array) -> Array:
    """Subtract 0.97 of the sample before, (samples,) -> (samples,); the first sample stays."""
    emphasized = np.empty_like(samples)
    emphasized[0] = samples[0]
    np.multiply(samples[:-1], np.float32(-PREEMPHASIS), out=emphasized[1:])
    emphasized[1:] += samples[1:]
    return emphasized


def _power_spectrum(frames: Array) -> Array:
    """Square magnitudes of the real FFT: (frames, size) -> (frames, size / 2 + 1)."""
    parts = scipy.fft.rfft(frames, axis=1).view(np.float32)  # real and imaginary parts in turn
    np.square(parts, out=parts)
    power: Array = parts[:, 0::2] + parts[:, 1::2]
    return power


def fft_size(window: int) -> int:
    """The power of two to which a window is padded with zeros."""
    return 1 << (window - 1).bit_length()


@lru_cache(maxsize=8)
def povey_window(length: int) -> Array:
    """Hann window raised to 0.85, (length,)."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1))
    return (hann**0.85).astype(np.float32)


@lru_cache(maxsize=8)
def mel_matrix(sample_rate: int, num_mel_bins: int) -> Array:
    """Triangular filters on the mel scale, (bins of the FFT, num_mel_bins); the Nyquist bin has no weight."""
    size = fft_size(window_and_shift(sample_rate)[0])

    def mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(1127.0 * np.log1p(hertz / 700.0))

    low, high = mel(np.array([LOW_FREQ_HZ, sample_rate / 2])).tolist()
    edges = np.linspace(low, high, num_mel_bins + 2)
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    bins = mel(np.arange(size // 2) * sample_rate / size)[:, None]
    rising, falling = (bins - left) / (center - left), (right - bins) / (right - center)
    weights = np.maximum(0.0, np.minimum(rising, falling))
    return np.ascontiguousarray(np.vstack([weights, np.zeros((1, num_mel_bins))]), dtype=np.float32)
