"""ONNX files: read safely, described without being run, and opened in ONNX Runtime. Does not import PyTorch."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.errors import ModelError
from compress.machine import cores

if TYPE_CHECKING:
    import onnx
    import onnxruntime

ONNX_OPSETS = range(13, 24)  # 13 has per-channel Q/DQ; 23 is the newest that onnxruntime 1.20 to 1.31 were tried on


# Names in a graph that computes the features itself: its input, the tensor of features, and how all names before that
# tensor begin.
WAVEFORM, FEATURES, FRONT_END = "waveform", "feats", "front_end/"


@dataclass(frozen=True)
class OnnxFile:
    """A graph with one input (batch, frames, num_mel_bins) and one output (batch, embedding_size).

    Attributes:
        takes_waveform: It computes the features itself; the input is (batch, samples).
    """

    data: bytes
    num_mel_bins: int
    embedding_size: int
    params: int
    precision: str
    metadata: Mapping[str, str]
    takes_waveform: bool = False


def read_onnx(path: Path) -> OnnxFile:
    """Read and check an ONNX file.

    Raises:
        ModelError: If it is missing, corrupt, of an unsupported opset, has external data outside its folder, or
            is not a features-in, embedding-out network.
    """
    import onnx

    model = read_graph(path)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset not in ONNX_OPSETS:
        raise ModelError(
            f"{path} has opset {opset}; supported are {ONNX_OPSETS.start} to {ONNX_OPSETS.stop - 1}."
            " Export it again with opset 18."
        )
    _load_external_data(model, path)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:  # ValueError: names that are not UTF-8
        raise ModelError(f"{path} is not a valid ONNX graph: {str(error).splitlines()[0]}") from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    takes_waveform = has_front_end(model)
    mel, size = _axes_of_waveform_graph(model, path, metadata) if takes_waveform else _fixed_axes(model, path)
    quantized = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    precision = "int8" if quantized else "fp32"
    return OnnxFile(model.SerializeToString(), mel, size, count_weights(model), precision, metadata, takes_waveform)


def read_graph(path: Path) -> "onnx.ModelProto":
    """Read an ONNX file as it is, without what lies in other files.

    Raises:
        ModelError: If it is missing or corrupt.
    """
    import onnx

    if not path.is_file():
        raise ModelError(f"{path}: no such ONNX file.")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own exception classes differ between its implementations
        raise ModelError(f"{path} is not a readable ONNX file. Is it truncated?") from error
    if not model.graph.node:
        raise ModelError(f"{path} is not a readable ONNX file: its graph has no nodes.")
    return model


def has_front_end(model: "onnx.ModelProto") -> bool:
    """Whether a graph takes a waveform and computes the features itself, as ``compress.front_end_graph`` joins them."""
    takes_waveform = any(value.name == WAVEFORM for value in model.graph.input)
    return takes_waveform and any(FEATURES in node.output for node in model.graph.node)


def count_weights(model: "onnx.ModelProto") -> int:
    """Count the logical weights of the network: elements of weight initializers, without scales and zero points."""
    import onnx

    helpers = {
        name
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for name in node.input[1:]
    }
    weights = (t for t in model.graph.initializer if t.name not in helpers and t.data_type != onnx.TensorProto.INT64)
    return sum(math.prod(tensor.dims) for tensor in weights if not tensor.name.startswith(FRONT_END))


def with_metadata(data: bytes, key: str, value: str | None) -> bytes:
    """Set a key in the metadata of a serialized graph, or take it out if the value is None."""
    if value is None and key.encode() not in data:
        return data  # without reading a large file
    import onnx

    model = onnx.load_from_string(data)
    told = {entry.key: entry.value for entry in model.metadata_props if entry.key != key}
    onnx.helper.set_model_props(model, told if value is None else told | {key: value})
    changed: bytes = model.SerializeToString()
    return changed


def open_session(model: bytes, threads: int | None, plan_memory: bool = True) -> "onnxruntime.InferenceSession":
    """Open a CPU session.

    Args:
        model: The serialized graph.
        threads: Per call; None takes all cores.
        plan_memory: Whether to keep a plan of the memory for each input shape; plans of many shapes add up.

    Raises:
        ModelError: If ONNX Runtime cannot load the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = plan_memory
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions are private classes of the native module
        raise ModelError(f"ONNX Runtime {onnxruntime.__version__} cannot load the graph: {error}") from error


