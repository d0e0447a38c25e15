"""Latency of several callables, measured in turns so that a noisy machine is equally unkind to all."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.errors import MachineError, SettingError


@dataclass(frozen=True, eq=False)
class Timing:
    """Latencies of one callable in milliseconds, one for each round, in the order they were measured."""

    samples_ms: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean, in milliseconds."""
        return float(self.samples_ms.mean())

    @property
    def p50(self) -> float:
        """Median, in milliseconds."""
        return self.percentile(50)

    @property
    def p95(self) -> float:
        """95th percentile, in milliseconds."""
        return self.percentile(95)

    @property
    def p99(self) -> float:
        """99th percentile, in milliseconds; with fewer than 100 runs close to the maximum."""
        return self.percentile(99)

    @property
    def runs(self) -> int:
        """Number of measured calls."""
        return len(self.samples_ms)

    def percentile(self, rank: float) -> float:
        """Compute a percentile, rank in 0..100, interpolating linearly between the two nearest samples."""
        return float(np.percentile(self.samples_ms, rank))

    def as_dict(self) -> dict[str, float]:
        """Give the entries of ``latency_ms`` in ``table.json``."""
        return {"mean": self.mean, "p50": self.p50, "p95": self.p95, "p99": self.p99}


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    budget_s: float = 5.0,
    min_runs: int = 20,
    max_runs: int = 1000,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time callables in rounds: each round times every callable once, and starts one callable further than the last.

    A figure taken alone says as much about the machine's other work as about the callable; compare only timings of
    one call of this function. Right before its timed call each callable runs once untimed, because its predecessor
    has emptied the caches and may have left threads spinning. The garbage collector rests meanwhile.

    Args:
        calls: What to time, by name. Threads must be fixed beforehand, and a call on a GPU must synchronise before it
            returns.
        budget_s: Wall-clock seconds for all rounds together, warm-up aside; rounds go on until it is spent.
        min_runs: Rounds made even when the budget is spent earlier.
        max_runs: Rounds after which it ends even with budget left.
        warmup: Untimed calls of each callable before the first round.
        clock: Seconds; ``time.process_time`` gives the CPU time of all threads of this process.

    Returns:
        A timing for each name; sample i of all of them comes from the same round i.

    Raises:
        SettingError: If a count or the budget is out of range.
        MachineError: If the clock is too coarse for a callable.
    """
    if not 1 <= min_runs <= max_runs:
        raise SettingError(f"min_runs must be in 1..max_runs ({max_runs}), got {min_runs}.")
    if warmup < 0 or budget_s < 0:
        raise SettingError(f"warmup and budget_s must not be negative, got {warmup} and {budget_s}.")
    for call in calls.values():
        for _ in range(warmup):
            call()

    names = list(calls)
    rounds: list[dict[str, float]] = []
    with _no_garbage_collection():
        deadline = time.perf_counter() + budget_s
        while len(rounds) < min_runs or (len(rounds) < max_runs and time.perf_counter() < deadline):
            first = len(rounds) % max(1, len(names))
            rounds.append({name: _time_once(calls[name], clock) for name in names[first:] + names[:first]})

    timings = {name: Timing(np.array([latencies[name] for latencies in rounds])) for name in names}
    for name, timing in timings.items():
        if not timing.samples_ms.all():
            raise MachineError(f"'{name}' took no time by the clock. Let one call do the work several times.")
    return timings


def speedup(timings: Mapping[str, Timing], reference: str) -> dict[str, float]:
    """Say how many times as fast as the reference each callable is: the median over rounds of the ratio of latencies.

    A ratio within a round does not feel that the machine was busier in another, so its median is steadier than the
    ratio of medians.

    Args:
        timings: From one call of :func:`time_interleaved`.
        reference: Its name among them; its own figure is 1.
    """
    reference_ms = timings[reference].samples_ms
    return {name: float(np.median(reference_ms / timing.samples_ms)) for name, timing in timings.items()}


def _time_once(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Run a callable twice and time the second call, in milliseconds."""
    call()
    start = clock()
    call()
    return (clock() - start) * 1e3


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
