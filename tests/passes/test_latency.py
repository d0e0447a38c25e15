"""Latency: the search meets its target with few measurements."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.artifact import Artifact, FrontEnd, Step
from compress.errors import SettingError
from compress.passes import Context, Prune
from compress.passes.latency import MEASUREMENTS, TOLERANCE, Stopwatch, meet_latency, whole_course
from compress.passes.planning import macs_counter
from compress.surgery import Sensitivity, l1_scores, remove_channels, trace
from compress.surgery.selection import schedule_of
from compress.surgery.sensitivity import write_sensitivity


@pytest.fixture(scope="module")
def ladder(small_campplus):
    """A schedule with its counter of multiply-accumulates, and how many of them stay at its positions."""
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
            meet_latency(whole_course(*ladder), ratio, saved, str, "asked")
        return
    level = meet_latency(whole_course(*ladder), ratio, saved, str, "asked")
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
        level = meet_latency(whole_course(*ladder), ratio, saved, str, "asked")
    except SettingError:
        assert max(measured) < ratio
        return
    assert len(measured) <= MEASUREMENTS + 1
    assert abs(level.saved - ratio) == min(abs(m - ratio) for m in measured)


def test_nothing_asked_is_nothing_measured(ladder) -> None:
    level = meet_latency(whole_course(*ladder), 0.0, lambda positions: 1 / 0, str, "asked")
    assert (level.positions == 0).all()


def test_every_measurement_is_told(ladder) -> None:
    said: list[str] = []
    meet_latency(
        whole_course(*ladder), 0.3, lambda positions: removed_macs(ladder, positions) ** 2, said.append, "asked"
    )
    assert said[0].startswith("measurement 1: ")
    assert "fewer multiply-accumulates save" in said[0]


@pytest.mark.slow
def test_the_stopwatch_times_both_networks(tiny, noise) -> None:
    """How much is saved is not asserted: timing is not for a shared machine."""
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


class Front(nn.Module):
    """Most of the arithmetic in the first layers, most of the parameters in the last."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = nn.Sequential(nn.Conv1d(16, 32, 3), nn.Tanh(), nn.Conv1d(32, 32, 3, stride=4), nn.Tanh())
        self.slow = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 24))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.slow(self.fast(x.transpose(1, 2)).square().mean(-1))
        return result


@pytest.fixture(scope="module")
def front() -> Artifact:
    torch.manual_seed(0)
    return Artifact.from_module(Front().eval(), FrontEnd(num_mel_bins=16))


@pytest.fixture
def stopwatch_of_macs(front: Artifact, monkeypatch) -> None:
    """Timing itself is not for a shared machine."""

    def saved(self: Stopwatch, model: nn.Module) -> float:
        return 1 - front.with_model(model, Step("", {}, ())).macs / front.macs

    monkeypatch.setattr(Stopwatch, "__init__", lambda self, dense, features: setattr(self, "dense_ms", 2.0))
    monkeypatch.setattr(Stopwatch, "saved", saved)


@pytest.fixture
def own_settings(front: Artifact, tmp_path: Path) -> dict[str, object]:
    """With a table by which the fast layers cost ten times what the slow ones do."""
    groups = trace(front.module, torch.randn(1, 40, 16)).groups()
    losses = {g.name: tuple((10 if "fast" in g.name else 1) * x for x in (0.01, 0.02, 0.05)) for g in groups}
    path = tmp_path / "sensitivity.json"
    made_from = {"network": front.sha256, "score": "l1", "loss": "cosine"}
    write_sensitivity(path, Sensitivity((0.25, 0.5, 0.75), losses), made_from)
    return {"ratio": 0.4, "round_to": 1, "bn_utterances": 0, "sensitivity": str(path)}


@pytest.mark.usefixtures("stopwatch_of_macs")
def test_two_targets_are_met_together(front: Artifact, tiny_context: Context, own_settings) -> None:
    free = Prune(**own_settings).run(front, tiny_context)
    asked = 1 - free.macs / front.macs + 0.1
    both = Prune(**own_settings, latency_ratio=asked).run(front, tiny_context)
    assert both.params == pytest.approx(0.6 * front.params, abs=0.01 * front.params)
    assert 1 - both.macs / front.macs == pytest.approx(asked, abs=0.03)


@pytest.mark.usefixtures("stopwatch_of_macs")
def test_two_targets_that_exclude_each_other_are_refused(front: Artifact, tiny_context: Context, own_settings) -> None:
    with pytest.raises(SettingError, match=r"latency_ratio 0\.98 cannot be reached: the smallest widths"):
        Prune(**own_settings, latency_ratio=0.98).run(front, tiny_context)


@pytest.mark.usefixtures("stopwatch_of_macs")
def test_a_network_that_is_fast_enough_is_taken(front: Artifact, tiny_context: Context, own_settings) -> None:
    free, both = (Prune(**own_settings, **more).run(front, tiny_context) for more in ({}, {"latency_ratio": 0.01}))
    assert both.sha256 == free.sha256
