"""The bundle: a folder that builds, checks and measures its own engine on the target."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from compress.files import sha256_of
from compress.onnx_file import open_session
from compress.tensorrt import target
from compress.tensorrt.forms import Forms, forms
from compress.tensorrt.qdq import constants_to_initializers
from compress.tensorrt.target.build_engine import BUNDLE
from compress.tensorrt.target.plan import SCHEMA

if TYPE_CHECKING:
    import onnx

Array: TypeAlias = NDArray[np.float32]
Precision: TypeAlias = Literal["fp16", "int8", "best"]

REFERENCES = "references.npz"
LONGEST_REFERENCE = 3000  # frames: 30 s, of which the features take 1 MB
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

LAUNCHER = '''"""Builds the engine of this folder on the machine with the GPU. See python build_engine.py --help."""

import os
import sys

if sys.version_info < (3, 8):
    sys.exit("error: Python 3.8 or later is needed, this is " + sys.version.split()[0])

from target.build_engine import main

if __name__ == "__main__":
    from pathlib import Path

    sys.exit(main(Path(os.path.dirname(os.path.abspath(__file__))), sys.argv[1:]))
'''


@dataclass(frozen=True)
class BundleSettings:
    """What the engine is to take and to be.

    Attributes:
        min_frames: Shortest, typical and longest utterance of the optimization profile.
        opt_batch: The batch that the engine is tuned for, and the largest.
        precision: ``best`` builds INT8 and FP16, where the graph has Q/DQ, and keeps the faster.
        min_cosine: As near to FP32 INT8 has to be to be kept.
    """

    min_frames: int = 50
    opt_frames: int = 300
    max_frames: int = 3000
    opt_batch: int = 1
    max_batch: int = 1
    precision: Precision = "best"
    min_cosine: float = 0.98


def bundle(
    model: "onnx.ModelProto",
    features: Sequence[Array],
    settings: BundleSettings,
    about: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Make the files of a bundle, by name.

    Args:
        model: Float or with Q/DQ; one input (batch, frames, num_mel_bins), any outputs with the batch first.
        features: Of real utterances, (frames, num_mel_bins) each, for the range of FP16 and for the references.
        settings: What the engine is to be.
        about: What else to tell the target: task, sample rate and so on.

    Raises:
        ModelError: If the graph cannot be converted.
    """
    batches = [utterance[None] for utterance in features]
    made = {main_precision(model): forms(model, batches)}
    if "int8" in made and settings.precision != "int8":
        made["fp16"] = forms(without_quantization(made["int8"].portable), batches)
        if settings.precision == "fp16":
            del made["int8"]
    graphs: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    for precision, both in made.items():
        for typed in (False, True):
            name = f"{'typed' if typed else 'portable'}{'' if len(graphs) < 2 else f'-{precision}'}.onnx"
            graph = both.typed if typed else both.portable
            files[name] = graph.SerializeToString(deterministic=True)
            graphs.append(describe(name, precision, typed, graph, both))
    inputs = reference_inputs(features, reference_lengths(settings))
    portable = {precision: both.portable for precision, both in made.items()}
    files[REFERENCES], outputs = references(inputs, portable)
    for entry in graphs:
        entry["outputs"] = outputs[entry["precision"]]
        entry["reference"] = outputs["fp16"] if entry["precision"] == "int8" and "fp16" in outputs else {}
    files["build_engine.py"] = LAUNCHER.encode()
    for path in sorted(Path(target.__file__).parent.glob("*.py")):
        files[f"target/{path.name}"] = path.read_bytes()
    tensor = next(iter(portable.values())).graph.input[0]
    record = {
        "schema": SCHEMA,
        "speech_compress": version("speech-compress"),
        "input": {"name": tensor.name, "shape": [d.dim_value or None for d in tensor.type.tensor_type.shape.dim]},
        "settings": asdict(settings),
        "graphs": graphs,
        "references": REFERENCES,
        "about": dict(about or {}),
        "sha256": {name: sha256_of(data) for name, data in files.items()},
    }
    return {**files, BUNDLE: (json.dumps(record, indent=1) + "\n").encode()}


def main_precision(model: "onnx.ModelProto") -> str:
    """What a graph is made for: ``int8`` if it has Q/DQ."""
    return "int8" if any(node.op_type == "QuantizeLinear" for node in model.graph.node) else "fp16"


def describe(name: str, precision: str, typed: bool, graph: "onnx.ModelProto", both: Forms) -> dict[str, Any]:
    """An entry of ``graphs`` in ``bundle.json``: what the target has to know without reading ONNX."""
    weighted, quantized = weighted_layers(graph)
    return {
        "file": name,
        "precision": precision,
        "typed": typed,
        "quantized": quantized > 0,
        "weighted_layers": weighted,
        "quantized_layers": quantized,
        "float_nodes": [] if typed else list(both.float_nodes),
        "nodes": [f"{node.name} ({node.op_type})" for node in graph.graph.node],  # of which parsers tell the index
    }


