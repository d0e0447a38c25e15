import numpy as np
import pytest
from numpy.typing import NDArray

from compress.errors import SettingError
from compress.training.augment import Augmentation
from compress.training.codecs import CODECS, decoded, through_codec


def tone(hertz: float, samples: int = 16000) -> NDArray[np.float32]:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(samples) / 16000)).astype(np.float32)


def level_db(speech: NDArray[np.float32]) -> float:
    """Of the middle, in decibels of the tone's."""
    return float(20 * np.log10(np.std(speech[4000:12000]) / np.std(tone(500)[4000:12000]) + 1e-9))


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_keeps_length_and_low_tones_and_is_the_same_each_time(name: str) -> None:
    for bit_rate in CODECS[name].bit_rates:
        heard = through_codec(tone(500), name, bit_rate)
        assert heard.shape == (16000,)
        assert heard.dtype == np.float32
        assert abs(level_db(heard)) < 1.5
        assert (heard == through_codec(tone(500), name, bit_rate)).all()
        spectrum = np.abs(np.fft.rfft(heard[4000:12000]))
        assert abs(int(spectrum.argmax()) * 2 - 500) <= 2


@pytest.mark.parametrize("name", ["band8k", "mulaw", "alaw", "amr"])
def test_a_telephone_has_no_tones_above_its_band(name: str) -> None:
    assert level_db(through_codec(tone(4600), name)) < -30


@pytest.mark.parametrize("name", ["opus", "mp3"])
def test_a_wide_band_keeps_them(name: str) -> None:
    assert level_db(through_codec(tone(4600), name, 24000)) > -6


def test_mu_law_rounds_on_its_logarithmic_scale() -> None:
    """F(x) = ln(1 + 255 |x|) / ln 256; G.711 approximates it by chords, with 8 bits for sign and value."""
    values = np.arange(-32000, 32000, 40).astype(np.int16)
    heard, rate = decoded(CODECS["mulaw"], values, 0)
    assert rate == 8000
    companded = [np.sign(x) * np.log1p(255 * np.abs(x)) / np.log(256) for x in (values / 32768, heard)]
    assert np.abs(companded[0] - companded[1]).max() < 1.3 / 128
    assert len(np.unique(heard)) > 200


def test_a_law_rounds_on_its_logarithmic_scale() -> None:
    """F(x) = A|x| / (1 + ln A) below 1/A, (1 + ln A|x|) / (1 + ln A) above, with A = 87.6."""
    values = np.arange(-32000, 32000, 40).astype(np.int16)
    heard, _ = decoded(CODECS["alaw"], values, 0)

    def compand(x: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled = 87.6 * np.abs(x)
        found: NDArray[np.float64] = np.sign(x) * np.where(scaled < 1, scaled, 1 + np.log(np.maximum(scaled, 1)))
        return found / (1 + np.log(87.6))

    assert np.abs(compand(values / 32768) - compand(heard.astype(np.float64))).max() < 1.3 / 128


def test_unknown_codecs_are_named() -> None:
    with pytest.raises(SettingError, match=r"unknown codec in the recipe's augmentation 'ulaw'\. Did you mean 'mulaw'"):
        Augmentation(codecs=("ulaw",))
    with pytest.raises(SettingError, match="codecs must hold at least one"):
        Augmentation(codecs=())
