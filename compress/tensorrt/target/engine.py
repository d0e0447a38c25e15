"""Engines: building one of a graph, and running it. Everything here runs in a child process (see ``child.py``)."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, Sequence

from . import cuda, plan, versions
from .versions import TensorRTError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

LAST_LINES = 12  # of TensorRT's log, told when it fails
OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient memory|CUDA error: 2\b|Cuda failure: 2\b", re.I)
INT8_KERNEL = re.compile(r"i8i8|int8|_i8|imma|s8s8", re.I)  # in names of kernels


class Log:
    """TensorRT's messages: the last ones are kept, and warnings and errors go to standard error at once."""

    def __init__(self, trt: Any) -> None:
        self.errors: deque[str] = deque(maxlen=LAST_LINES)
        self.warnings: deque[str] = deque(maxlen=LAST_LINES)
        severity = trt.ILogger.Severity
        words = {severity.INTERNAL_ERROR: "error", severity.ERROR: "error", severity.WARNING: "warning"}
        log = self

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                word = words.get(severity)
                if word:
                    print(f"TensorRT {word}: {message}", file=sys.stderr, flush=True)
                    (log.errors if word == "error" else log.warnings).append(message)

        self.logger = Logger()

    def told(self) -> str:
        """The last errors, or warnings if there are none, for the end of a sentence."""
        said = self.errors or self.warnings
        return "\n  ".join(["TensorRT says:", *said]) if said else "TensorRT gives no reason."

    def failure(self, what: str) -> TensorRTError:
        """The error for something that TensorRT did not do."""
        if any(OUT_OF_MEMORY.search(line) for line in self.errors):
            free, total = cuda.memory_info()
            what = (
                f"{what}: out of GPU memory, {free >> 20} of {total >> 20} MiB are free. End other programs that use"
                " the GPU, or give a smaller --max-frames, --max-batch or --workspace-mb"
            )
        return TensorRTError(f"{what}. {self.told()}")


def identity(trt: Any, device: cuda.Device, driver: cuda.Driver) -> dict[str, Any]:
    """What an engine belongs to, as its key has it."""
    return {
        "tensorrt": str(trt.__version__),
        "gpu": device.name,
        "compute_capability": list(device.compute_capability),
        "driver": driver.release or f"CUDA {driver.cuda}",
    }


def started(trt: Any, kind: Callable[[Any], Any], log: Log, driver: cuda.Driver) -> Any:
    """Make a Builder or a Runtime.

    Raises:
        TensorRTError: If TensorRT cannot talk to the driver, which is what pybind11's ``TypeError`` means here.
    """
    try:
        return kind(log.logger)
    except TypeError as error:
        raise TensorRTError(
            f"TensorRT {trt.__version__} does not start with this driver (release {driver.release or 'unknown'}, which"
            f" runs CUDA {driver.cuda} at most): the driver is older than the CUDA that this TensorRT was built for."
            f" Update the driver, or install a TensorRT for CUDA {driver.cuda}. {log.told()}"
        ) from error