def weighted_layers(model: "onnx.ModelProto") -> tuple[int, int]:
    """Layers with weights in a graph, and those of them whose input and weight are both quantized."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    constant = {tensor.name for tensor in model.graph.initializer}

    def source(name: str) -> str:
        """Where a tensor comes from, before Casts."""
        node = made_by.get(name)
        return source(node.input[0]) if node is not None and node.op_type == "Cast" else name

    def quantized(name: str) -> bool:
        node = made_by.get(source(name))
        return node is not None and node.op_type == "DequantizeLinear"

    def fixed(name: str) -> bool:
        node = made_by.get(source(name))
        while node is not None and node.op_type in ("DequantizeLinear", "QuantizeLinear", "Cast"):
            name = node.input[0]
            node = made_by.get(name)
        return source(name) in constant

    layers = [node for node in model.graph.node if node.op_type in WEIGHTED and fixed(node.input[1])]
    return len(layers), sum(quantized(node.input[0]) and quantized(node.input[1]) for node in layers)


def without_quantization(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Take Q/DQ out of a graph: activations are no longer rounded, weights stored as integers become what these mean.

    Args:
        model: At FP32, scales and zero points constant.
    """
    import onnx
    from onnx import numpy_helper

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    rounding = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    constants_to_initializers(graph, {name for node in rounding for name in node.input})
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    quantizers = {node.output[0]: node for node in rounding if node.op_type == "QuantizeLinear"}
    becomes: dict[str, str] = {}
    for node in rounding:
        if node.op_type == "QuantizeLinear":
            continue
        if node.input[0] in quantizers:
            becomes[node.output[0]] = quantizers[node.input[0]].input[0]
            continue
        integers, scale, *zero = (numpy_helper.to_array(tensors[name]) for name in node.input)
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        shape = [-1 if i == axis else 1 for i in range(integers.ndim)] if scale.size > 1 else [1] * integers.ndim
        offset = zero[0].astype(np.float32).reshape(shape) if zero else np.float32(0)
        values = (integers.astype(np.float32) - offset) * scale.astype(np.float32).reshape(shape)
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
    kept = [node for node in graph.node if node not in rounding]
    for node in kept:
        for i, name in enumerate(node.input):
            node.input[i] = becomes.get(name, name)
    del graph.node[:], graph.value_info[:]  # shapes of tensors that are gone are among these
    graph.node.extend(kept)
    read = {name for node in kept for name in node.input} | {value.name for value in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
    return result


def reference_lengths(settings: BundleSettings) -> list[int]:
    """Frames of the utterances that an engine is checked on: the ends of the profile, the typical, and one between."""
    longest = max(settings.opt_frames, min(settings.max_frames, LONGEST_REFERENCE))
    between = (settings.opt_frames + longest) // 2 | 1  # odd: no multiple of a segment or a tile
    return sorted({settings.min_frames, settings.opt_frames, min(between, longest), longest})


def reference_inputs(features: Sequence[Array], lengths: Sequence[int]) -> list[Array]:
    """Features of exactly so many frames, (1, frames, num_mel_bins): utterances in a row, cut."""
    row = np.concatenate(features)
    row = np.concatenate([row] * -(-max(lengths) // len(row)))
    return [np.ascontiguousarray(row[None, :length], np.float32) for length in lengths]


def references(
    inputs: Sequence[Array], graphs: Mapping[str, "onnx.ModelProto"]
) -> tuple[bytes, dict[str, dict[str, str]]]:
    """Outputs of ONNX Runtime on the portable graphs: an engine differs by the rounding of kernels alone.

    ONNX Runtime optimizes the graphs, so it may compute Q/DQ with integer kernels.

    Returns:
        An ``.npz`` with ``features_0``... and for each precision and output ``<precision>_output<k>_0``...; and of each
        precision the outputs by name with the names of their arrays, without the number.
    """
    arrays: dict[str, Array] = {f"features_{i}": array for i, array in enumerate(inputs)}
    names: dict[str, dict[str, str]] = {}
    for precision, graph in graphs.items():
        session = open_session(graph.SerializeToString(), 1)
        outputs = [output.name for output in session.get_outputs()]
        names[precision] = {name: f"{precision}_output{k}" for k, name in enumerate(outputs)}
        for i, array in enumerate(inputs):
            for name, value in zip(outputs, session.run(outputs, {session.get_inputs()[0].name: array}), strict=True):
                arrays[f"{names[precision][name]}_{i}"] = value
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue(), names
