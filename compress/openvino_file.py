"""OpenVINO networks (IR): read, compiled for this CPU, and kept compiled. Does not import PyTorch."""

import contextlib
import ctypes
import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import files
from compress.errors import MachineError, ModelError
from compress.files import keep, read_kept, sha256_of
from compress.machine import cores, cpu_info

if TYPE_CHECKING:
    import openvino

GRAPH, WEIGHTS = "model.xml", "model.bin"  # OpenVINO's own names: it looks for the weights beside the graph
INFO = "model_info"  # where a graph keeps its metadata, as in OpenVINO's Model API
PRECISION = "inference_precision"  # entry of it: what is not quantized is computed in f32 or bf16
FRAMES = "fixed_frames"  # entry of it: a length of utterances for which a network of its own is compiled

_PRECISION = re.compile(rf'<{PRECISION} value="(f32|bf16)"'.encode())
_FRAMES = re.compile(rf'<{FRAMES} value="(\d{{1,9}})"'.encode())


def missing() -> str | None:
    """Why OpenVINO cannot be used here, or None when it can. Does not import it."""
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed. Install it: pip install openvino"
    return None


def need_openvino() -> None:
    """Refuse to go on without OpenVINO.

    Raises:
        MachineError: With the command that installs it.
    """
    reason = missing()
    if reason is not None:
        raise MachineError(reason)


def cache_folder() -> Path | None:
    """Where compiled networks are kept, see :func:`compress.files.cache_folder`."""
    return files.cache_folder("openvino")


def precision_of(graph: bytes) -> str:
    """What a graph asks to be computed in where it is not quantized: ``f32`` or ``bf16``."""
    found = _PRECISION.search(graph)
    return found.group(1).decode() if found else "f32"


def fixed_frames_of(graph: bytes) -> int | None:
    """The length that a graph asks a network of its own for, in frames."""
    found = _FRAMES.search(graph)
    return int(found.group(1)) if found else None


def core() -> "openvino.Core":
    """A core of OpenVINO, with the thread's stack for signals left as it was.

    The CPU plugin of OpenVINO 2026.4.1 gives the thread another one, which is freed with the plugin but may stay in
    use: the next signal with a handler in Python, such as the end of a child process, is then a crash.
    """
    import openvino

    with kept_signal_stack():
        made = openvino.Core()
        made.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin
    return made


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Give the thread back the alternate stack for signals that it had; only Linux is known to need it."""
    if not sys.platform.startswith("linux"):
        yield
        return
    libc = ctypes.CDLL(None)
    before = ctypes.create_string_buffer(64)  # holds a stack_t: pointer, flags, size
    libc.sigaltstack(None, before)
    try:
        yield
    finally:
        libc.sigaltstack(before, None)


def read_network(graph: bytes, weights: bytes) -> "openvino.Model":
    """Read an IR, or an ONNX graph with ``weights`` empty.

    Raises:
        ModelError: If OpenVINO cannot read it.
    """
    import openvino

    try:
        return core().read_model(graph, weights)
    except Exception as error:  # its exceptions are RuntimeError and private classes of the native module
        raise ModelError(f"OpenVINO {openvino.__version__} cannot read the graph: {reason_of(error)}") from error


def compile_network(network: "openvino.Model", threads: int | None, precision: str) -> "openvino.CompiledModel":
    """Compile for this CPU.

    Args:
        network: With dynamic axes or without.
        threads: None takes all cores.
        precision: ``f32`` or ``bf16``. Left to itself, OpenVINO takes bf16 wherever the CPU has it.

    Raises:
        ModelError: If OpenVINO cannot.
    """
    import openvino

    try:
        return core().compile_model(network, "CPU", configuration(threads, precision))
    except Exception as error:
        raise ModelError(f"OpenVINO {openvino.__version__} cannot compile the graph: {reason_of(error)}") from error


def configuration(threads: int | None, precision: str) -> dict[str, Any]:
    """Properties of a compiled network: one utterance at a time, and no threads tied to cores that others share."""
    return {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads or cores(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }


def load_network(
    graph: bytes, weights: bytes, threads: int | None, cache: Path | None, shape: tuple[int, ...] | None = None
) -> "tuple[openvino.CompiledModel, bool]":
    """Compile an IR, or take it from the folder of compiled networks, where it is kept from then on.

    OpenVINO's own cache (``CACHE_DIR``) is not used: it raises on a folder that cannot be written, and a file in which
    some bytes were lost gives wrong embeddings without a word.

    Args:
        graph: ``model.xml``.
        weights: ``model.bin``.
        threads: None takes all cores.
        cache: The folder; None compiles each time.
        shape: Of the only input that it will take, which OpenVINO makes faster code for; None takes every one.

    Returns:
        The compiled network, and whether it came from the folder.

    Raises:
        ModelError: If OpenVINO cannot read or compile it.
    """
    precision = precision_of(graph)
    kept = None if cache is None else cache / f"{key_of(graph, weights, threads, shape)}.blob"
    blob = None if kept is None else read_kept(kept)
    if blob is not None:
        with contextlib.suppress(RuntimeError):  # of a build of the same version that differs after all
            return core().import_model(blob, "CPU", configuration(threads, precision)), True
    read = read_network(graph, weights)
    if shape is not None:
        read.reshape(list(shape))
    network = compile_network(read, threads, precision)
    if kept is not None:
        keep(kept, network.export_model().getvalue())
    return network, False


def key_of(graph: bytes, weights: bytes, threads: int | None, shape: tuple[int, ...] | None = None) -> str:
    """Hash of all that decides what is compiled: the network, OpenVINO, the CPU, the threads and the shape."""
    import openvino

    cpu = [cpu_info().get(name, "") for name in ("model name", "flags")]
    parts = [sha256_of(graph), sha256_of(weights), openvino.__version__, *cpu, str(threads or cores()), str(shape)]
    return sha256_of("\n".join(parts).encode())


def run_once(folder: str, input_shape: tuple[int, ...], threads: int) -> None:
    """Load the IR of an artifact folder and run it a few times: what a small deployed process does the first time."""
    import numpy as np

    graph, weights = ((Path(folder) / name).read_bytes() for name in (GRAPH, WEIGHTS))
    network, _ = load_network(graph, weights, threads, None)
    for _ in range(3):
        network({0: np.zeros(input_shape, np.float32)})


def executed_precisions(network: "openvino.CompiledModel") -> Mapping[str, int]:
    """Count the weighted operators by the precision they run in, as the compiled network itself says: u8, f32, bf16.

    Source: OpenVINO, "Runtime graph" (``layerType``, ``runtimePrecision`` of ``get_runtime_model``).
    """
    found: Counter[str] = Counter()
    for node in network.get_runtime_model().get_ordered_ops():
        kind = _info(node, "layerType")
        weighted = kind in ("Convolution", "Deconvolution", "FullyConnected", "RNNCell", "RNNSeq")
        if weighted or (
            kind == "MatMul" and any(_info(node_of(port), "layerType") == "Const" for port in node.inputs())
        ):
            found[_info(node, "runtimePrecision")] += 1
    return found


def node_of(port: Any) -> Any:
    """The operator that an input takes its values from."""
    return port.get_source_output().get_node()


def _info(node: Any, name: str) -> str:
    info = node.get_rt_info()
    return str(info[name].astype(str)) if name in info else ""


def reason_of(error: BaseException) -> str:
    """What OpenVINO's error says, without the lines that tell where in its source it was raised."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from ", "While validating", "Check '"))]
    return told[0] if told else next((line for line in lines if line), type(error).__name__)
