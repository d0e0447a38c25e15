"""Reading audio: every format, rate and channel count; what is refused and in which words."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compress.audio import (
    Array,
    check_waveform,
    decode,
    mix_down,
    probe,
    read_audio,
    resample,
)
from compress.errors import InputError

TONE_HZ = 440.0
RATES = (8000, 11025, 16000, 22050, 24000, 44100, 48000)
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)

SNDFILE = {
    "wav-8": ("wav", "WAV", "PCM_U8"),
    "wav-16": ("wav", "WAV", "PCM_16"),
    "wav-24": ("wav", "WAV", "PCM_24"),
    "wav-32": ("wav", "WAV", "PCM_32"),
    "wav-float": ("wav", "WAV", "FLOAT"),
    "wavex": ("wav", "WAVEX", "PCM_16"),
    "rf64": ("wav", "RF64", "PCM_16"),
    "flac": ("flac", "FLAC", "PCM_16"),
    "opus": ("opus", "OGG", "OPUS"),
    "vorbis": ("ogg", "OGG", "VORBIS"),
    "mp3": ("mp3", "MP3", "MPEG_LAYER_III"),
}
LOSSLESS = {"wav-16": 2**-15, "wav-24": 2**-23, "wav-32": 2**-24, "wav-float": 0.0, "flac": 2**-15}
FORMATS = (*SNDFILE, "m4a")


def tone(rate: int, duration_s: float = 1.0, channels: int = 2) -> Array:
    """A 440 Hz tone, quieter from channel to channel: (samples, channels)."""
    wave = np.sin(2 * np.pi * TONE_HZ * np.arange(round(rate * duration_s)) / rate)
    return np.asarray(wave[:, None] * 0.5 / (1 + np.arange(channels)), dtype=np.float32)


def encode(folder: Path, name: str, samples: Array, rate: int, faststart: bool = False) -> Path:
    if name == "m4a":
        return encode_m4a(folder / "audio.m4a", samples, rate, faststart)
    suffix, container, subtype = SNDFILE[name]
    path = folder / f"audio.{suffix}"
    soundfile.write(path, samples, rate, format=container, subtype=subtype)
    return path


def encode_m4a(path: Path, samples: Array, rate: int, faststart: bool) -> Path:
    import av

    layout = "mono" if samples.shape[1] == 1 else "stereo"
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream("aac", rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        frame.sample_rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return path


def loudest_hz(waveform: Array, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(spectrum.argmax() * rate / len(waveform))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_rate_reads_as_mono_at_the_wanted_rate(tmp_path: Path, name: str, channels: int) -> None:
    for rate in OPUS_RATES if name == "opus" else RATES:
        path = encode(tmp_path, name, tone(rate, channels=channels), rate)
        waveform = read_audio(path, 16000)
        assert waveform.dtype == np.float32
        assert waveform.ndim == 1
        slack = 4200 * 16000 / rate if name == "m4a" else 1  # AAC pads whole packets, with a delay before
        assert abs(len(waveform) - 16000) <= slack
        assert abs(loudest_hz(waveform, 16000) - TONE_HZ) < 3
        middle = waveform[6000:12000]
        level = 0.5 if channels == 1 else 0.375  # the mean of 0.5 and 0.25
        assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(level, rel=0.08)


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_give_the_samples_back(tmp_path: Path, name: str) -> None:
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, (3000, 2)).astype(np.float32)
    decoded, rate = decode(encode(tmp_path, name, samples, 22050))
    assert rate == 22050
    np.testing.assert_allclose(decoded, samples, rtol=0, atol=LOSSLESS[name])


@pytest.mark.parametrize("name", FORMATS)
def test_probe_agrees_with_decoding(tmp_path: Path, name: str) -> None:
    path = encode(tmp_path, name, tone(16000), 16000)
    samples, rate = decode(path)
    info = probe(path)
    assert (info.sample_rate, info.channels, info.num_samples) == (rate, 2, len(samples))
    assert info.duration_s == len(samples) / rate


def test_mp4_container_is_known_by_its_content(tmp_path: Path) -> None:
    path = encode(tmp_path, "m4a", tone(16000), 16000).rename(tmp_path / "audio.wav")
    assert abs(loudest_hz(read_audio(path, 16000), 16000) - TONE_HZ) < 3


@given(from_rate=st.sampled_from(RATES), to_rate=st.sampled_from(RATES), num_samples=st.integers(1, 30_000))
@settings(max_examples=60, deadline=None)
def test_resampling_keeps_the_duration(from_rate: int, to_rate: int, num_samples: int) -> None:
    result = resample(np.ones(num_samples, dtype=np.float32), from_rate, to_rate)
    assert result.dtype == np.float32
    assert abs(len(result) - num_samples * to_rate / from_rate) <= 1


@given(
    rate=st.integers(4000, 96_000), channels=st.integers(1, 6), wanted=st.sampled_from(RATES), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_any_rate_and_channel_count_is_the_resampled_mean_of_its_channels(
    tmp_path_factory: pytest.TempPathFactory, rate: int, channels: int, wanted: int, seed: int
) -> None:
    samples = np.random.default_rng(seed).uniform(-1, 1, (rate // 4, channels)).astype(np.float32)
    path = tmp_path_factory.mktemp("audio") / "any.wav"
    soundfile.write(path, samples, rate, subtype="FLOAT")
    expected = resample(samples.astype(np.float64).mean(axis=1).astype(np.float32), rate, wanted)
    np.testing.assert_allclose(read_audio(path, wanted), expected, atol=1e-5)


def test_the_wanted_rate_is_read_bit_by_bit(tmp_path: Path) -> None:
    samples = tone(16000, channels=1)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 16000), mix_down(samples))


def test_resampling_keeps_level_and_pitch() -> None:
    waveform = resample(mix_down(tone(48000, channels=1)), 48000, 16000)
    assert abs(loudest_hz(waveform, 16000) - TONE_HZ) < 2
    assert np.abs(waveform[2000:-2000]).max() == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.4, 0.95])
def test_truncated_files_are_refused(tmp_path: Path, name: str, share: float) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (32000, 2)).astype(np.float32)
    path = encode(tmp_path, name, noise, 16000)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"truncated|cannot be decoded|no samples"):
        read_audio(path, 16000)


def test_truncated_m4a_with_its_index_first_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (32000, 2)).astype(np.float32)
    path = encode(tmp_path, "m4a", noise, 16000, faststart=True)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(InputError, match="truncated"):
        read_audio(path, 16000)


@pytest.mark.parametrize("name", FORMATS)
def test_files_cut_within_their_header_are_refused(tmp_path: Path, name: str) -> None:
    path = encode(tmp_path, name, tone(16000, 0.2), 16000)
    whole = path.read_bytes()
    for length in range(1, 90):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            read_audio(path, 16000)


def test_truncated_text_says_how_much_is_missing(tmp_path: Path) -> None:
    path = encode(tmp_path, "wav-16", tone(16000), 16000)
    path.write_bytes(path.read_bytes()[:-1000])
    expected = r"audio\.wav is truncated: its last 1000 bytes are missing\. Copy or download it again\."
    for reader in (decode, probe):
        with pytest.raises(InputError, match=expected):
            reader(path)


@given(name=st.sampled_from(("wav-16", "rf64", "flac", "opus", "mp3", "m4a")), data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_files_give_samples_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    path = encode(tmp_path_factory.mktemp("damaged"), name, tone(16000, 0.3), 16000)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        waveform = read_audio(path, 16000)
    except InputError:
        return
    assert waveform.ndim == 1


def test_files_written_to_a_pipe_are_read_to_their_end(tmp_path: Path) -> None:
    path = encode(tmp_path, "wav-16", tone(16000), 16000)
    content = bytearray(path.read_bytes())
    content[40:44] = b"\xff" * 4  # the length of the data chunk, which the writer did not know
    path.write_bytes(content)
    assert len(read_audio(path, 16000)) == 16000


def test_flac_of_unknown_length_is_read_to_its_end(tmp_path: Path) -> None:
    path = encode(tmp_path, "flac", tone(16000), 16000)
    expected, _ = decode(path)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # STREAMINFO: 36 bits for the number of samples; 0 is unknown
    content[22:26] = bytes(4)
    path.write_bytes(content)
    np.testing.assert_allclose(decode(path)[0], expected, atol=2**-15)
    assert probe(path).num_samples == 16000


@pytest.mark.parametrize("rate", [0, 1, 999, 2**32 - 1])
def test_impossible_sample_rate_in_the_header_is_named(tmp_path: Path, rate: int) -> None:
    path = encode(tmp_path, "wav-16", tone(16000), 16000)
    content = bytearray(path.read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(content)
    for reader in (decode, probe):
        with pytest.raises(InputError, match=rf"audio\.wav: its header gives a sample rate of {rate} Hz; possible are"):
            reader(path)


@pytest.mark.parametrize("suffix", ["wav", "flac", "opus", "mp3", "m4a"])
def test_what_is_not_audio_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"notes.{suffix}"
    path.write_text("not audio, but a shopping list\n" * 40)
    with pytest.raises(InputError, match=rf"notes\.{suffix} cannot be decoded \(.+\).* Readable are WAV, FLAC"):
        read_audio(path, 16000)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    with pytest.raises(InputError, match=r"empty\.wav is an empty file \(0 bytes\); audio was expected\."):
        read_audio(tmp_path / "empty.wav", 16000)
    with pytest.raises(InputError, match=r"gone\.wav: no such audio file\."):
        read_audio(tmp_path / "gone.wav", 16000)
    with pytest.raises(InputError, match="no such audio file"):
        read_audio(tmp_path, 16000)


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        (np.empty((0, 1)), r"bad\.wav holds no samples\."),
        (np.zeros((800, 2)), r"bad\.wav is digital silence throughout: no speaker can be heard in it\."),
        (np.array([[0.1], [np.nan], [0.2]]), r"bad\.wav holds NaN or infinite samples\. Decode or record it again\."),
        (np.array([[0.1], [np.inf], [0.2]]), r"bad\.wav holds NaN or infinite samples\."),
        (np.array([[0.5, -0.5]] * 800), r"bad\.wav is digital silence throughout"),
    ],
    ids=["zero-length", "silence", "nan", "inf", "channels that cancel"],
)
def test_unusable_samples_are_refused(tmp_path: Path, samples: NDArray[np.float64], text: str) -> None:
    soundfile.write(tmp_path / "bad.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(InputError, match=text):
        read_audio(tmp_path / "bad.wav", 16000)


def test_a_waveform_has_one_axis() -> None:
    with pytest.raises(InputError, match=r"input: a waveform has one axis \(samples,\), got shape \(2, 100\)\."):
        check_waveform(np.ones((2, 100), dtype=np.float32), "input")
