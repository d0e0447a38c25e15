"""Reading audio files: any common format, any sample rate, mixed down to mono."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile  # type: ignore[import-untyped]
import soxr
from numpy.typing import NDArray

from compress.errors import InputError

Array = NDArray[np.float32]

AV_SUFFIXES = frozenset({".m4a", ".mp4", ".aac"})  # AAC, which libsndfile does not decode
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"}) | AV_SUFFIXES
READABLE = "Readable are WAV, FLAC, Ogg Opus or Vorbis, MP3 and M4A."

UNKNOWN_LENGTH = 2**63 - 1  # libsndfile, of a FLAC file that was written to a pipe: it cannot read those
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1000, 768_000  # outside of it a header is wrong, not the recording unusual


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says."""

    sample_rate: int
    channels: int
    num_samples: int  # per channel

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.num_samples / self.sample_rate


def read_audio(path: Path | str, sample_rate: int) -> Array:
    """Read an audio file as a mono waveform at the wanted sample rate.

    Args:
        path: WAV, FLAC, Ogg Opus or Vorbis, MP3 or M4A.
        sample_rate: In hertz; the file is resampled to it where its own differs.

    Returns:
        (samples,) float32, nominally in [-1, 1).

    Raises:
        InputError: If the file is missing, truncated, cannot be decoded, or :func:`check_waveform` refuses it.
    """
    path = Path(path)
    samples, own_rate = decode(path)
    waveform = mix_down(samples)
    check_waveform(waveform, str(path))
    return resample(waveform, own_rate, sample_rate)


def decode(path: Path) -> tuple[Array, int]:
    """Decode a file to (samples, channels) float32 and its sample rate in hertz.

    Raises:
        InputError: If the file is missing, empty, truncated, not decodable audio, or of an impossible sample rate.
    """
    _check_file(path)
    if _is_aac(path):
        return _decode_av(path)
    with _open_sound(path) as file:
        if file.frames == UNKNOWN_LENGTH:
            return _decode_av(path)
        samples = file.read(dtype="float32", always_2d=True)
        if len(samples) < file.frames and file.format != "MP3":  # without an index, MP3's length is a guess
            raise _truncated(path, f"its header promises {file.frames} samples and {len(samples)} are there")
        return samples, file.samplerate


def probe(path: Path) -> AudioInfo:
    """Read what the header of a file says; its samples are decoded only where the header lacks their number.

    Raises:
        InputError: If the file is missing, empty, visibly truncated, not audio, or of an impossible sample rate.
    """
    _check_file(path)
    if not _is_aac(path):
        with _open_sound(path) as file:
            if file.frames != UNKNOWN_LENGTH:
                return AudioInfo(file.samplerate, file.channels, file.frames)
    samples, rate = _decode_av(path)  # only decoding tells the length
    return AudioInfo(rate, samples.shape[1], len(samples))


def mix_down(samples: Array) -> Array:
    """Average the channels: (samples, channels) -> (samples,)."""
    mixed: Array = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]
    return mixed


def resample(waveform: Array, from_rate: int, to_rate: int) -> Array:
    """Resample (samples,) from one rate to another, both in hertz; the same rate returns the input."""
    if from_rate == to_rate:
        return waveform
    result: Array = soxr.resample(waveform, from_rate, to_rate).astype(np.float32, copy=False)
    return result


def check_waveform(waveform: Array, name: str) -> None:
    """Refuse a waveform that no model can use.

    Raises:
        InputError: If it has no samples, holds NaN or infinite values, or is digital silence throughout.
    """
    if waveform.ndim != 1:
        raise InputError(f"{name}: a waveform has one axis (samples,), got shape {waveform.shape}.")
    if len(waveform) == 0:
        raise InputError(f"{name} holds no samples.")
    if not np.isfinite(waveform).all():
        raise InputError(f"{name} holds NaN or infinite samples. Decode or record it again.")
    if not waveform.any():
        raise InputError(f"{name} is digital silence throughout: no speaker can be heard in it.")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such audio file.")
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path} is an empty file (0 bytes); audio was expected.")
    with path.open("rb") as file:
        magic = file.read(4)
        missing = 0
        if magic in (b"RIFF", b"RF64"):
            rate, missing = _read_wav_header(file, size)
            _check_rate(path, rate)  # libsndfile says only "incomplete" of a rate of 0
        elif magic == b"OggS":
            missing = _missing_ogg_bytes(file, size)
        elif magic[:3] == b"ID3" or magic[:1] == b"\xff":
            missing = _missing_mp3_bytes(file, size)
    if missing > 0:
        raise _truncated(path, f"its last {missing} bytes are missing")


def _truncated(path: Path, how: str) -> InputError:
    return InputError(f"{path} is truncated: {how}. Copy or download it again.")