def run_once(folder: str, shape: tuple[int, ...], threads: int) -> None:
    """Load ``model.onnx`` of an artifact folder and run it a few times: what a small deployed process does."""
    session = open_session((Path(folder) / "model.onnx").read_bytes(), threads)
    inputs = np.zeros(shape, np.float32)
    for _ in range(3):
        session.run(None, {session.get_inputs()[0].name: inputs})


def _load_external_data(model: "onnx.ModelProto", path: Path) -> None:
    import onnx
    from onnx.external_data_helper import load_external_data_for_model, uses_external_data

    folder = path.parent.resolve()
    external = [tensor for tensor in _tensors(model) if uses_external_data(tensor)]
    for tensor in external:
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
        if location is None:
            raise ModelError(f"{path}: weight {tensor.name} is external, but the file does not say where it lies.")
        target = (folder / location).resolve()
        if not target.is_relative_to(folder):
            raise ModelError(f"{path}: weight {tensor.name} lies outside the file's folder ({location}); refused.")
        if not target.is_file():
            raise ModelError(f"{path}: the file {location} with weight {tensor.name} is missing beside it.")
    if external:
        try:
            load_external_data_for_model(model, str(folder))
        except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
            raise ModelError(f"{path}: external weights cannot be read ({error}).") from error


def load_reachable_data(model: "onnx.ModelProto", folder: Path) -> None:
    """Load external data in place, as far as it lies in the folder and can be read; the rest stays external."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

    for tensor in (tensor for tensor in _tensors(model) if uses_external_data(tensor)):
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        target = (folder / location).resolve()
        if not target.is_relative_to(folder.resolve()) or not target.is_file():
            continue
        try:
            load_external_data_for_tensor(tensor, str(folder))
        except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError):
            continue
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _tensors(model: "onnx.ModelProto") -> Iterator["onnx.TensorProto"]:
    """Every tensor that may hold data outside the file: initializers, and constants of nodes at any depth."""
    yield from _tensors_of_graph(model.graph)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)


def _tensors_of_graph(graph: "onnx.GraphProto") -> Iterator["onnx.TensorProto"]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: "Iterable[onnx.NodeProto]") -> Iterator["onnx.TensorProto"]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in ((attribute.g,) if attribute.HasField("g") else ()) + tuple(attribute.graphs):
            yield from _tensors_of_graph(graph)


def _fixed_axes(model: "onnx.ModelProto", path: Path) -> tuple[int, int]:
    """Mel bins of the input and width of the output."""
    import onnx

    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ModelError(
            f"{path} has {len(inputs)} inputs and {len(model.graph.output)} outputs; one input (batch, frames,"
            " num_mel_bins) and one output (batch, embedding_size) are needed."
        )
    (mel, rank), (size, out_rank) = (_last_axis(value) for value in (inputs[0], model.graph.output[0]))
    if rank != 3 or out_rank != 2 or not mel or not size:
        raise ModelError(
            f"{path}: input of rank {rank} and output of rank {out_rank} with last axes {mel} and {size}; needed are"
            " (batch, frames, num_mel_bins) and (batch, embedding_size), the last axes fixed. Graphs that take a"
            " waveform are read if the pass onnx wrote them."
        )
    kinds = [onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type) for v in (inputs[0], model.graph.output[0])]
    if kinds != ["FLOAT", "FLOAT"]:
        raise ModelError(f"{path} takes {kinds[0]} and gives {kinds[1]}; float32 is needed.")
    batch, frames = (axis.dim_value for axis in inputs[0].type.tensor_type.shape.dim[:2])
    if frames or batch > 1:
        only = f"{frames} frames" if frames else f"a batch of {batch}"
        raise ModelError(
            f"{path} takes {only} only; utterances come one at a time and are of any length. Export it again with"
            " dynamic batch and frames."
        )
    return mel, size


def _axes_of_waveform_graph(model: "onnx.ModelProto", path: Path, metadata: Mapping[str, str]) -> tuple[int, int]:
    """Mel bins of the front end within a graph, and width of the output."""
    (size, rank), mel = _last_axis(model.graph.output[0]), metadata.get("num_mel_bins", "")
    if rank != 2 or not size or not mel.isdecimal():
        raise ModelError(
            f"{path} takes a waveform; its output must be (batch, embedding_size), the last axis fixed, and its"
            f" metadata must tell num_mel_bins. It gives rank {rank} with last axis {size}, and '{mel}'."
        )
    return int(mel), size


def _last_axis(value: "onnx.ValueInfoProto") -> tuple[int, int]:
    axes = value.type.tensor_type.shape.dim
    return (axes[-1].dim_value if axes else 0), len(axes)