def build(
    trt: Any,
    driver: cuda.Driver,
    graph_file: Path,
    graph: Mapping[str, Any],
    profile: Mapping[str, Any],
    workspace_bytes: int,
    cache: Path | None,
    say: Callable[[str], None],
) -> tuple[bytes, dict[str, Any]]:
    """Build an engine; a context is current.

    Args:
        graph_file: The ONNX file.
        graph: Its entry in ``bundle.json``: ``typed``, ``quantized``, ``float_nodes``, ``nodes``.
        profile: Name of the input and its shapes ``min``, ``opt``, ``max``.
        workspace_bytes: Memory to try kernels in.
        cache: File of timings of earlier builds, or None.
        say: Takes a line about what is being done.

    Returns:
        The plan, and what was asked of the build and came of it.

    Raises:
        TensorRTError: If the graph is refused or no engine comes out.
    """
    log = Log(trt)
    builder = started(trt, trt.Builder, log, driver)
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(log.logger, "")
    versions.check_form(trt, graph["typed"])
    bits, network_names = versions.network_flags(trt, graph["typed"])
    network = builder.create_network(bits)
    parser = trt.OnnxParser(network, log.logger)
    say(f"parsing {graph_file.name}")
    if not parser.parse(graph_file.read_bytes()):
        refused = "\n  ".join(versions.parser_errors(parser, list(graph["nodes"]))) or log.told()
        raise TensorRTError(
            f"TensorRT {trt.__version__} does not take {graph_file.name}:\n  {refused}\nWhere the package is installed,"
            f" compress lint {graph_file.name} --version {trt.__version__} tells the remedy."
        )
    config = builder.create_builder_config()
    default_sources = versions.set_common(trt, config, workspace_bytes)
    kept: int = 0
    missed: tuple[str, ...] = ()
    if graph["float_nodes"] and not graph["typed"]:
        names = [node.rpartition(" (")[0] for node in graph["nodes"]]
        kept, missed = versions.keep_in_float(trt, network, graph["float_nodes"], names)
    builder_names = versions.set_builder_flags(trt, config, graph["typed"], graph["quantized"], kept > 0)
    add_profile(builder, config, profile, log)
    told: list[str] = [f"no layer was found for the FP32 nodes {', '.join(missed)}"] if missed else []
    timings = start_cache(config, cache, told)
    say(f"building with flags {', '.join(network_names + builder_names) or 'none'}")
    start = time.monotonic()
    serialized = builder.build_serialized_network(network, config)
    if serialized is None and default_sources is not None:
        told.append("no engine came out without cuBLAS and cuDNN; built with them, so they are needed to load it")
        say(told[-1])
        config.set_tactic_sources(default_sources)
        serialized = builder.build_serialized_network(network, config)
    seconds = time.monotonic() - start
    if serialized is None:
        raise log.failure(f"TensorRT {trt.__version__} built no engine of {graph_file.name}")
    if cache is not None and timings is not None:
        told += filter(None, [plan.write_cache(cache, bytes(config.get_timing_cache().serialize()))])
    return bytes(serialized), {
        "network_flags": list(network_names),
        "builder_flags": list(builder_names),
        "float_layers": kept,
        "build_s": round(seconds, 3),
        "workspace_bytes": workspace_bytes,
        "notes": told,
    }


def add_profile(builder: Any, config: Any, profile: Mapping[str, Any], log: Log) -> None:
    """Tell the sizes that the engine is to take.

    Raises:
        TensorRTError: If TensorRT refuses them.
    """
    shapes = [tuple(profile[kind]) for kind in ("min", "opt", "max")]
    made = builder.create_optimization_profile()
    made.set_shape(profile["input"], *shapes)
    if config.add_optimization_profile(made) < 0:
        raise log.failure(f"the optimization profile {shapes} of {profile['input']} is refused")


def start_cache(config: Any, cache: Path | None, told: list[str]) -> Any:
    """Give a build the timings of earlier ones; what is wrong with them is added to ``told``."""
    if cache is None:
        return None
    data, problem = plan.read_cache(cache)
    told += filter(None, [problem])
    timings = config.create_timing_cache(data)
    if timings is None or not config.set_timing_cache(timings, False):  # False: those of another GPU are refused
        told.append(f"the timing cache {cache} is of another TensorRT or GPU; building without it.")
        timings = config.create_timing_cache(b"")
        if timings is not None:
            config.set_timing_cache(timings, False)
    return timings


def layers_of(inspected: str) -> list[Any]:
    """Layers of an engine inspector's JSON; none where it cannot be read. Names in it may have control characters."""
    try:
        found = json.loads(inspected, strict=False)
    except ValueError:
        return []
    layers = found.get("Layers") if isinstance(found, dict) else None
    return layers if isinstance(layers, list) else []


def int8_layers(inspected: str) -> tuple[int, int]:
    """Of an engine inspector's JSON: weighted layers that run in INT8, and all weighted layers.

    Layers whose precision is not told (those that Myelin took over) count as neither.
    """
    done = weighted = 0
    for entry in layers_of(inspected):
        if not isinstance(entry, dict):  # only names: the engine was built without detailed verbosity
            continue
        weights = entry.get("Weights") or entry.get("Kernel") or {}
        kind = f"{entry.get('ParameterType', '')} {entry.get('LayerType', '')}"
        if not isinstance(weights, dict) or not (weights or re.search(r"conv|gemm|matrix.?multiply|fully", kind, re.I)):
            continue
        if int(weights.get("Count", 1)) == 0:
            continue
        weighted += 1
        kernel = f"{entry.get('TacticName', '')} {weights.get('Type', '')}"
        inputs = [str(port.get("Format/Datatype", "")) for port in entry.get("Inputs", [])]
        done += bool(INT8_KERNEL.search(kernel) or any("int8" in text.lower() for text in inputs[:1]))
    return done, weighted