def _read_wav_header(file: BinaryIO, size: int) -> tuple[int, int]:
    """Read a WAV file's sample rate and the bytes its data chunk lacks; libsndfile reads short files silently."""
    rate, position, wide_length = MIN_SAMPLE_RATE, 12, 0
    while position + 8 <= size:
        file.seek(position)
        name, length = file.read(4), int.from_bytes(file.read(4), "little")
        if name == b"fmt ":
            rate = int.from_bytes(file.read(8)[4:], "little")
        elif name == b"ds64":  # RF64 keeps the 64-bit length here
            wide_length = int.from_bytes(file.read(16)[8:], "little")
        elif name == b"data":
            if length == 0xFFFFFFFF and wide_length:
                length = wide_length
            elif length >= 0x7FFFF000:  # written to a pipe: the writer did not know
                length = 0
            missing = position + 8 + length - size
            return rate, missing if missing > 64 else 0  # some writers count the header in
        position += 8 + length + length % 2
    return rate, 0


def _missing_ogg_bytes(file: BinaryIO, size: int) -> int:
    """Count the bytes by which the last Ogg page is cut; a page is at most 65,307 bytes (RFC 3533, section 6)."""
    file.seek(max(0, size - 65307))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27:
        return 27 - len(page)
    lacing = page[27 : 27 + page[26]]
    return max(0, 27 + page[26] + sum(lacing) - len(page))


def _missing_mp3_bytes(file: BinaryIO, size: int) -> int:
    """Count the bytes by which an MP3 file is shorter than its Xing or Info tag says, where it has one."""
    file.seek(0)
    start = file.read(10)
    first_frame = 0
    if start[:3] == b"ID3":  # an ID3v2 tag lies before; its size has 7 bits a byte
        first_frame = 10 + sum(byte << shift for byte, shift in zip(start[6:10], (21, 14, 7, 0), strict=True))
    file.seek(first_frame)
    frame = file.read(64)
    tag = max(frame.find(b"Xing"), frame.find(b"Info"))
    if tag < 0:
        return 0
    if len(frame) < tag + 16:  # cut inside the tag
        return tag + 16 - len(frame)
    if not frame[tag + 7] & 2:  # the tag does not count bytes
        return 0
    field = tag + 8 + 4 * (frame[tag + 7] & 1)  # the count of frames comes before, if it is there
    return first_frame + int.from_bytes(frame[field : field + 4], "big") - size


def _is_aac(path: Path) -> bool:
    if path.suffix.lower() in AV_SUFFIXES:
        return True
    with path.open("rb") as file:
        return file.read(8)[4:] == b"ftyp"  # an MP4 container under another name


@contextmanager
def _open_sound(path: Path) -> Iterator[soundfile.SoundFile]:
    try:
        with soundfile.SoundFile(path) as file:
            _check_rate(path, file.samplerate)
            yield file
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path} cannot be decoded ({error.error_string.rstrip('.')}). {READABLE}") from error
    except MemoryError as error:
        raise InputError(f"{path}: its header promises more samples than fit in memory. Is it damaged?") from error


def _check_rate(path: Path, rate: int) -> None:
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        raise InputError(
            f"{path}: its header gives a sample rate of {rate} Hz; possible are {MIN_SAMPLE_RATE} to "
            f"{MAX_SAMPLE_RATE} Hz. Mend the header or convert the file again."
        )


def _decode_av(path: Path) -> tuple[Array, int]:
    import av

    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = container.streams.audio[0]
            resampler = av.AudioResampler(format="fltp")
            frames = [out for frame in container.decode(stream) for out in resampler.resample(frame)]
            # An MP4 index knows the length, without the padding of the last packet; a bare AAC stream has no index.
            indexed = stream.frames > 0 and stream.duration is not None and stream.time_base is not None
            promised_s = float(stream.duration * stream.time_base) if indexed else None  # type: ignore[operator]
    except (av.FFmpegError, IndexError) as error:
        reason = getattr(error, "strerror", None) or "no audio stream"
        raise InputError(f"{path} cannot be decoded ({reason}); it may be truncated. {READABLE}") from error
    if not frames:
        raise InputError(f"{path} holds no samples.")
    rate = frames[0].sample_rate  # of the decoder: with HE-AAC the container may say half of it
    _check_rate(path, rate)
    samples = np.concatenate([frame.to_ndarray() for frame in frames], axis=1).T
    if promised_s is not None:
        promised = round(promised_s * rate)
        if len(samples) < promised - 4096:  # encoder delay and padding: at most two packets of 2048
            raise _truncated(path, f"its header promises {promised} samples and {len(samples)} are there")
        samples = samples[:promised]
    return np.ascontiguousarray(samples, dtype=np.float32), rate
