"""Prune until a fraction of the latency is saved: candidates are built, exported and timed on this machine.

Latency cannot be counted: kernels work in blocks of channels, and much of the time goes to operators without
arithmetic. So it is measured, at a few levels of one schedule, and multiply-accumulates tell where to measure next.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from compress.errors import SettingError
from compress.onnx_file import open_session
from compress.passes.base import Array
from compress.passes.onnx_export import INPUT, Onnx, export
from compress.surgery.counting import Counter
from compress.surgery.labels import IntArray
from compress.surgery.selection import Schedule, meet

MEASUREMENTS = 8  # candidates that are built at most
TOLERANCE = 0.01  # of the dense network's latency
ROUNDS = 15  # at least
BUDGET_S = 3.0  # for the rounds of one candidate


@dataclass(frozen=True)
class Level:
    """A candidate that was measured.

    Attributes:
        macs: Fraction of the multiply-accumulates that is removed.
        saved: Fraction of the latency that is saved.
        positions: In the schedule.
    """

    macs: float
    saved: float
    positions: IntArray


class Stopwatch:
    """Times candidates beside the dense network: ONNX Runtime, one thread, batch 1.

    The clock is the CPU time of the thread, so other work on the machine hardly counts.
    """

    def __init__(self, dense: nn.Module, features: Array) -> None:
        self._features = features[None]
        self._dense = self._session(dense)
        self.dense_ms = 0.0  # median, as of the last candidate

    def saved(self, candidate: nn.Module) -> float:
        """The fraction of the latency that a candidate saves: from the ratio of medians over rounds taken in turns."""
        sessions = (self._dense, self._session(candidate))
        seconds: list[list[float]] = [[], []]
        deadline = time.perf_counter() + BUDGET_S
        while len(seconds[0]) < ROUNDS or time.perf_counter() < deadline:
            for which in (0, 1) if len(seconds[0]) % 2 else (1, 0):
                seconds[which].append(self._time(sessions[which]))
        dense, pruned = (float(np.median(times)) for times in seconds)
        self.dense_ms = 1000 * dense
        return 1 - pruned / dense

    def _session(self, model: nn.Module) -> Any:
        graph = export(model, self._features.shape[2], Onnx.opset)
        return open_session(graph.SerializeToString(), 1)

    def _time(self, session: Any) -> float:
        session.run(None, {INPUT: self._features})  # the other network has emptied the caches
        start = time.thread_time()
        session.run(None, {INPUT: self._features})
        return time.thread_time() - start


def meet_latency(
    schedule: Schedule,
    macs: Counter,
    ratio: float,
    saved: Callable[[IntArray], float],
    say: Callable[[str], None],
    words: str,
) -> Level:
    """Search a schedule for the level at which ``ratio`` of the latency is saved.

    Args:
        schedule: In which order groups are narrowed.
        macs: Counts multiply-accumulates.
        ratio: Fraction of the latency to save.
        saved: Builds and times the network at positions of the schedule; gives the fraction that is saved.
        say: Told each measurement.
        words: How the target was asked for, for the error.

    Returns:
        Of the levels measured, that which comes nearest.

    Raises:
        SettingError: If the smallest widths save less; tells how much they do.
    """
    whole, least = (macs.count(schedule.removed(positions)) for positions in (schedule.start, schedule.end))
    most = 1 - least / max(1, whole)
    levels = [Level(0.0, 0.0, schedule.start)]
    for number in range(MEASUREMENTS):
        if min(abs(level.saved - ratio) for level in levels) <= TOLERANCE:
            break
        fraction = next_fraction(levels, ratio, most)
        positions = meet(schedule, macs, fraction, words) if fraction < most else schedule.end
        if any((level.positions == positions).all() for level in levels):
            break  # there is no level between
        removed = 1 - macs.count(schedule.removed(positions)) / max(1, whole)
        levels.append(Level(removed, saved(positions), positions))
        say(f"measurement {number + 1}: {removed:.1%} fewer multiply-accumulates save {levels[-1].saved:.1%} latency")
    best = min(levels, key=lambda level: abs(level.saved - ratio))
    if best.saved < ratio - TOLERANCE and (levels[-1].positions == schedule.end).all():
        raise SettingError(
            f"{words} cannot be reached: the smallest widths save {levels[-1].saved:.3f} of the latency on this"
            " machine. Ask for less, keep fewer layers, or lower round_to."
        )
    return best


def next_fraction(levels: list[Level], ratio: float, most: float) -> float:
    """The fraction of the multiply-accumulates to remove next, by the levels measured on both sides of the target."""
    below = max((level for level in levels if level.saved <= ratio), key=lambda level: level.macs)
    above = [level for level in levels if level.saved > ratio and level.macs > below.macs]
    if above:
        upper = min(above, key=lambda level: level.macs)
        share = (ratio - below.saved) / (upper.saved - below.saved)
        return below.macs + share * (upper.macs - below.macs)
    pace = below.saved / below.macs if below.macs else 1.0  # latency saved by what was removed so far
    return min(most, below.macs + (ratio - below.saved) / max(pace, 0.1))