class Engine(cuda.Owned):
    """A loaded engine with the buffers for one shape at a time. A context has to be current; one thread at a time.

    Made by :func:`load`. To measure, take the steps of :meth:`run` apart::

        engine.set_shape(1, 300)
        engine.host_input[...] = features
        engine.copy_in(stream); engine.enqueue(stream); engine.copy_out(stream)
        stream.synchronize()
        engine.host_outputs["embedding"]

    Attributes:
        input: Name of its input.
        outputs: Names of its outputs.
        record: The plan's sidecar.
        shape: What it is set to, (batch, frames, num_mel_bins); None before the first :meth:`set_shape`.
        host_input: Pinned, of that shape; written before :meth:`copy_in`.
        host_outputs: Pinned, by name; there after :meth:`copy_out` and a wait.
    """

    def __init__(self, trt: Any, data: bytes, record: dict[str, Any], driver: cuda.Driver) -> None:
        self._trt, self._data, self._driver, self.record = trt, data, driver, record
        self._log = Log(trt)
        self._runtime = started(trt, trt.Runtime, self._log, driver)
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(self._log.logger, "")
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            built = record["key"]
            raise self._log.failure(
                f"TensorRT {trt.__version__} does not load the engine, which was built by TensorRT {built['tensorrt']}"
                f" on {built['gpu']} ({capability(built)}) with driver {built['driver']}; build it again with --force"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._log.failure("the engine gives no execution context")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        if len(inputs) != 1:
            raise TensorRTError(f"the engine has {len(inputs)} inputs ({', '.join(inputs)}); one was expected.")
        order = list(record.get("outputs", []))  # the graph's; the engine may have another
        outputs = [name for name in names if name not in inputs]
        self.input = inputs[0]
        self.outputs = sorted(outputs, key=lambda name: order.index(name) if name in order else len(order))
        self.shape: tuple[int, ...] | None = None
        self.host_input: NDArray[Any]
        self.host_outputs: dict[str, NDArray[Any]] = {}
        self._device: dict[str, cuda.DeviceMemory] = {}
        self._host: dict[str, cuda.PinnedMemory] = {}
        self._sizes: dict[str, int] = {}
        self._stream: cuda.Stream | None = None

    @property
    def profile(self) -> dict[str, tuple[int, ...]]:
        """Shapes ``min``, ``opt`` and ``max`` of the input."""
        shapes = self._engine.get_tensor_profile_shape(self.input, 0)
        return {kind: tuple(shape) for kind, shape in zip(("min", "opt", "max"), shapes)}

    @property
    def device_memory_bytes(self) -> int:
        """What one execution context takes beside weights and buffers."""
        name = "device_memory_size_v2" if hasattr(self._engine, "device_memory_size_v2") else "device_memory_size"
        return int(getattr(self._engine, name))

    def set_shape(self, batch: int, frames: int) -> None:
        """Make buffers for a batch of utterances; those that are there are kept where they are large enough.

        Raises:
            TensorRTError: If the profile does not have it: names the range and the setting.
            CudaError: If memory does not suffice.
        """
        shape = (batch, frames, *self.profile["opt"][2:])
        if shape == self.shape:
            return
        check_shape(shape, self.profile, self.input)
        self.shape = None  # until all of it is done: buffers may be of another shape after a failure
        if not self._context.set_input_shape(self.input, shape):
            raise self._log.failure(f"the engine does not take {self.input} of shape {list(shape)}")
        views = {}
        for name in (self.input, *self.outputs):
            views[name] = self._buffer(name, tuple(self._context.get_tensor_shape(name)))
            if not self._context.set_tensor_address(name, self._device[name].address):
                raise self._log.failure(f"the engine does not take the buffer of {name}")
        self.host_input, self.host_outputs = views[self.input], {name: views[name] for name in self.outputs}
        self.shape = shape

    def _buffer(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Pinned memory of a tensor, of the size that its shape wants."""
        import numpy

        if min(shape, default=0) < 0:
            raise TensorRTError(f"the shape of {name} depends on the data ({list(shape)}); that is not supported.")
        dtype = numpy.dtype(versions.NUMPY_NAMES[self._engine.get_tensor_dtype(name).name])
        size = dtype.itemsize
        for length in shape:
            size *= length
        self._sizes[name] = size
        if name not in self._device or self._device[name].size_bytes < size:
            for memory in (self._device.pop(name, None), self._host.pop(name, None)):
                if memory is not None:
                    memory.close()
            self._device[name], self._host[name] = cuda.DeviceMemory(size), cuda.PinnedMemory(size)
        return self._host[name].array(shape, dtype)

    def copy_in(self, stream: cuda.Stream) -> None:
        """Copy ``host_input`` to the GPU."""
        stream.to_device(self._device[self.input], self._host[self.input], self._sizes[self.input])

    def enqueue(self, stream: cuda.Stream) -> None:
        """Compute. Before it is captured in a CUDA graph it has to have been enqueued once with the same shape."""
        if not self._context.execute_async_v3(stream.address):
            raise self._log.failure("the engine does not run")

    def copy_out(self, stream: cuda.Stream) -> None:
        """Copy the outputs to ``host_outputs``."""
        for name in self.outputs:
            stream.to_host(self._host[name], self._device[name], self._sizes[name])

    def run(self, features: Array) -> dict[str, NDArray[Any]]:
        """(batch, frames, num_mel_bins) -> outputs by name, as copies."""
        if self._stream is None:
            self._stream = cuda.Stream()
        rest = self.profile["opt"][2:]
        if features.ndim < 2 or tuple(features.shape[2:]) != rest:
            wanted = ", ".join(["batch", "frames", *map(str, rest)])
            raise TensorRTError(f"{self.input}: shape ({wanted}) was expected, got {features.shape}.")
        self.set_shape(features.shape[0], features.shape[1])
        self.host_input[...] = features
        self.copy_in(self._stream)
        self.enqueue(self._stream)
        self.copy_out(self._stream)
        self._stream.synchronize()
        return {name: array.copy() for name, array in self.host_outputs.items()}

    def another(self) -> Engine:
        """The same engine once more, with its own weights and buffers, to run beside this one.

        Two execution contexts of one engine need two profiles before TensorRT 10; two engines do not.
        """
        return Engine(self._trt, self._data, self.record, self._driver)

    def inspect(self) -> str:
        """The engine inspector's JSON: every layer with its precision and kernel."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        """Give back buffers, engine and stream; before the CUDA context is."""
        for memory in (*self._device.values(), *self._host.values()):
            memory.close()
        self._device, self._host, self.host_outputs, self.shape = {}, {}, {}, None
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._context = self._engine = self._runtime = None


def load(path: Path, device: cuda.Device, driver: cuda.Driver) -> Engine:
    """Load a plan of ours that was built for what is here.

    Args:
        path: The plan; its sidecar lies beside it.
        device: GPU of the current context.

    Raises:
        PlanError: If it is foreign, damaged, or built for something else; it is not deserialized then.
        TensorRTError: If TensorRT is not there or refuses it.
    """
    data, record = plan.read_plan(path)
    trt = versions.import_tensorrt()
    here = identity(trt, device, driver)
    changed = plan.differences({part: record["key"].get(part) for part in here}, here)
    if changed:
        raise plan.PlanError(f"{path} was built for something else: {'; '.join(changed)}. Run python build_engine.py")
    return Engine(trt, data, record, driver)


def agreement(expected: Array, found: Array) -> dict[str, float]:
    """How near an output comes to the expected one, (batch, ...) both; the worst utterance counts."""
    import numpy

    wanted, got = (array.reshape(len(array), -1).astype(numpy.float64) for array in (expected, found))
    not_finite = int(numpy.sum(~numpy.isfinite(got)))
    got = numpy.nan_to_num(got, nan=0.0, posinf=0.0, neginf=0.0)
    norms = numpy.linalg.norm(wanted, axis=1), numpy.linalg.norm(got, axis=1)
    cosine = numpy.sum(wanted * got, axis=1) / numpy.maximum(norms[0] * norms[1], 1e-30)
    return {
        "cosine": float(cosine.min()),
        "max_abs": float(numpy.abs(wanted - got).max()),
        "relative_l2": float((numpy.linalg.norm(wanted - got, axis=1) / numpy.maximum(norms[0], 1e-30)).max()),
        "not_finite": not_finite,
    }


def compare_with_references(
    engine: Engine, file: Path, expected: Mapping[str, Mapping[str, str]]
) -> dict[str, list[dict[str, Any]]]:
    """Run the recorded utterances that the profile takes, alone and, where it takes two, twice in a batch.

    Args:
        file: ``references.npz``: inputs ``features_0``, ``features_1``... and outputs.
        expected: Of what is compared with -> output of the engine -> name of its arrays in the file, without number.

    Returns:
        Of what is compared with -> an entry for each utterance and output: ``frames``, ``batch``, ``output``, and
        those of :func:`agreement`.

    Raises:
        TensorRTError: If the profile takes none of them.
    """
    import numpy

    profile = engine.profile
    found: dict[str, list[dict[str, Any]]] = {against: [] for against in expected}
    lengths = []
    with numpy.load(file, allow_pickle=False) as arrays:
        count = sum(name.startswith("features_") for name in arrays.files)
        for i in range(count):
            features = arrays[f"features_{i}"]
            lengths.append(features.shape[1])
            if not profile["min"][1] <= features.shape[1] <= profile["max"][1]:
                continue
            low = profile["min"][0]
            for copies in sorted({low, max(low, min(2, profile["max"][0]))}):
                outputs = engine.run(numpy.concatenate([features] * copies))
                for against, names in expected.items():
                    for output, name in names.items():
                        wanted = numpy.concatenate([arrays[f"{name}_{i}"]] * copies)
                        about = {"frames": features.shape[1], "batch": copies, "output": output}
                        found[against].append({**about, **agreement(wanted, outputs[output])})
    if not any(found.values()):
        low, high = profile["min"][1], profile["max"][1]
        raise TensorRTError(
            f"none of the recorded utterances ({', '.join(map(str, lengths))} frames) is within the profile ({low} to"
            f" {high} frames), so the engine cannot be checked. Give a wider one: --min-frames, --max-frames."
        )
    return found


def compute_ms(engine: Engine, frames: int, seconds: float) -> float:
    """Median milliseconds that the GPU computes one utterance of ``frames`` frames, without copies."""
    engine.set_shape(engine.profile["min"][0], frames)
    engine.host_input[...] = 0
    times: list[float] = []
    with cuda.Stream() as stream, cuda.Event() as begin, cuda.Event() as end:
        engine.copy_in(stream)
        end_warm, end_all = time.monotonic() + 0.2 * seconds, time.monotonic() + 1.2 * seconds
        while time.monotonic() < end_all or not times:
            begin.record(stream)
            engine.enqueue(stream)
            end.record(stream)
            end.synchronize()
            if time.monotonic() >= end_warm:
                times.append(end.ms_since(begin))
    return sorted(times)[len(times) // 2]


def capability(key: Mapping[str, Any]) -> str:
    """For example ``SM 7.5``."""
    return "SM " + ".".join(map(str, key["compute_capability"]))


def check_shape(shape: Sequence[int], profile: Mapping[str, Sequence[int]], name: str) -> None:
    """Refuse a shape that the profile does not have.

    Raises:
        TensorRTError: With the range and the setting that changes it.
    """
    settings = (("max_batch", "max_batch", "utterances in a batch"), ("min_frames", "max_frames", "frames"))
    for axis, (low_setting, high_setting, what) in enumerate(settings):
        low, high = profile["min"][axis], profile["max"][axis]
        if not low <= shape[axis] <= high:
            setting = low_setting if shape[axis] < low else high_setting
            option = setting.replace("_", "-")
            raise TensorRTError(
                f"{name}: {shape[axis]} {what} are outside the optimization profile ({low} to {high}). Build again with"
                f" --{option} {shape[axis]} (trt.{setting} of the pass)."
            )
