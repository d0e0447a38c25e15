"""How fast an engine is, and what it takes: latency by parts, throughput, queries per second, energy.

Latency has three parts on the GPU, timed by events: host to device, compute, device to host. End to end is the host's
time from features in ordinary memory to outputs in ordinary memory: what a caller waits. Nothing overlaps, as in a
stream of single requests (trtexec enqueues one ahead by default). Whether the waiting thread sleeps (``blocking``) or
spins, and whether the kernels are one CUDA graph, changes small networks more than their precision does, so all four
are measured, in random order and in several rounds.
"""

from __future__ import annotations

import ctypes
import gc
import math
import random
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence

from . import cuda
from .sensors import Sensors, measure_energy, open_sensors
from .versions import TensorRTError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .engine import Engine

    Array = NDArray[np.float32]

Clock = Callable[[], float]
Say = Callable[[str], None]

SCHEMA = 1
PARTS = ("h2d_ms", "compute_ms", "d2h_ms", "end_to_end_ms")
PERCENTILES = (50, 90, 95, 99)
CHOSEN = ("application clocks", "display clocks")  # limits that somebody has set, not slowing
IN_FLIGHT = 8  # batches given to the GPU before the host waits, for throughput


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        frames: Of the utterance; 298 are 3.0 s.
        audio_s: Its duration in seconds, for the RTF.
        warmup_s: Untimed, before each series.
        seconds: Of each series, at least.
        iterations: Of each series, at least.
        rounds: Series of each variant, in an order that is drawn anew for each round.
        batches: For throughput; those outside the profile are left out.
        streams: Numbers of engines that run at once, for queries per second.
        energy_s: Of the idle machine and of the loaded one; 0 leaves energy out.
        seed: Of the order and of the features.
    """

    frames: int = 298
    audio_s: float = 3.0
    warmup_s: float = 0.2
    seconds: float = 3.0
    iterations: int = 10
    rounds: int = 2
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    streams: tuple[int, ...] = (1, 2, 4, 8)
    energy_s: float = 10.0
    seed: int = 0


# --- Arithmetic ---------------------------------------------------------------------------------------------------


def percentile(samples: Sequence[float], rank: float) -> float:
    """Compute a percentile, rank in 0..100, interpolating linearly between the two nearest samples."""
    ordered = sorted(samples)
    place = rank / 100 * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles, maximum and count; of milliseconds here."""
    ranks = {f"p{rank}": percentile(samples, rank) for rank in PERCENTILES}
    mean = math.fsum(samples) / len(samples)
    return {"mean": mean, **ranks, "max": max(samples), "count": len(samples)}


# --- One engine on one stream -------------------------------------------------------------------------------------


class Lane:
    """An engine set to a shape, with a stream, four events and, if wanted, a CUDA graph of its kernels.

    Args:
        engine: It has to stay set to the shape as long as the lane is used.
        features: (batch, frames, num_mel_bins).
        graph: Capture the kernels once and launch them as one.
        blocking: Let the waiting thread sleep and not spin.
        gpu: What makes streams and events.

    Raises:
        TensorRTError: If the engine does not take the shape.
        CudaError: If memory does not suffice, or the kernels cannot be captured.
    """

    def __init__(self, engine: Engine, features: Array, graph: bool, blocking: bool, gpu: Any = cuda) -> None:
        self.engine, self.features = engine, features
        with ExitStack() as stack:
            self.stream = stack.enter_context(gpu.Stream())
            self.events = [stack.enter_context(gpu.Event(blocking)) for _ in PARTS]
            engine.set_shape(features.shape[0], features.shape[1])
            engine.host_input[...] = features
            engine.copy_in(self.stream)
            engine.enqueue(self.stream)  # a first time outside the capture: TensorRT sets itself up for the shape
            self.stream.synchronize()
            self.graph = stack.enter_context(self._capture()) if graph else None
            self._stack = stack.pop_all()

    def _capture(self) -> Any:
        self.stream.begin_capture()
        try:
            self.engine.enqueue(self.stream)
        except TensorRTError:
            with suppress(cuda.CudaError):  # the stream has to be brought out of the capture; why it failed is known
                self.stream.end_capture().close()
            raise
        return self.stream.end_capture()

    def submit(self) -> None:
        """Give the GPU one batch; returns at once."""
        start, copied, computed, end = self.events
        start.record(self.stream)
        self.engine.copy_in(self.stream)
        copied.record(self.stream)
        if self.graph is not None:
            self.graph.launch(self.stream)
        else:
            self.engine.enqueue(self.stream)
        computed.record(self.stream)
        self.engine.copy_out(self.stream)
        end.record(self.stream)

    def wait(self) -> None:
        """Wait until the last batch is done."""
        self.events[-1].synchronize()

    def run(self) -> dict[str, Array]:
        """Features in ordinary memory to outputs in ordinary memory."""
        self.engine.host_input[...] = self.features
        self.submit()
        self.wait()
        return {name: array.copy() for name, array in self.engine.host_outputs.items()}

    def parts_ms(self) -> tuple[float, float, float]:
        """Host to device, compute and device to host of the last batch, in milliseconds on the GPU."""
        start, copied, computed, end = self.events
        return copied.ms_since(start), computed.ms_since(copied), end.ms_since(computed)

    def close(self) -> None:
        """Give back stream, events and graph; the engine stays."""
        self._stack.close()

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def repeat(work: Callable[[], Any], seconds: float, iterations: int, clock: Clock) -> int:
    """Call as often and as long as wanted, both at least; returns how often."""
    start, count = clock(), 0
    while count < iterations or clock() - start < seconds:
        work()
        count += 1
    return count


