import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.training.augment import (
    Augmentation,
    at_snr,
    augment,
    draw_bands,
    draw_changes,
    draw_crop,
    draw_feature_changes,
    draw_filter,
    draw_masks,
    draw_room,
    random_crop,
)
from compress.training.codecs import CODECS

NOTHING = Augmentation(p_filter=0, p_room=0, p_noise=0, p_babble=0)
EVERYTHING = Augmentation(p_filter=1, p_room=1, p_noise=1, p_babble=1, p_codec=1, codecs=tuple(CODECS))


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


@settings(deadline=None)  # five codecs
@given(seed=st.integers(0, 20))
def test_an_augmented_crop_is_finite_in_range_and_decided_by_its_seed(seed: int) -> None:
    noises, talkers = [pcm(5)], [pcm(6), pcm(7)]
    once, again = (augment(speech(seed), EVERYTHING, noises, talkers, np.random.default_rng(seed)) for _ in range(2))
    assert (once == again).all()
    assert once.shape == (16000,)
    assert np.abs(once).max() < 1.5  # a codec may overshoot


def test_without_augmentation_only_the_level_changes() -> None:
    crop = speech(3)
    result = augment(crop, NOTHING, [], [pcm(1)], np.random.default_rng(0))
    ratio = result / crop
    assert ratio == pytest.approx(np.full(16000, ratio[0]), rel=1e-5)


def test_a_room_keeps_the_direct_path_and_adds_a_tail() -> None:
    click = np.zeros(16000, np.float32)
    click[100] = 1.0
    heard = draw_room(0.3, np.random.default_rng(0))(click)
    assert heard[100] == pytest.approx(1.0, abs=1e-3)
    assert np.abs(heard[:100]).max() < 1e-3
    assert np.abs(heard[200:3000]).max() > 1e-3


def test_a_filter_keeps_the_length_and_changes_the_spectrum() -> None:
    result = draw_filter(np.random.default_rng(0))(speech(0))
    assert result.shape == (16000,)
    assert np.abs(result - speech(0)).max() > 1e-3


@settings(deadline=None)
@given(seed=st.integers(0, 30), samples=st.integers(4000, 20000))
def test_drawing_without_computing_leaves_the_generator_where_computing_does(seed: int, samples: int) -> None:
    some = Augmentation(p_codec=0.5, p_bands=0.5, p_masks=0.5)
    one, other = np.random.default_rng(seed), np.random.default_rng(seed)
    augment(random_crop(pcm(0, samples), 8000, 0.9, one), some, [pcm(5)], [pcm(6), pcm(7)], one)
    draw_crop(pcm(0, samples), 8000, 0.9, other)
    draw_changes(8000, some, [pcm(5)], [pcm(6), pcm(7)], other)
    draw_feature_changes(48, 80, some, one)
    draw_feature_changes(48, 80, some, other)
    assert one.random() == other.random()


def test_what_has_no_probability_draws_nothing() -> None:
    """So that a recipe of an older version means the crops that it meant."""
    one, other = np.random.default_rng(0), np.random.default_rng(0)
    draw_changes(8000, NOTHING, [], [pcm(1)], one)
    assert draw_feature_changes(48, 80, NOTHING, one) == []
    other.random(3)  # filter, room, babble
    other.uniform()  # level
    assert one.random() == other.random()


@given(seed=st.integers(0, 50), frames=st.integers(2, 200), masks=st.integers(1, 3))
def test_masks_are_stretches_and_the_rest_stays(seed: int, frames: int, masks: int) -> None:
    strength = Augmentation(p_masks=1, masks=masks)
    features = 1 + np.abs(np.random.default_rng(1).standard_normal((frames, 80))).astype(np.float32)
    masked = draw_masks(frames, 80, strength, np.random.default_rng(seed))(features)
    times, bins = (masked == 0).all(1), (masked == 0).all(0)
    assert times.sum() <= min(10 * masks, frames // 2)
    assert bins.sum() <= 8 * masks
    assert np.abs(np.diff(times.astype(int), prepend=0, append=0)).sum() <= 2 * masks
    assert (masked[~times][:, ~bins] == features[~times][:, ~bins]).all()
    assert (masked[times] == 0).all()
    assert (masked[:, bins] == 0).all()


def test_masks_are_drawn_up_to_their_width() -> None:
    features = np.ones((100, 80), np.float32)
    drawn = [draw_masks(100, 80, Augmentation(), np.random.default_rng(seed))(features) == 0 for seed in range(300)]
    assert {int(mask.all(1).sum()) for mask in drawn} == set(range(11))
    assert {int(mask.all(0).sum()) for mask in drawn} == set(range(9))


@given(seed=st.integers(0, 50), low=st.integers(1, 5), more=st.integers(0, 5))
def test_each_band_has_one_gain_for_the_whole_crop(seed: int, low: int, more: int) -> None:
    strength = Augmentation(bands=(low, low + more), band_db=(-6.0, 6.0))
    features = np.zeros((30, 80), np.float32)
    gains = draw_bands(80, strength, np.random.default_rng(seed))(features)
    assert (gains == gains[0]).all()
    assert low <= 1 + np.count_nonzero(np.diff(gains[0])) <= low + more
    assert np.abs(gains).max() <= 6.0 * np.log(10) / 10 + 1e-6  # decibels of power, in natural logarithms
