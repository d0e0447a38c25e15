"""One way to speak to TensorRT 8.5 to 11: what a version has is asked of it, and its number is compared once.

No enum is written as a number: their integers move between versions (``STRONGLY_TYPED`` is 1 in 10 and 0 in 11).

Source: ``NvInfer.h`` of 8.5.3, 8.6.1, 10.0, 10.16 and 11.1; the names are tested against the bindings of 8.5 to 11.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

TYPED_FROM = (10, 12)  # precision flags are deprecated from there; strong typing is there since 10.0
OLDEST = (8, 5)  # the first with num_io_tensors and execute_async_v3

NUMPY_NAMES = {  # ours, because trt.nptype(BOOL) asks numpy 1.24 and later for numpy.bool and fails
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}

BROUGHT_BY = (  # a library that TensorRT's own loading misses -> what brings it
    ("libcublas", "nvidia-cublas-cu12 (TensorRT 8.6) or nvidia-cublas-cu11 (8.5) with pip, or the CUDA toolkit"),
    ("libcudnn", "nvidia-cudnn-cu12==8.9.7.29 (TensorRT 8.6) with pip, or the package libcudnn8"),
    ("libnvonnxparser", "tensorrt-cu12-libs with pip (of the bindings' version), or the package libnvonnxparsers"),
    ("libnvinfer_plugin", "tensorrt-cu12-libs with pip (of the bindings' version), or the package libnvinfer-plugin"),
    ("libnvinfer", "tensorrt-cu12-libs with pip (of the bindings' version), or the package libnvinfer"),
    ("libcudart", "the CUDA toolkit, or nvidia-cuda-runtime-cu12 with pip"),
    ("libnvdla", "JetPack; an aarch64 build of TensorRT for Jetson was installed elsewhere"),
)


class TensorRTError(Exception):
    """What TensorRT refused, as a sentence with the next step."""


@dataclass(frozen=True)
class BuildFlags:
    """What a build was asked, by TensorRT's names; for ``build.json``."""

    network: tuple[str, ...]
    builder: tuple[str, ...]


def import_tensorrt() -> Any:
    """Import NVIDIA's package.

    Raises:
        TensorRTError: If it is not there, a library is missing that it needs, or it is older than 8.5.
    """
    try:
        import tensorrt
    except ModuleNotFoundError as absent:
        if absent.name == "tensorrt":
            raise TensorRTError(
                "TensorRT for Python is not installed. On x86-64: pip install tensorrt. On a Jetson it comes with"
                " JetPack: apt install python3-libnvinfer, and use the system's Python."
            ) from None
        raise TensorRTError(f"importing tensorrt fails: {absent}.") from absent
    except ImportError as broken:
        raise TensorRTError(missing_library(str(broken))) from broken
    if version(tensorrt) < OLDEST:
        raise TensorRTError(f"TensorRT {tensorrt.__version__} is too old; 8.5 or later is needed.")
    return tensorrt


def missing_library(message: str) -> str:
    """Say what brings the library that an ImportError names."""
    found = re.search(r"(lib[\w-]+)\.so[\w.]*", message)
    for prefix, package in BROUGHT_BY:
        if found and found.group(1).startswith(prefix):
            return f"importing tensorrt fails: {found.group(0)} is missing. Install {package}."
    return f"importing tensorrt fails: {message}. Install TensorRT again, or put its libraries on LD_LIBRARY_PATH."


def version(trt: Any) -> tuple[int, int]:
    """Major and minor, for example (8, 6)."""
    major, minor = trt.__version__.split(".")[:2]
    return int(major), int(minor)


def takes_flags(trt: Any) -> bool:
    """Whether precision is a flag of the build (8.5 to 10) and not only in the graph (11)."""
    return hasattr(trt.BuilderFlag, "FP16")


def wants_typed(trt: Any) -> bool:
    """Whether the typed graph is to be built: the one choice that goes by number."""
    return not takes_flags(trt) or version(trt) >= TYPED_FROM


def check_form(trt: Any, typed: bool) -> None:
    """Refuse a graph whose precision would have to be a flag where there are no such flags.

    Raises:
        TensorRTError: Naming the form to build.
    """
    if not typed and not takes_flags(trt):
        raise TensorRTError(f"TensorRT {trt.__version__} has no FP16 flag; build its typed graph.")