def time_lane(lane: Lane, settings: Settings, clock: Clock = time.perf_counter) -> dict[str, list[float]]:
    """One series: samples of each part in milliseconds, after a warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in PARTS}

    def once() -> None:
        before = clock()
        lane.run()
        after = clock()
        for name, value in zip(PARTS, (*lane.parts_ms(), (after - before) * 1e3)):
            samples[name].append(value)

    repeat(lane.run, settings.warmup_s, 1, clock)
    with no_garbage_collection():
        repeat(once, settings.seconds, settings.iterations, clock)
    return samples


# --- What is measured ---------------------------------------------------------------------------------------------

VARIANTS = tuple((wait, graph) for wait in ("blocking", "spinning") for graph in (False, True))


def latencies(
    engine: Engine, features: Array, settings: Settings, gpu: Any = cuda, clock: Clock = time.perf_counter
) -> list[dict[str, Any]]:
    """Latency of a batch in each way of waiting, with and without CUDA graph.

    A way that does not work has ``missing``, a sentence, in place of figures.
    """
    order = random.Random(settings.seed)
    pooled: dict[tuple[str, bool], list[dict[str, list[float]]]] = {variant: [] for variant in VARIANTS}
    missing: dict[tuple[str, bool], str] = {}
    for _ in range(settings.rounds):
        for wait, graph in order.sample(VARIANTS, len(VARIANTS)):
            try:
                with Lane(engine, features, graph, wait == "blocking", gpu) as lane:
                    pooled[wait, graph].append(time_lane(lane, settings, clock))
            except (cuda.CudaError, TensorRTError) as error:
                missing[wait, graph] = str(error)
    found = []
    for (wait, graph), series in pooled.items():
        about = {"wait": wait, "graph": graph, "batch": features.shape[0], "frames": features.shape[1]}
        if (wait, graph) in missing or not series:
            found.append({**about, "missing": missing.get((wait, graph), "not measured")})
            continue
        whole = {name: summary([sample for part in series for sample in part[name]]) for name in PARTS}
        rounds = [percentile(part["end_to_end_ms"], 50) for part in series]
        found.append({**about, **whole, "rounds_p50_ms": rounds})
    return found


def throughput(
    engine: Engine, features: Array, settings: Settings, gpu: Any = cuda, clock: Clock = time.perf_counter
) -> list[dict[str, Any]]:
    """Utterances per second by batch size, on one stream that is never left without work; copies included."""
    found = []
    for batch in settings.batches:
        if not engine.profile["min"][0] <= batch <= engine.profile["max"][0]:
            continue
        found.append({"batch": batch, **_throughput(engine, repeated(features, batch), settings, gpu, clock)})
    return found


def _throughput(engine: Engine, features: Array, settings: Settings, gpu: Any, clock: Clock) -> dict[str, Any]:
    def burst() -> None:
        for _ in range(IN_FLIGHT):
            lane.submit()
        lane.wait()

    try:
        with with_graph_if_possible(engine, features, gpu) as lane:
            repeat(burst, settings.warmup_s, 1, clock)
            start = clock()
            bursts = repeat(burst, settings.seconds / 3, settings.iterations, clock)
            elapsed = clock() - start
            graph = lane.graph is not None
    except (cuda.CudaError, TensorRTError) as error:
        return {"missing": str(error)}
    batches = bursts * IN_FLIGHT
    return {
        "graph": graph,
        "utterances_per_s": batches * features.shape[0] / elapsed,
        "batch_ms": elapsed / batches * 1e3,
        "rtf": elapsed / (batches * features.shape[0] * settings.audio_s),
    }


def concurrent(
    engine: Engine, features: Array, settings: Settings, gpu: Any = cuda, clock: Clock = time.perf_counter
) -> list[dict[str, Any]]:
    """Queries of one utterance per second with several engines at once, each on its own stream.

    One host thread gives each stream its next query when it has seen its last one done, so ``latency_ms`` is from
    giving to seeing: queries wait for their turn, too.
    """
    found: list[dict[str, Any]] = []
    one = repeated(features, 1)
    with ExitStack() as stack:
        lanes: list[Lane] = []
        for count in settings.streams:
            try:
                while len(lanes) < count:
                    copy = engine if not lanes else stack.enter_context(engine.another())
                    lanes.append(stack.enter_context(with_graph_if_possible(copy, one, gpu)))
            except (cuda.CudaError, TensorRTError) as error:
                found.append({"streams": count, "missing": str(error)})
                break
            found.append({"streams": count, **_concurrent(lanes[:count], settings, clock)})
    return found


def _concurrent(lanes: Sequence[Lane], settings: Settings, clock: Clock) -> dict[str, Any]:
    given = [0.0] * len(lanes)
    samples: list[float] = []

    def turn() -> None:
        for i, lane in enumerate(lanes):
            lane.wait()
            now = clock()
            samples.append((now - given[i]) * 1e3)
            given[i] = now
            lane.submit()

    for i, lane in enumerate(lanes):
        given[i] = clock()
        lane.submit()
    repeat(turn, settings.warmup_s, 1, clock)
    samples.clear()
    start = clock()
    repeat(turn, settings.seconds / 2, settings.iterations, clock)
    elapsed = clock() - start
    for lane in lanes:
        lane.wait()
    return {"qps": len(samples) / elapsed, "latency_ms": summary(samples)}


def energy(
    engine: Engine,
    features: Array,
    settings: Settings,
    sensors: Sensors,
    gpu: Any = cuda,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Energy for each utterance, one after the other, the host asleep while it waits."""
    if not settings.energy_s:
        return {"missing": "not asked for"}
    if not sensors.powers_w() and sensors.energy_j() is None:
        return {"missing": "the machine tells no power"}
    try:
        with with_graph_if_possible(engine, repeated(features, 1), gpu, blocking=True) as lane:
            return measure_energy(
                sensors, lambda: repeat(lane.run, settings.energy_s, 1, clock), settings.energy_s, sleep
            )
    except (cuda.CudaError, TensorRTError) as error:
        return {"missing": str(error)}


