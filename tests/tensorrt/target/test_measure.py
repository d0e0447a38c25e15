"""Measuring an engine. There is no GPU: ``FakeEngine`` and ``FakeGpu`` keep a clock of their own, on which every step
takes the time that it is told to, so that each figure is known beforehand."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.table import FIELDS
from compress.tensorrt.target import measure as module
from compress.tensorrt.target.cuda import CudaError
from compress.tensorrt.target.measure import (
    VARIANTS,
    Lane,
    Settings,
    concurrent,
    energy,
    fastest,
    latencies,
    measure,
    percentile,
    report,
    row_figures,
    summary,
    throttling,
    throughput,
)
from compress.tensorrt.target.sensors import Sensors
from compress.tensorrt.target.versions import TensorRTError

IN_MS, KERNELS_MS, GRAPH_MS, OUT_MS = 0.25, 2.0, 1.0, 0.125
SLEEPY_MS = 0.5  # what a thread that sleeps takes to wake up
features = np.zeros((1, 298, 80), np.float32)


@dataclass
class FakeGpu:
    """A GPU that does one thing at a time on each stream, on a clock in milliseconds."""

    now_ms: float = 0.0  # of the host
    slept_ms: float = 0.0
    captures: bool = True
    open: list[Any] = field(default_factory=list)

    def clock(self) -> float:
        self.now_ms += 1e-6  # so that no loop waits forever
        return self.now_ms / 1e3

    def sleep(self, seconds: float) -> None:
        self.now_ms += seconds * 1e3
        self.slept_ms += seconds * 1e3

    def Stream(self) -> "FakeStream":  # noqa: N802
        return FakeStream(self)

    def Event(self, blocking: bool) -> "FakeEvent":  # noqa: N802
        return FakeEvent(self, blocking)


class Owned:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        gpu.open.append(self)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.gpu.open.remove(self)


class FakeStream(Owned):
    done_ms = 0.0
    captured: float | None = None

    def take(self, milliseconds: float) -> None:
        if self.captured is not None:
            self.captured += milliseconds
            return
        self.done_ms = max(self.done_ms, self.gpu.now_ms) + milliseconds

    def synchronize(self) -> None:
        self.gpu.now_ms = max(self.gpu.now_ms, self.done_ms)

    def begin_capture(self) -> None:
        self.captured = 0.0

    def end_capture(self) -> "FakeGraph":
        self.captured = None
        if not self.gpu.captures:
            raise CudaError("ending a CUDA graph: cuStreamEndCapture gives CUDA_ERROR_STREAM_CAPTURE_INVALIDATED.")
        return FakeGraph(self.gpu)


class FakeGraph(Owned):
    def launch(self, stream: FakeStream) -> None:
        stream.take(GRAPH_MS)


class FakeEvent(Owned):
    def __init__(self, gpu: FakeGpu, blocking: bool) -> None:
        super().__init__(gpu)
        self.blocking, self.at_ms = blocking, 0.0

    def record(self, stream: FakeStream) -> None:
        self.at_ms = max(stream.done_ms, self.gpu.now_ms)

    def synchronize(self) -> None:
        self.gpu.now_ms = max(self.gpu.now_ms, self.at_ms) + (SLEEPY_MS if self.blocking else 0)

    def ms_since(self, earlier: "FakeEvent") -> float:
        return self.at_ms - earlier.at_ms


class FakeEngine:
    """An engine whose kernels take 2 ms, 1 ms as a CUDA graph, whatever the batch up to 16."""

    profile = {"min": (1, 50, 80), "opt": (1, 300, 80), "max": (16, 1000, 80)}  # noqa: RUF012

    def __init__(self, gpu: FakeGpu, copies: int = 99) -> None:
        self.gpu, self.copies, self.closed = gpu, copies, 0
        self.record = {"key": {"gpu": "FakeGpu"}}

    def set_shape(self, batch: int, frames: int) -> None:
        if not 50 <= frames <= 1000:
            raise TensorRTError(f"feats: {frames} frames are outside the optimization profile (50 to 1000).")
        self.host_input = np.zeros((batch, frames, 80), np.float32)
        self.host_outputs = {"embedding": np.full((batch, 4), float(batch))}

    def copy_in(self, stream: FakeStream) -> None:
        stream.take(IN_MS)

    def enqueue(self, stream: FakeStream) -> None:
        stream.take(KERNELS_MS)

    def copy_out(self, stream: FakeStream) -> None:
        stream.take(OUT_MS)

    def another(self) -> "FakeEngine":
        if not self.copies:
            raise CudaError("out of GPU memory while taking 30 KiB: 1 of 15 MiB are free.")
        self.copies -= 1
        return self

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setattr(module.gc, "collect", lambda: 0)  # slow where so much is loaded, and there is nothing to time
    return FakeGpu()


@pytest.fixture
def engine(gpu: FakeGpu) -> FakeEngine:
    return FakeEngine(gpu)


def by_way(found: list[dict[str, Any]]) -> dict[tuple[str, bool], dict[str, Any]]:
    return {(entry["wait"], entry["graph"]): entry for entry in found}


@given(
    samples=st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=50),
    ranks=st.lists(st.floats(0, 100), min_size=2, max_size=2),
)
def test_percentiles_are_those_of_numpy_and_rise_with_the_rank(samples: list[float], ranks: list[float]) -> None:
    low, high = sorted(ranks)
    assert percentile(samples, low) <= percentile(samples, high) * (1 + 1e-12)
    assert percentile(samples, low) == pytest.approx(np.percentile(samples, low), abs=1e-6)
    assert (percentile(samples, 0), percentile(samples, 100)) == (min(samples), max(samples))


@given(samples=st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_a_summary_does_not_depend_on_the_order(samples: list[float]) -> None:
    found = summary(samples)
    assert found == summary(sorted(samples))
    assert found["count"] == len(samples)
    assert min(samples) <= found["p50"] <= found["p90"] * (1 + 1e-12) <= found["max"] * (1 + 1e-9)
    assert min(samples) * (1 - 1e-12) <= found["mean"] <= max(samples) * (1 + 1e-12)


def test_each_part_of_the_latency_is_what_it_took(gpu: FakeGpu, engine: FakeEngine) -> None:
    found = by_way(latencies(engine, features, Settings(), gpu, gpu.clock))
    assert set(found) == set(VARIANTS)
    for (wait, graph), entry in found.items():
        kernels, waking = (GRAPH_MS if graph else KERNELS_MS), (SLEEPY_MS if wait == "blocking" else 0)
        assert entry["h2d_ms"]["p50"] == pytest.approx(IN_MS)
        assert entry["compute_ms"]["p50"] == pytest.approx(kernels)
        assert entry["d2h_ms"]["p50"] == pytest.approx(OUT_MS)
        assert entry["end_to_end_ms"]["p50"] == pytest.approx(IN_MS + kernels + OUT_MS + waking, rel=1e-4)
        assert (entry["batch"], entry["frames"]) == (1, 298)
    assert not gpu.open, "streams, events and graphs are given back"


def test_a_series_lasts_as_long_and_as_often_as_asked(gpu: FakeGpu, engine: FakeEngine) -> None:
    settings = Settings(seconds=0.1, iterations=10, rounds=3)
    entry = by_way(latencies(engine, features, settings, gpu, gpu.clock))["spinning", False]
    assert entry["end_to_end_ms"]["count"] == 3 * 43  # of 2.375 ms each
    assert len(entry["rounds_p50_ms"]) == 3
    short = by_way(latencies(engine, features, Settings(seconds=0, rounds=1), gpu, gpu.clock))["spinning", False]
    assert short["end_to_end_ms"]["count"] == 10


def test_the_order_of_the_ways_changes_from_round_to_round(
    gpu: FakeGpu, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    class Watched(Lane):
        def __init__(self, *arguments: Any) -> None:
            order.append((arguments[3], arguments[2]))
            super().__init__(*arguments)

    monkeypatch.setattr(module, "Lane", Watched)
    latencies(engine, features, Settings(rounds=4, seconds=0), gpu, gpu.clock)
    rounds = [tuple(order[i : i + 4]) for i in range(0, 16, 4)]
    assert all(len(set(one)) == 4 for one in rounds)
    assert len(set(rounds)) > 1


def test_a_graph_that_cannot_be_captured_is_a_sentence_and_not_the_end(engine: FakeEngine, gpu: FakeGpu) -> None:
    gpu.captures = False
    found = by_way(latencies(engine, features, Settings(seconds=0), gpu, gpu.clock))
    assert "CAPTURE_INVALIDATED" in found["spinning", True]["missing"]
    assert found["spinning", False]["end_to_end_ms"]["count"] == 20
    assert throughput(engine, features, Settings(batches=(1,)), gpu, gpu.clock)[0]["graph"] is False
    assert not gpu.open


def test_throughput_is_of_the_batches_that_the_profile_has(engine: FakeEngine, gpu: FakeGpu) -> None:
    found = throughput(engine, features, Settings(), gpu, gpu.clock)
    assert [entry["batch"] for entry in found] == [1, 2, 4, 8, 16]
    for entry in found:
        seconds = (IN_MS + GRAPH_MS + OUT_MS) / 1e3
        assert entry["utterances_per_s"] == pytest.approx(entry["batch"] / seconds, rel=1e-3)
        assert entry["rtf"] == pytest.approx(seconds / entry["batch"] / 3.0, rel=1e-3)


def test_streams_run_beside_each_other(engine: FakeEngine, gpu: FakeGpu) -> None:
    found = concurrent(engine, features, Settings(), gpu, gpu.clock)
    assert [entry["streams"] for entry in found] == [1, 2, 4, 8]
    one = 1e3 / (IN_MS + GRAPH_MS + OUT_MS)
    for entry in found:  # FakeGpu lets streams overlap fully
        assert entry["qps"] == pytest.approx(one * entry["streams"], rel=1e-3)
        assert entry["latency_ms"]["p50"] == pytest.approx(1e3 / one, rel=1e-3)
    assert engine.closed == 7
    assert not gpu.open


def test_memory_for_so_many_engines_may_not_suffice(gpu: FakeGpu) -> None:
    found = concurrent(FakeEngine(gpu, copies=2), features, Settings(), gpu, gpu.clock)
    assert [entry["streams"] for entry in found] == [1, 2, 4]
    assert "out of GPU memory" in found[-1]["missing"]


class FakeSensors(Sensors):
    """Takes 5 W when idle and 25 W while the GPU of the fake works; hot and slowed afterwards."""

    kind = "fake"
    missing = None

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu, self.asked = gpu, 0

    def describe(self) -> dict[str, Any]:
        return {"sensors": "fake", "name": "Fake T4", "gpu_clock_locked": False}

    def read(self) -> dict[str, Any]:
        self.asked += 1
        after = {
            "throttled_by": ["application clocks", "power cap"],
            "over_current_events": {"oc3": 2},
            "temperatures_c": {"GPU": 71.0},
        }
        before = {"throttled_by": [], "over_current_events": {"oc3": 0}, "temperatures_c": {"GPU": 40.0}}
        return {**(before if self.asked == 1 else after), "clocks_mhz": {"sm": 1005}}

    def energy_j(self) -> float:
        return (25 * self.gpu.now_ms - 20 * self.gpu.slept_ms) / 1e3


def test_energy_of_an_utterance(engine: FakeEngine, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.tensorrt.target.sensors.time.perf_counter", gpu.clock)
    found = energy(engine, features, Settings(), FakeSensors(gpu), gpu, gpu.clock, gpu.sleep)
    utterance_s = (IN_MS + GRAPH_MS + OUT_MS + SLEEPY_MS) / 1e3  # the host sleeps while it waits
    assert found["utterances"] == pytest.approx(10 / utterance_s, rel=1e-3)
    assert (found["idle_watts"], found["watts"]) == (pytest.approx(5, rel=1e-3), pytest.approx(25, rel=1e-3))
    assert found["joules"] == pytest.approx(25 * utterance_s, rel=1e-3)
    assert found["joules_above_idle"] == pytest.approx(20 * utterance_s, rel=1e-3)


def test_a_machine_that_tells_no_power_is_not_waited_for(engine: FakeEngine, gpu: FakeGpu) -> None:
    found = energy(engine, features, Settings(), Sensors(), gpu, gpu.clock, gpu.sleep)
    assert found == {"missing": "the machine tells no power"}
    assert gpu.slept_ms == 0


@pytest.fixture
def measured(engine: FakeEngine, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("compress.tensorrt.target.sensors.time.perf_counter", gpu.clock)
    settings = Settings(seconds=0.1)
    return measure(engine, features, settings, FakeSensors(gpu), gpu=gpu, clock=gpu.clock, sleep=gpu.sleep)


def test_everything_is_json_and_fits_a_row_of_the_table(measured: dict[str, Any]) -> None:
    assert json.loads(json.dumps(measured, allow_nan=False)).keys() == measured.keys()
    best = fastest(measured)
    assert best is not None
    assert (best["wait"], best["graph"]) == ("spinning", True)
    row = row_figures(measured)
    assert set(row) <= set(FIELDS)
    assert set(row["latency_ms"]) == {"mean", "p50", "p95", "p99"}
    assert row["rtf"] == pytest.approx((IN_MS + GRAPH_MS + OUT_MS) / 3000, rel=1e-3)
    assert row["qps"] == pytest.approx(1000 / (IN_MS + GRAPH_MS + OUT_MS), rel=1e-3)
    assert "spinning wait, with CUDA graph" in row["notes"][0]


def test_what_slowed_the_machine_is_said(measured: dict[str, Any]) -> None:
    said = throttling(measured)
    assert said == [
        "slowed after measuring by: power cap",
        "slowed 2 times by over-current while measuring",
        "the clock of the GPU was not locked (sudo jetson_clocks locks it)",
    ]
    assert said[0] in row_figures(measured)["notes"]


def test_the_report_has_every_way_and_the_rest_in_a_line_each(measured: dict[str, Any]) -> None:
    text = report(measured)
    for part in ("Fake T4", "blocking", "spinning", "RTF 0.000458", "16: 11636", "8: 5818", "mJ an utterance", "71 C"):
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 120


def test_nothing_that_works_is_no_figure(gpu: FakeGpu, measured: dict[str, Any]) -> None:
    missing = [{**entry, "missing": "no such thing"} for entry in measured["latency"]]
    assert row_figures({**measured, "latency": missing}) == {"notes": ["no latency: no such thing"]}
    text = report({**measured, "latency": missing, "energy": {"missing": "no power is told"}, "machine": {}})
    assert "no such thing" in text
    assert text.startswith("FakeGpu, ")


def test_a_shape_outside_the_profile_is_told_as_the_engine_tells_it(engine: FakeEngine, gpu: FakeGpu) -> None:
    long = np.zeros((1, 2000, 80), np.float32)
    found = latencies(engine, long, Settings(rounds=1), gpu, gpu.clock)
    assert {entry["missing"] for entry in found} == {
        "feats: 2000 frames are outside the optimization profile (50 to 1000)."
    }


def test_a_lane_gives_the_outputs(engine: FakeEngine, gpu: FakeGpu) -> None:
    clock: Callable[[], float] = gpu.clock
    before = clock()
    with Lane(engine, features, True, False, gpu) as lane:
        assert (lane.run()["embedding"] == 1).all()
    assert clock() > before
