import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.training.augment import Augmentation, at_snr, augment, filtered, random_crop, reverberated

NOTHING = Augmentation(p_filter=0, p_room=0, p_noise=0, p_babble=0)
EVERYTHING = Augmentation(p_filter=1, p_room=1, p_noise=1, p_babble=1)


def speech(seed: int, samples: int = 16000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(samples)).astype(np.float32)


def pcm(seed: int, samples: int = 16000) -> np.ndarray:
    return (speech(seed, samples) * 32768).clip(-32768, 32767).astype(np.int16)


@given(samples=st.integers(1, 40000), length=st.integers(400, 30000), speed=st.sampled_from([0.9, 1.0, 1.1]))
def test_a_crop_has_the_length_asked_for_whatever_the_utterance(samples: int, length: int, speed: float) -> None:
    crop = random_crop(pcm(0, samples), length, speed, np.random.default_rng(1))
    assert crop.shape == (length,)
    assert crop.dtype == np.float32
    assert np.isfinite(crop).all()


@given(seed=st.integers(0, 50), snr=st.floats(-5, 30))
def test_noise_is_added_at_the_asked_ratio(seed: int, snr: float) -> None:
    clean, noise = speech(seed), speech(seed + 1000)
    added = at_snr(clean, noise, snr) - clean
    measured = 10 * np.log10(np.mean(np.square(clean)) / np.mean(np.square(added)))
    assert measured == pytest.approx(snr, abs=0.05)


def test_silent_noise_changes_nothing() -> None:
    assert (at_snr(speech(0), np.zeros(16000, np.float32), 10.0) == speech(0)).all()


@given(seed=st.integers(0, 20))
def test_an_augmented_crop_is_finite_in_range_and_decided_by_its_seed(seed: int) -> None:
    noises, talkers = [pcm(5)], [pcm(6), pcm(7)]
    once, again = (augment(speech(seed), EVERYTHING, noises, talkers, np.random.default_rng(seed)) for _ in range(2))
    assert (once == again).all()
    assert once.shape == (16000,)
    assert np.abs(once).max() < 1.0


def test_without_augmentation_only_the_level_changes() -> None:
    crop = speech(3)
    result = augment(crop, NOTHING, [], [pcm(1)], np.random.default_rng(0))
    ratio = result / crop
    assert ratio == pytest.approx(np.full(16000, ratio[0]), rel=1e-5)


def test_a_room_keeps_the_direct_path_and_adds_a_tail() -> None:
    click = np.zeros(16000, np.float32)
    click[100] = 1.0
    heard = reverberated(click, 0.3, np.random.default_rng(0))
    assert heard[100] == pytest.approx(1.0, abs=1e-3)
    assert np.abs(heard[:100]).max() < 1e-3
    assert np.abs(heard[200:3000]).max() > 1e-3


def test_a_filter_keeps_the_length_and_changes_the_spectrum() -> None:
    result = filtered(speech(0), np.random.default_rng(0))
    assert result.shape == (16000,)
    assert np.abs(result - speech(0)).max() > 1e-3