def network_flags(trt: Any, typed: bool) -> tuple[int, tuple[str, ...]]:
    """What ``create_network`` is given, and its names."""
    flags = trt.NetworkDefinitionCreationFlag
    names = []
    if hasattr(flags, "EXPLICIT_BATCH") and version(trt)[0] < 10:
        names.append("EXPLICIT_BATCH")
    if typed and hasattr(flags, "STRONGLY_TYPED"):
        names.append("STRONGLY_TYPED")
    bits = 0
    for name in names:
        bits |= 1 << int(getattr(flags, name))
    return bits, tuple(names)


def set_builder_flags(trt: Any, config: Any, typed: bool, quantized: bool, float_layers: bool) -> tuple[str, ...]:
    """Set what decides precision; gives the names of the flags.

    Args:
        typed: The graph tells all types; nothing is to be set.
        quantized: It has Q/DQ. TensorRT 8 refuses it without INT8, and layers without Q/DQ want FP16 beside it.
        float_layers: Some layers were told to run in FP32.
    """
    names = []
    if not typed:
        names = ["FP16", "INT8"] if quantized else ["FP16"]
        if float_layers:
            names.append("OBEY_PRECISION_CONSTRAINTS")
    for name in names:
        config.set_flag(getattr(trt.BuilderFlag, name))
    return tuple(names)


def keep_in_float(
    trt: Any, network: Any, names: Iterable[str], nodes: Iterable[str] = ()
) -> tuple[int, tuple[str, ...]]:
    """Make the layers of some nodes run in FP32.

    A layer has the name of its node; where a node gives several, the others end in ``_1``, ``_2``..., and since 10 the
    metadata name the node. Layers that read anything but float (casts, arithmetic of lengths) are left as they are.

    Args:
        names: Of the nodes that are to run in FP32.
        nodes: Names of all nodes of the graph.

    Returns:
        How many layers there were, and the nodes without one: folded away by the parser, or named otherwise.
    """
    wanted, known = set(names), set(nodes)
    found = {name: 0 for name in wanted}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        node = node_of(layer, wanted, known)
        if node is None:
            continue
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        inputs = [tensor for tensor in map(layer.get_input, range(layer.num_inputs)) if tensor is not None]
        floats = all(tensor.dtype == trt.DataType.FLOAT for tensor in (*inputs, *outputs))
        if not outputs or not floats or any(tensor.is_shape_tensor for tensor in inputs):
            continue  # shapes and indices; TensorRT refuses a float precision there
        layer.precision = trt.DataType.FLOAT
        for i, tensor in enumerate(outputs):
            if tensor.is_execution_tensor:
                layer.set_output_type(i, trt.DataType.FLOAT)
        found[node] += 1
    return sum(found.values()), tuple(sorted(name for name, count in found.items() if count == 0))


def node_of(layer: Any, names: set[str], known: set[str]) -> str | None:
    """Which of some ONNX nodes a layer comes from; a layer with the name of a ``known`` one is that one's."""
    if layer.name in names:
        return str(layer.name)
    told = re.search(r"\[ONNX Layer: ([^\]]+)\]", getattr(layer, "metadata", "") or "")
    if told and told.group(1) in names:
        return told.group(1)
    if layer.name in known:
        return None
    numbered = re.fullmatch(r"(.+)_\d+", layer.name)
    return numbered.group(1) if numbered and numbered.group(1) in names else None


def set_common(trt: Any, config: Any, workspace_bytes: int) -> int | None:
    """What every build is given: memory to try kernels in, and an inspector that tells each layer's precision.

    cuBLAS and cuDNN are left out where TensorRT still has them (8.5, 8.6), so that an engine needs neither where it is
    loaded; 8.6 leaves them out by default.

    Returns:
        The sources of kernels that TensorRT 8 has by default, for a build that fails without them; None where
        these are set already, and from 10 on.
    """
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if version(trt)[0] >= 10:
        return None
    default = int(config.get_tactic_sources())
    left_out = ("CUBLAS", "CUBLAS_LT", "CUDNN")
    sources = 0
    for name, source in trt.TacticSource.__members__.items():
        if name not in left_out:
            sources |= 1 << int(source)
    config.set_tactic_sources(sources)
    return default if default != sources else None


def parser_errors(parser: Any, nodes: list[str]) -> list[str]:
    """Everything that the ONNX parser complains of: node, operator, where in its source, and the reason.

    Args:
        nodes: "name (operator)" of each node of the graph: before 10 the parser tells an index only.
    """
    found = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        if hasattr(error, "node_name") and error.node_name():
            where = f"{error.node_name()} ({error.node_operator()})"
        else:
            where = nodes[error.node()] if 0 <= error.node() < len(nodes) else "the graph"
        found.append(f"{where}: {error.desc()} [{error.file()}:{error.line()}]")
    return found