def measure(
    engine: Engine,
    features: Array,
    settings: Settings,
    sensors: Sensors | None = None,
    say: Say = lambda _: None,
    gpu: Any = cuda,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Everything, as JSON holds it. A context is current, and nothing else uses the GPU.

    Args:
        engine: Loaded.
        features: Of an utterance, (1, frames, num_mel_bins).
        settings: What is measured.
        sensors: Of the machine; None looks for them.
        say: Takes a line about what is being done.
        gpu: What makes streams and events.
        clock: Seconds.
        sleep: Waits so many seconds.
    """
    sensors = open_sensors(pci_bus_id=pci_bus_id()) if sensors is None else sensors
    features = features[:, : settings.frames]
    say("latency in four ways")
    before = sensors.read()
    found = {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "settings": asdict(settings),
        "gpu": engine.record["key"]["gpu"],
        "machine": sensors.describe(),
        "shape": list(features.shape),
        "audio_s": settings.audio_s,
        "before": before,
        "latency": latencies(engine, features, settings, gpu, clock),
    }
    say("throughput by batch size")
    found["throughput"] = throughput(engine, features, settings, gpu, clock)
    say("queries per second with several streams")
    found["concurrent"] = concurrent(engine, features, settings, gpu, clock)
    found["after"] = sensors.read()
    say("energy")
    found["energy"] = energy(engine, features, settings, sensors, gpu, clock, sleep)
    return found


# --- What it says -------------------------------------------------------------------------------------------------


def fastest(measured: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The way of waiting with the lowest median end to end; None if none worked."""
    worked = [entry for entry in measured["latency"] if "missing" not in entry]
    return min(worked, key=lambda entry: float(entry["end_to_end_ms"]["p50"]), default=None)


def row_figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row of the table that were measured here, with notes on how.

    ``latency_ms`` is host to host, as it is for the runtimes of the CPU; features come from the host.
    """
    best = fastest(measured)
    if best is None:
        return {"notes": [f"no latency: {entry['missing']}" for entry in measured["latency"][:1]]}
    latency = best["end_to_end_ms"]
    notes = [
        f"latency from features to outputs in host memory, of {measured['audio_s']:g} s of audio, {way(best)}; on the"
        f" GPU alone {best['compute_ms']['p50']:.3f} ms; rtf and qps without the front end",
        *throttling(measured),
    ]
    return {
        "latency_ms": {name: latency[name] for name in ("mean", "p50", "p95", "p99")},
        "rtf": latency["mean"] / 1e3 / measured["audio_s"],
        "qps": 1e3 / latency["mean"],
        "notes": notes,
    }


def way(entry: Mapping[str, Any]) -> str:
    """How it was waited, in words."""
    return f"{entry['wait']} wait, {'with' if entry['graph'] else 'without'} CUDA graph"


def throttling(measured: Mapping[str, Any]) -> list[str]:
    """What slowed the machine while it was measured, in sentences; none if nothing did."""
    said = []
    for when in ("before", "after"):
        reasons = [reason for reason in measured[when].get("throttled_by") or () if reason not in CHOSEN]
        if reasons:
            said.append(f"slowed {when} measuring by: {', '.join(reasons)}")
    counts = [measured[when].get("over_current_events") or {} for when in ("before", "after")]
    events = sum(counts[1].values()) - sum(counts[0].values())
    if events:
        said.append(f"slowed {events} times by over-current while measuring")
    if measured["machine"].get("gpu_clock_locked") is False:
        said.append("the clock of the GPU was not locked (sudo jetson_clocks locks it)")
    return said


def report(measured: Mapping[str, Any]) -> str:
    """A short table, for people."""
    lines = [f"{measured['machine'].get('name') or measured['gpu']}, {measured['date']}, shape {measured['shape']}"]
    lines.append(
        f"{'wait':<10}{'graph':<7}" + "".join(f"{name:>18}" for name in ("H2D", "compute", "D2H", "end to end"))
    )
    lines.append(" " * 17 + f"{'p50 / p99 ms':>18}" * len(PARTS))
    for entry in measured["latency"]:
        said = entry.get("missing")
        figures = said or "".join(f"{entry[part]['p50']:>10.3f} /{entry[part]['p99']:>6.3f}" for part in PARTS)
        lines.append(f"{entry['wait']:<10}{'yes' if entry['graph'] else 'no':<7}{figures}")
    best = fastest(measured)
    if best is not None:
        lines.append(f"RTF {best['end_to_end_ms']['mean'] / 1e3 / measured['audio_s']:.6f} ({way(best)})")
    for name, key, figure in (("batch", "throughput", "utterances_per_s"), ("streams", "concurrent", "qps")):
        cells = [f"{entry[name]}: {entry[figure]:.0f}" for entry in measured[key] if figure in entry]
        lines.append(f"utterances/s by {name:<8}" + ("  ".join(cells) or "not measured"))
    used = measured["energy"]
    lines.append(
        f"energy: {used['missing']}"
        if "missing" in used
        else f"energy: {used['joules'] * 1e3:.3g} mJ an utterance, {used['joules_above_idle'] * 1e3:.3g} mJ above idle"
        f" ({used['watts']:.1f} W and {used['idle_watts']:.1f} W; {' + '.join(used['total_of'])}, by {used['method']})"
    )
    for when in ("before", "after"):
        found = measured[when]
        hottest = max((found.get("temperatures_c") or {}).values(), default=None)
        clocks = ", ".join(f"{name} {value}" for name, value in (found.get("clocks_mhz") or {}).items())
        lines.append(
            f"{when}: {'temperature not told' if hottest is None else f'{hottest:.0f} C'}, MHz {clocks or '-'}"
        )
    return "\n".join([*lines, *throttling(measured)])


# --- Helpers ------------------------------------------------------------------------------------------------------


def repeated(features: Array, batch: int) -> Array:
    """The first utterance as often as a batch wants."""
    import numpy

    return numpy.ascontiguousarray(numpy.broadcast_to(features[:1], (batch, *features.shape[1:])))


def with_graph_if_possible(engine: Engine, features: Array, gpu: Any, blocking: bool = False) -> Lane:
    """A lane with a CUDA graph, or without one where the kernels cannot be captured."""
    try:
        return Lane(engine, features, True, blocking, gpu)
    except (cuda.CudaError, TensorRTError):
        return Lane(engine, features, False, blocking, gpu)


def pci_bus_id() -> str | None:
    """Where on the bus the GPU of the current context is; NVML counts GPUs otherwise than CUDA does."""
    device, text = ctypes.c_int(), ctypes.create_string_buffer(16)
    library = cuda.library()
    if library.cuCtxGetDevice(ctypes.byref(device)) != 0:
        return None
    return text.value.decode() if library.cuDeviceGetPCIBusId(text, ctypes.c_int(len(text)), device) == 0 else None


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Let the garbage collector rest."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
