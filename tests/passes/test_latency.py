"""Latency: the search meets its target with few measurements."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import SettingError
from compress.passes import Context, Prune
from compress.passes.latency import MEASUREMENTS, TOLERANCE, Stopwatch, meet_latency
from compress.passes.planning import macs_counter
from compress.surgery import l1_scores, remove_channels, trace
from compress.surgery.selection import schedule_of


@pytest.fixture(scope="module")
def ladder(small_campplus):
    """A schedule with its counter of multiply-accumulates, and how many of them stay at its positions."""
    import torch

    graph = trace(small_campplus.module, torch.randn(1, 120, 80))
    schedule = schedule_of(graph, l1_scores(small_campplus.module, graph), round_to=1)
    macs = macs_counter(small_campplus, graph)
    return schedule, macs


def removed_macs(ladder, positions) -> float:
    schedule, macs = ladder
    return 1 - macs.count(schedule.removed(positions)) / macs.count(schedule.removed(schedule.start))


@settings(max_examples=30, deadline=None)
@given(ratio=st.floats(0.05, 0.6), bend=st.floats(0.4, 2.5), share=st.floats(0.7, 1.0))
def test_a_smooth_latency_is_met_in_few_measurements(ladder, ratio: float, bend: float, share: float) -> None:
    measured: list[float] = []

    def saved(positions) -> float:
        measured.append(share * removed_macs(ladder, positions) ** bend)
        return measured[-1]

    reachable = share * removed_macs(ladder, ladder[0].end) ** bend
    if reachable < ratio - TOLERANCE:
        with pytest.raises(SettingError, match=r"asked cannot be reached: the smallest widths save 0\.\d+ of"):
            meet_latency(*ladder, ratio, saved, str, "asked")
        return
    level = meet_latency(*ladder, ratio, saved, str, "asked")
    assert abs(level.saved - ratio) <= TOLERANCE
    assert level.saved == pytest.approx(share * removed_macs(ladder, level.positions) ** bend)
    assert len(measured) <= MEASUREMENTS


@settings(max_examples=20, deadline=None)
@given(ratio=st.floats(0.05, 0.6), steps=st.integers(2, 6))
def test_a_latency_in_steps_is_met_as_nearly_as_it_was_measured(ladder, ratio: float, steps: int) -> None:
    measured = [0.0]

    def saved(positions) -> float:
        measured.append(np.floor(removed_macs(ladder, positions) * steps) / steps)
        return measured[-1]

    try:
        level = meet_latency(*ladder, ratio, saved, str, "asked")
    except SettingError:
        assert max(measured) < ratio
        return
    assert len(measured) <= MEASUREMENTS + 1
    assert abs(level.saved - ratio) == min(abs(m - ratio) for m in measured)


def test_nothing_asked_is_nothing_measured(ladder) -> None:
    level = meet_latency(*ladder, 0.0, lambda positions: 1 / 0, str, "asked")
    assert (level.positions == 0).all()


def test_every_measurement_is_told(ladder) -> None:
    said: list[str] = []
    meet_latency(*ladder, 0.3, lambda positions: removed_macs(ladder, positions) ** 2, said.append, "asked")
    assert said[0].startswith("measurement 1: ")
    assert "fewer multiply-accumulates save" in said[0]


def test_the_stopwatch_times_both_networks(tiny, noise) -> None:
    """How much is saved is not asserted: timing is not for a shared machine."""
    import torch

    graph = trace(tiny.module, torch.randn(1, 120, 16))
    small = remove_channels(tiny.module, graph, {"first": range(46)})
    stopwatch = Stopwatch(tiny.module, np.resize(noise(1, 16)[0], (300, 16)))
    assert -np.inf < stopwatch.saved(small) < 1
    assert stopwatch.dense_ms > 0


def test_the_pass_saves_the_latency_that_was_asked(tiny, tiny_context: Context, monkeypatch) -> None:
    """By a stopwatch that goes by the parameters: timing itself is not for a shared machine."""
    monkeypatch.setattr(Stopwatch, "__init__", lambda self, dense, features: setattr(self, "dense_ms", 2.0))
    monkeypatch.setattr(
        Stopwatch, "saved", lambda self, model: 1 - sum(p.numel() for p in model.parameters()) / tiny.params
    )
    result = Prune(latency_ratio=0.3, round_to=1, bn_utterances=0).run(tiny, tiny_context)
    assert abs(result.params / tiny.params - 0.7) <= 0.01
    saved = 1 - result.params / tiny.params
    assert result.history[-1].notes[0] == (
        f"saved {saved:.1%} of the latency (asked 30.0%): 2.0 to {2 * (1 - saved):.1f} ms for 3 s of audio,"
        " ONNX Runtime, one thread"
    )
    with pytest.raises(SettingError, match=r"prune\.latency_ratio 0\.99 cannot be reached: the smallest widths"):
        Prune(latency_ratio=0.99, bn_utterances=0).run(tiny, tiny_context)
