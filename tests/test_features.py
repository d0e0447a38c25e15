"""The Fbank front end: equal to references, and what holds for every waveform."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compress.errors import InputError
from compress.features import (
    BLOCK_FRAMES,
    LOG_FLOOR,
    Array,
    fbank,
    fbank_cmn,
    mean_normalize,
    num_frames,
)

REFERENCES = ("000010168", "022360321", "030830102", "096090003")
seeds = st.integers(0, 99)


def noise(num_samples: int, seed: int = 0, level: float = 0.1) -> Array:
    return (level * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def plain_fbank(waveform: Array, sample_rate: int, num_mel_bins: int) -> NDArray[np.float64]:
    """Kaldi's definition, frame by frame and filter by filter in float64."""
    window, shift = sample_rate * 25 // 1000, sample_rate // 100
    fft_size = 2 ** int(np.ceil(np.log2(window)))
    povey = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / (window - 1))) ** 0.85
    mel_of_bins = 1127 * np.log(1 + np.arange(fft_size // 2 + 1) * sample_rate / fft_size / 700)
    low, high = (1127 * np.log(1 + hertz / 700) for hertz in (20, sample_rate / 2))
    step = (high - low) / (num_mel_bins + 1)
    rows = []
    for start in range(0, len(waveform) - window + 1, shift):
        frame = waveform[start : start + window].astype(np.float64)
        frame -= frame.mean()
        frame = (frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])) * povey
        power = np.abs(np.fft.rfft(frame, fft_size)) ** 2
        centers = low + step * np.arange(1, num_mel_bins + 1)
        filters = np.maximum(0, 1 - np.abs(mel_of_bins[None] - centers[:, None]) / step)
        rows.append(np.log(np.maximum(filters @ power, LOG_FLOOR)))
    return np.array(rows)


@pytest.mark.parametrize("utterance", REFERENCES)
def test_equals_the_reference_on_real_speech(bench_data: Path, utterance: str) -> None:
    folder = bench_data / "reference" / "fbank"
    waveform, sample_rate = soundfile.read(folder / f"{utterance}.flac", dtype="float32")
    with np.load(folder / f"{utterance}.npz") as reference:
        assert sample_rate == reference["sample_rate"]
        for name, own in (("fbank", fbank(waveform)), ("fbank_cmn", fbank_cmn(waveform))):
            difference = np.abs(own - reference[name])
            assert difference.max() <= 1e-3, name
            assert difference.mean() <= 5e-5, name


@pytest.mark.parametrize(("sample_rate", "num_mel_bins"), [(16000, 80), (16000, 40), (8000, 40), (44100, 80)])
def test_equals_the_definition_in_float64(sample_rate: int, num_mel_bins: int) -> None:
    waveform = noise(sample_rate)
    expected = plain_fbank(waveform, sample_rate, num_mel_bins)
    np.testing.assert_allclose(fbank(waveform, sample_rate, num_mel_bins), expected, atol=1e-3)


def test_equals_kaldi_native_fbank() -> None:
    knf = pytest.importorskip("kaldi_native_fbank")
    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = 80
    waveform = noise(48000)
    extractor = knf.OnlineFbank(options)
    extractor.accept_waveform(16000, waveform.tolist())
    extractor.input_finished()
    expected = np.stack([extractor.get_frame(i) for i in range(extractor.num_frames_ready)])
    np.testing.assert_allclose(fbank(waveform), expected, atol=1e-3)


@given(num_samples=st.integers(1200, 40_000), sample_rate=st.sampled_from((8000, 16000, 22050, 44100, 48000)))
@settings(deadline=None, max_examples=60)
def test_num_frames_is_the_length_of_the_fbank(num_samples: int, sample_rate: int) -> None:
    features = fbank(noise(num_samples), sample_rate)
    assert features.shape == (num_frames(num_samples, sample_rate), 80)
    assert features.dtype == np.float32


@given(first=st.integers(0, 2 * BLOCK_FRAMES), count=st.integers(1, 2 * BLOCK_FRAMES), seed=seeds)
@settings(deadline=None, max_examples=40)
def test_a_frame_depends_on_its_window_alone(first: int, count: int, seed: int) -> None:
    waveform = noise(160 * 4 * BLOCK_FRAMES + 240, seed)
    alone = fbank(waveform[160 * first : 160 * (first + count) + 240])
    np.testing.assert_allclose(alone, fbank(waveform)[first : first + count], atol=1e-3)


@given(gain=st.floats(0.25, 8), seed=seeds)
@settings(deadline=None, max_examples=40)
def test_a_gain_adds_a_constant_which_cmn_removes(gain: float, seed: int) -> None:
    waveform = noise(16000, seed)
    louder = waveform * np.float32(gain)
    floor = np.log(LOG_FLOOR) + 1
    assume(min(fbank(waveform).min(), fbank(louder).min()) > floor)  # values on the floor do not follow the gain
    tolerance = 1e-2  # a band that all but cancels in one frame has few digits left in float32
    np.testing.assert_allclose(fbank(louder), fbank(waveform) + 2 * np.log(gain), atol=tolerance)
    np.testing.assert_allclose(fbank_cmn(louder), fbank_cmn(waveform), atol=tolerance)
    assert np.abs(fbank_cmn(louder) - fbank_cmn(waveform)).mean() < 1e-5


@given(offset=st.floats(-0.5, 0.5), seed=seeds)
@settings(deadline=None, max_examples=40)
def test_a_constant_offset_changes_nothing(offset: float, seed: int) -> None:
    waveform = noise(8000, seed)
    np.testing.assert_allclose(fbank(waveform + np.float32(offset)), fbank(waveform), atol=1e-2)


@given(num_samples=st.integers(400, 30_000), seed=seeds, level=st.floats(1e-4, 0.5))
@settings(deadline=None, max_examples=40)
def test_cmn_leaves_no_mean_over_time(num_samples: int, seed: int, level: float) -> None:
    mean = fbank_cmn(noise(num_samples, seed, level)).mean(axis=0, dtype=np.float64)
    assert np.abs(mean).max() < 1e-5


def test_cmn_of_an_hour_leaves_no_mean_either() -> None:
    features = np.full((360_000, 2), -11.3, dtype=np.float32) + noise(720_000).reshape(-1, 2)
    assert np.abs(mean_normalize(features).mean(axis=0, dtype=np.float64)).max() < 1e-6


def test_digital_silence_lies_on_the_floor() -> None:
    np.testing.assert_array_equal(fbank(np.zeros(800, dtype=np.float32)), np.float32(np.log(np.float32(LOG_FLOOR))))


def test_the_waveform_is_left_alone() -> None:
    waveform = noise(4000)
    before = waveform.copy()
    fbank_cmn(waveform)
    np.testing.assert_array_equal(waveform, before)


@pytest.mark.parametrize("num_samples", [0, 1, 399])
def test_too_short_a_waveform_names_both_lengths(num_samples: int) -> None:
    with pytest.raises(InputError, match=rf"waveform has {num_samples} samples; one Fbank frame needs 400\."):
        fbank(np.zeros(num_samples, dtype=np.float32))


def test_one_window_is_one_frame() -> None:
    assert num_frames(400) == 1
    assert num_frames(559) == 1
    assert num_frames(560) == 2


def test_a_sample_rate_without_a_sample_a_shift_is_refused() -> None:
    with pytest.raises(InputError, match="sample rate 50 Hz has no sample in a frame shift of 10 ms"):
        num_frames(1000, sample_rate=50)
