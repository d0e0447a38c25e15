"""Telephone bands and lossy codecs, as a crop may have passed through before it is heard."""

from typing import NamedTuple

import av
import av.audio
import numpy as np
import soxr
from numpy.typing import NDArray

from compress.errors import MachineError, SettingError, unknown_name
from compress.features import SAMPLE_RATE

Array = NDArray[np.float32]


class Codec(NamedTuple):
    """A codec of FFmpeg.

    Attributes:
        encoder: FFmpeg's name; empty: the band alone.
        decoder: The same.
        sample_rate: In hertz.
        bit_rates: In bits a second, of which one is drawn; 0: it has only one.
    """

    encoder: str
    decoder: str
    sample_rate: int
    bit_rates: tuple[int, ...] = (0,)


CODECS = {
    "band8k": Codec("", "", 8000),
    "mulaw": Codec("pcm_mulaw", "pcm_mulaw", 8000),  # ITU-T G.711
    "alaw": Codec("pcm_alaw", "pcm_alaw", 8000),
    "amr": Codec("libopencore_amrnb", "libopencore_amrnb", 8000, (4750, 7950, 12200)),
    "opus": Codec("libopus", "libopus", 16000, (8000, 16000, 24000)),
    "mp3": Codec("libmp3lame", "mp3float", 16000, (16000, 24000, 32000)),
}


def check_codecs(names: tuple[str, ...]) -> None:
    """Refuse unknown codecs, and those that this machine's FFmpeg was built without.

    Raises:
        SettingError: Naming the codec.
        MachineError: The same.
    """
    if not names:
        raise SettingError("recipe: augmentation: codecs must hold at least one codec, such as mulaw.")
    for name in names:
        if name not in CODECS:
            raise unknown_name("codec in the recipe's augmentation", name, CODECS)
        try:
            if CODECS[name].encoder:
                av.Codec(CODECS[name].encoder, "w")
                av.Codec(CODECS[name].decoder, "r")
        except av.error.FFmpegError as error:
            raise MachineError(
                f"the installed av was built without the codec {name} ({error}). Take it out of augmentation.codecs."
            ) from error


def through_codec(speech: Array, name: str, bit_rate: int = 0) -> Array:
    """Encode and decode speech (samples,) at 16 kHz; what comes out is as long, and may be some ms late."""
    codec = CODECS[name]
    rate = codec.sample_rate
    samples = soxr.resample(speech, SAMPLE_RATE, rate) if rate != SAMPLE_RATE else speech
    if codec.encoder:
        samples, rate = decoded(codec, np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16), bit_rate)
    heard = np.zeros(len(speech), np.float32)
    found = soxr.resample(samples, rate, SAMPLE_RATE)[: len(speech)] if rate != SAMPLE_RATE else samples[: len(speech)]
    heard[: len(found)] = found
    return heard


def decoded(codec: Codec, pcm: NDArray[np.int16], bit_rate: int) -> tuple[Array, int]:
    """What a decoder makes of what the encoder made of samples at the codec's rate; samples and their rate."""
    encoder = av.CodecContext.create(codec.encoder, "w")
    decoder = av.CodecContext.create(codec.decoder, "r")
    assert isinstance(encoder, av.AudioCodecContext)
    assert isinstance(decoder, av.AudioCodecContext)
    encoder.sample_rate = decoder.sample_rate = codec.sample_rate
    encoder.layout = decoder.layout = "mono"
    encoder.format = (encoder.codec.audio_formats or [av.AudioFormat("s16")])[0]
    if bit_rate:
        encoder.bit_rate = bit_rate
    encoder.open()
    frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
    frame.sample_rate = codec.sample_rate
    cut = av.AudioResampler(encoder.format, "mono", codec.sample_rate, encoder.frame_size or len(pcm))
    packets = [packet for part in (*cut.resample(frame), *cut.resample(None)) for packet in encoder.encode(part)]
    packets += encoder.encode(None)
    frames = [frame for packet in packets for frame in decoder.decode(packet)]
    values = np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])
    scale = 1 / 32768 if values.dtype == np.int16 else 1.0
    return values.astype(np.float32) * np.float32(scale), frames[0].sample_rate
