"""Prune until a fraction of the latency is saved: candidates are built, exported and timed on this machine.

Latency cannot be counted: kernels work in blocks of channels, and much of the time goes to operators without
arithmetic. So it is measured, at a few levels of one course, and multiply-accumulates tell where to measure next.
"""

import bisect
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from compress.errors import SettingError
from compress.onnx_file import open_session
from compress.passes.base import Array
from compress.passes.onnx_export import INPUT, Onnx, export
from compress.surgery.counting import Counter
from compress.surgery.labels import IntArray
from compress.surgery.selection import Bounty, Schedule, meet

MEASUREMENTS = 8  # candidates that are built at most
TOLERANCE = 0.01  # of the dense network's latency
ROUNDS = 15  # at least
BUDGET_S = 3.0  # for the rounds of one candidate
PRICES = tuple(float(price) for price in np.geomspace(0.01, 1000, 41))  # predicted loss for all multiply-accumulates


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


@dataclass(frozen=True)
class Course:
    """Networks from slow to fast.

    Attributes:
        slowest: Its level.
        fastest: Its positions.
        macs: The fraction of the multiply-accumulates that is removed at positions.
        at: The positions at which a fraction of them is removed, as nearly as there are some.
    """

    slowest: Level
    fastest: IntArray
    macs: Callable[[IntArray], float]
    at: Callable[[float], IntArray]


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


def whole_course(schedule: Schedule, macs: Counter) -> Course:
    """From the dense network along a schedule to its end."""
    removed = removed_fraction(schedule, macs)
    return Course(
        Level(0.0, 0.0, schedule.start),
        schedule.end,
        removed,
        lambda fraction: meet(schedule, macs, fraction, "") if fraction < removed(schedule.end) else schedule.end,
    )


def course_within(
    schedule_with: Callable[[Bounty], Schedule],
    macs: Counter,
    meets: Callable[[Schedule], IntArray],
    saved: Callable[[IntArray], float],
) -> Course:
    """Networks that all meet a target which can be counted, from that of the least predicted loss to faster ones.

    Args:
        schedule_with: Makes the schedule with a bounty on multiply-accumulates; the higher, the more of them go.
        macs: Counts them.
        meets: The positions of a schedule at which the target is met.
        saved: As for ``meet_latency``.
    """

    @functools.cache
    def schedule(step: int) -> Schedule:
        """At one price of ``PRICES``; at -1 without a bounty."""
        return schedule_with(Bounty(macs, PRICES[step] if step >= 0 else 0.0))

    @functools.cache
    def positions(step: int, begun: int = 0) -> IntArray:
        """Where the target is met: at one price, the first steps in the order of the next higher one."""
        return meets(spliced(schedule(step + 1), begun, schedule(step)) if begun else schedule(step))

    def at(fraction: float) -> IntArray:
        last = len(PRICES) - 1
        step = bisect.bisect_left(range(last), fraction, key=lambda step: removed(positions(step))) - 1
        low, high = 0, len(schedule(step).order)
        tried = [positions(step), positions(step + 1)]
        while high - low > 1:
            middle = (low + high) // 2
            tried.append(positions(step, middle))
            low, high = (middle, high) if removed(tried[-1]) < fraction else (low, middle)
        return min(tried, key=lambda state: abs(removed(state) - fraction))

    removed = removed_fraction(schedule(-1), macs)
    slowest = Level(removed(positions(-1)), saved(positions(-1)), positions(-1))
    return Course(slowest, positions(len(PRICES) - 1), removed, at)


def spliced(first: Schedule, count: int, rest: Schedule) -> Schedule:
    """The schedule that takes so many steps of one and then those of another that are left."""
    ahead = first.after(count)
    left = []
    for bundle in rest.order.tolist():
        ahead[bundle] -= 1
        if ahead[bundle] < 0:
            left.append(bundle)
    return replace(rest, order=np.array([*first.order[:count], *left], dtype=np.int64))


def removed_fraction(schedule: Schedule, counter: Counter) -> Callable[[IntArray], float]:
    """The fraction of what a counter counts that is gone at positions."""
    whole = max(1, counter.count(schedule.removed(schedule.start)))
    return lambda positions: 1 - counter.count(schedule.removed(positions)) / whole


def meet_latency(
    course: Course, ratio: float, saved: Callable[[IntArray], float], say: Callable[[str], None], words: str
) -> Level:
    """Search a course for the level at which ``ratio`` of the latency is saved.

    Args:
        course: The networks to choose from.
        ratio: Fraction of the latency to save.
        saved: Builds and times the network at positions of the schedule; gives the fraction that is saved.
        say: Told each measurement.
        words: How the target was asked for, for the error.

    Returns:
        Of the levels measured, that which comes nearest; the slowest if it is fast enough.

    Raises:
        SettingError: If the fastest saves less; tells how much it does.
    """
    levels = [course.slowest]
    if course.slowest.saved >= ratio:
        return course.slowest
    for number in range(MEASUREMENTS):
        if min(abs(level.saved - ratio) for level in levels) <= TOLERANCE:
            break
        positions = course.at(next_fraction(levels, ratio, course.macs(course.fastest)))
        if any((level.positions == positions).all() for level in levels):
            break  # there is no level between
        levels.append(Level(course.macs(positions), saved(positions), positions))
        removed, gain = levels[-1].macs, levels[-1].saved
        say(f"measurement {number + 1}: {removed:.1%} fewer multiply-accumulates save {gain:.1%} latency")
    best = min(levels, key=lambda level: abs(level.saved - ratio))
    if best.saved < ratio - TOLERANCE and (levels[-1].positions == course.fastest).all():
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
