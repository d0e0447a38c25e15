import gc
import math
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import MachineError, SettingError
from compress.evaluation.latency import Timing, speedup, time_interleaved

QUICK = settings(deadline=None, max_examples=60)  # no deadline: a busy machine is no failure

samples = st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=200)


def busy(turns: int) -> Callable[[], object]:
    return lambda: sum(range(turns))


@given(samples)
@QUICK
def test_percentiles_rise_and_stay_within_the_samples(samples_ms: list[float]) -> None:
    timing = Timing(np.array(samples_ms))
    figures = [min(samples_ms), timing.p50, timing.p95, timing.p99, max(samples_ms)]
    assert all(low <= high * (1 + 1e-12) for low, high in pairwise(figures))
    assert min(samples_ms) * (1 - 1e-9) <= timing.mean <= max(samples_ms) * (1 + 1e-9)


@given(samples, st.floats(0, 100))
@QUICK
def test_percentile_interpolates_between_sorted_samples(samples_ms: list[float], rank: float) -> None:
    ordered = sorted(samples_ms)
    position = rank / 100 * (len(ordered) - 1)
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    expected = low + (position - math.floor(position)) * (high - low)
    assert Timing(np.array(samples_ms)).percentile(rank) == pytest.approx(expected, rel=1e-9)


@given(samples)
@QUICK
def test_dictionary_holds_the_entries_of_the_table(samples_ms: list[float]) -> None:
    timing = Timing(np.array(samples_ms))
    expected = {"mean": timing.mean, "p50": timing.p50, "p95": timing.p95, "p99": timing.p99}
    assert timing.as_dict() == expected
    assert timing.runs == len(samples_ms)


@given(samples, st.floats(0.1, 10))
@QUICK
def test_speedup_of_a_constant_ratio_is_that_ratio_however_rounds_vary(samples_ms: list[float], ratio: float) -> None:
    slow = np.array(samples_ms)
    figures = speedup({"slow": Timing(slow), "fast": Timing(slow / ratio)}, "slow")
    assert figures == {"slow": 1.0, "fast": pytest.approx(ratio)}


def test_rounds_rotate_and_each_timed_call_follows_an_untimed_one_of_its_own() -> None:
    order: list[str] = []

    def note(name: str) -> Callable[[], object]:
        return lambda: order.append(name)

    timings = time_interleaved({name: note(name) for name in "abc"}, budget_s=0, min_runs=4, warmup=2)
    assert "".join(order) == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert {name: timing.runs for name, timing in timings.items()} == {"a": 4, "b": 4, "c": 4}


def test_order_of_real_work_is_found() -> None:
    calls = {"long": busy(100_000), "short": busy(2_000), "middle": busy(15_000)}
    timings = time_interleaved(calls, budget_s=0.1, min_runs=15)
    assert timings["short"].p50 < timings["middle"].p50 < timings["long"].p50
    figures = speedup(timings, "long")
    assert 1 == figures["long"] < figures["middle"] < figures["short"]


def test_cpu_clock_does_not_count_sleep() -> None:
    calls = {"sleep": lambda: time.sleep(0.02), "work": busy(100_000)}
    timings = time_interleaved(calls, budget_s=0, min_runs=5, clock=time.process_time)
    assert timings["sleep"].p50 < timings["work"].p50


def test_budget_ends_the_rounds_between_the_two_limits() -> None:
    assert time_interleaved({"a": busy(10)}, budget_s=0, min_runs=7)["a"].runs == 7
    assert time_interleaved({"a": busy(10)}, budget_s=60, min_runs=1, max_runs=9)["a"].runs == 9
    assert time_interleaved({"a": busy(10)}, budget_s=0.05, min_runs=1, max_runs=10**9)["a"].runs > 1


def test_garbage_collector_rests_while_timing_and_is_back_after_a_failure() -> None:
    collecting: list[bool] = []

    def fail() -> None:
        collecting.append(gc.isenabled())
        raise OSError("the model broke")

    with pytest.raises(OSError, match="the model broke"):
        time_interleaved({"a": fail}, warmup=0)
    assert collecting == [False]
    assert gc.isenabled()


def test_clock_too_coarse_for_a_call_is_refused() -> None:
    with pytest.raises(MachineError, match="'a' took no time by the clock"):
        time_interleaved({"a": busy(1)}, budget_s=0, min_runs=2, clock=lambda: float(time.time() // 1e6))


@pytest.mark.parametrize(("min_runs", "max_runs"), [(0, 10), (11, 10)])
def test_runs_out_of_range_name_the_range(min_runs: int, max_runs: int) -> None:
    with pytest.raises(SettingError, match=rf"min_runs must be in 1\.\.max_runs \(10\), got {min_runs}\."):
        time_interleaved({"a": busy(1)}, min_runs=min_runs, max_runs=max_runs)


def test_negative_warmup_and_budget_are_refused() -> None:
    with pytest.raises(SettingError, match="must not be negative, got -1 and 5"):
        time_interleaved({"a": busy(1)}, warmup=-1)
    with pytest.raises(SettingError, match="must not be negative, got 3 and -2"):
        time_interleaved({"a": busy(1)}, budget_s=-2)
