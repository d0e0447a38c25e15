import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.features import fbank, fbank_cmn
from compress.progress import Silent
from compress.training.crops import cut_crops, hold_out


@pytest.mark.parametrize("cmn", [True, False])
def test_a_crop_is_what_the_network_would_get_of_the_cut_waveform(cmn: bool) -> None:
    compute = fbank_cmn if cmn else fbank
    waveform = np.random.default_rng(0).standard_normal(16000).astype(np.float32) / 10
    crops, _ = cut_crops([lambda: compute(waveform)], 5, 40, cmn, np.random.default_rng(1), Silent())
    starts = np.random.default_rng(1)
    starts.permutation(1)  # the order of utterances was drawn before
    for crop, start in zip(crops.numpy(), starts.integers(98 - 40 + 1, size=5), strict=True):
        cut = waveform[start * 160 : start * 160 + 400 + 39 * 160]
        # Pre-emphasis looks one sample back, which the first frame of a cut waveform has not.
        assert crop[1:] == pytest.approx(compute(cut)[1:], abs=0.02 if cmn else 1e-4)


@given(count=st.integers(1, 40), utterances=st.integers(1, 15))
def test_utterances_are_read_once_and_give_as_many_as_any_other(count: int, utterances: int) -> None:
    read: list[int] = []
    features = np.ones((30, 4), np.float32)
    sources = [lambda i=i: (read.append(i), features * i)[1] for i in range(utterances)]
    crops, places = cut_crops(sources, count, 20, False, np.random.default_rng(0), Silent())
    assert crops.shape == (count, 20, 4)
    assert crops[:, 0, 0].tolist() == places
    assert sorted(set(places)) == sorted(read)
    assert len(read) == min(count, utterances)
    shares = [places.count(place) for place in set(places)]
    assert max(shares) - min(shares) <= 1


def test_a_short_utterance_is_repeated() -> None:
    ramp = np.arange(7, dtype=np.float32)[:, None]
    crops, _ = cut_crops([lambda: ramp], 1, 10, False, np.random.default_rng(0), Silent())
    assert crops[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]


@given(speakers=st.lists(st.sampled_from("abcdefghij"), min_size=8, max_size=60), seed=st.integers(0, 20))
def test_what_is_held_out_is_learned_from_by_nobody(speakers: list[str], seed: int) -> None:
    learned, held = hold_out(speakers, 2, np.random.default_rng(seed))
    assert sorted(learned + held) == list(range(len(speakers)))
    assert len(held) >= 2
    assert len(held) <= max(2, len(speakers) // 4)
    if len(held) > 2:
        assert not {speakers[i] for i in held} & {speakers[i] for i in learned}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("other", [1, 2, 12])
def test_two_speakers_are_left_to_tell_apart(seed: int, other: int) -> None:
    speakers = ["a"] * 100 + ["b"] * other
    learned, held = hold_out(speakers, 11, np.random.default_rng(seed))
    assert {speakers[i] for i in learned} == {"a", "b"}
    assert len(held) == 11
    assert sorted(learned + held) == list(range(len(speakers)))


def test_whole_speakers_are_held_out_where_they_are_known() -> None:
    speakers: list[str | None] = [f"s{i // 5}" for i in range(100)]
    learned, held = hold_out(speakers, 7, np.random.default_rng(0))
    assert len(held) == 10
    assert len({speakers[i] for i in held}) == 2
    assert not {speakers[i] for i in held} & {speakers[i] for i in learned}
    assert len(hold_out([*speakers[:-1], None], 7, np.random.default_rng(0))[1]) == 7
