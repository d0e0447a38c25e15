"""Calibration utterances of all durations and levels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.calibration import choose_utterances, level_db
from compress.errors import InputError

lists = st.lists(st.tuples(st.floats(0.5, 30), st.floats(-60, 0)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(utterances=lists, seed=st.integers(0, 99), data=st.data())
def test_as_many_different_ones_as_wanted(utterances: list[tuple[float, float]], seed: int, data) -> None:
    wanted = data.draw(st.integers(1, len(utterances)))
    durations, levels = zip(*utterances, strict=True)
    chosen = choose_utterances(durations, levels, wanted, seed)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == wanted
    assert set(chosen) <= set(range(len(utterances)))
    assert chosen == choose_utterances(durations, levels, wanted, seed)


@settings(max_examples=60, deadline=None)
@given(utterances=lists, seed=st.integers(0, 99), random=st.randoms())
def test_order_of_the_list_does_not_matter(utterances: list[tuple[float, float]], seed: int, random) -> None:
    shuffled = list(utterances)
    random.shuffle(shuffled)
    wanted = (len(utterances) + 1) // 2
    one, other = (
        sorted(listed[i] for i in choose_utterances(*zip(*listed, strict=True), wanted, seed))
        for listed in (utterances, shuffled)
    )
    assert one == other


@pytest.mark.parametrize("seed", range(5))
def test_all_durations_and_levels_are_covered(seed: int) -> None:
    rng = np.random.default_rng(seed)
    durations, levels = rng.lognormal(1, 0.5, 2000), rng.normal(-25, 6, 2000)
    chosen = choose_utterances(durations, levels, 64, seed)
    duration_ranks, level_ranks = (np.argsort(np.argsort(values))[chosen] / 2000 for values in (durations, levels))
    cells = np.histogram2d(duration_ranks, level_ranks, bins=4, range=((0, 1), (0, 1)))[0]
    assert cells.min() >= 1  # 4 expected in each; chance alone leaves one of 16 empty in every fourth choice
    assert np.histogram(duration_ranks, bins=8, range=(0, 1))[0].tolist() == [8] * 8


def test_seeds_choose_differently_and_each_utterance_is_as_likely() -> None:
    rng = np.random.default_rng(0)
    durations, levels = rng.uniform(1, 9, 20), rng.uniform(-40, -10, 20)
    times = np.bincount(
        np.concatenate([choose_utterances(durations, levels, 4, seed) for seed in range(2000)]), minlength=20
    )
    assert times.min() > 300
    assert times.max() < 500  # 400 expected, with a deviation of 18


@pytest.mark.parametrize("wanted", [0, -1, 4])
def test_more_than_there_are_is_told(wanted: int) -> None:
    with pytest.raises(
        InputError, match=rf"{wanted} calibration utterances were asked for; 1 to 3 can be chosen from the list\."
    ):
        choose_utterances([1.0, 2.0, 3.0], [-20.0, -20.0, -20.0], wanted, 0)


def test_level_is_the_root_mean_square_in_decibels() -> None:
    sine = np.sin(2 * np.pi * np.arange(16000) / 160).astype(np.float32)
    assert level_db(sine) == pytest.approx(-3.01, abs=0.01)
    assert level_db(sine / 10) == pytest.approx(-23.01, abs=0.01)
    assert level_db(np.zeros(100, np.float32)) == -200
