"""OpenVINO: the graph as its IR, checked against ONNX Runtime."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final, get_args

import numpy as np

from compress import openvino_file
from compress.artifact import Artifact, Format
from compress.errors import ModelError, SettingError
from compress.front_end_graph import join_front_end, split_front_end
from compress.machine import has_bf16
from compress.openvino_file import FRAMES, GRAPH, PRECISION, WEIGHTS
from compress.passes.base import Array, Context, Pass, spread
from compress.passes.onnx_export import PARITY_SHAPES, TOLERANCE
from compress.passes.openvino_ir import convert
from compress.rewriting import rewrite
from compress.runners import OnnxRuntimeRunner
from compress.vectors import cosine

if TYPE_CHECKING:
    import openvino

Precision = Literal["fp32", "bf16"]

CHECKED_UTTERANCES = 8  # of the calibration list
NEEDED_COSINE = {"bf16": 0.99, "int8": 0.98}  # to ONNX Runtime; kernels round INT8 in different places
COMPUTED_IN = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's names


@final
@dataclass(frozen=True)
class OpenVINO(Pass):
    """Convert the graph for OpenVINO on CPUs: FP32 or BF16, and INT8 where it has Q/DQ."""

    name: ClassVar[str] = "openvino"
    accepts: ClassVar[Format] = Format.ONNX
    returns: ClassVar[Format] = Format.OPENVINO

    precision: Precision = "fp32"  # of everything that is not quantized
    frames: int | None = None  # utterances of exactly so many frames run in a network compiled for that length

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 1:
            raise SettingError(f"openvino.frames must be at least 1, got {self.frames}.")
        if self.precision not in get_args(Precision):
            raise SettingError(
                f"openvino.precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}."
                " INT8 comes from a graph with Q/DQ: run ptq before."
            )

    @property
    def calibration_utterances(self) -> int:
        """BF16 rounds, so it is compared on real features."""
        return CHECKED_UTTERANCES if self.precision == "bf16" else 0

    def missing(self) -> str | None:
        """What this machine lacks for the pass."""
        return openvino_file.missing()

    def precision_after(self, precision: str) -> str:
        """INT8 stays INT8; FP32 becomes what is set.

        Raises:
            ModelError: For another precision.
        """
        if precision not in ("fp32", "int8"):
            raise ModelError(f"openvino takes an fp32 or int8 graph; this one is {precision}.")
        return precision if precision == "int8" else self.precision

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        """Convert, write the metadata, compile, and compare embeddings with ONNX Runtime's."""
        self.check_input(artifact)
        openvino_file.need_openvino()
        check_operators(artifact.onnx)
        precision = self.precision_after(artifact.precision)
        context.say("converting")
        own = {FRAMES: str(self.frames)} if self.frames else {}
        told = {PRECISION: COMPUTED_IN[self.precision], **own}
        source, rewritten = rewritten_for_openvino(artifact) if artifact.precision == "fp32" else (artifact.onnx, [])
        graph, weights = convert(source, told, half=precision == "bf16")
        context.say("compiling")
        network, first_s, again_s = load_twice(graph, weights, context.threads)
        context.say("comparing with ONNX Runtime")
        notes = [
            check_parity(artifact, network, precision, context),
            *rewritten,
            *about_precision(openvino_file.executed_precisions(network), precision, self.precision),
            f"loads in {first_s:.2f} s, and in {again_s:.2f} s where it was compiled before",
        ]
        if self.frames is not None:
            shape = artifact.front_end.input_shape(1, self.frames)
            fixed, _ = openvino_file.load_network(graph, weights, context.threads, None, shape)
            agreement = check_parity_at(shape, artifact, fixed, precision, context)
            notes.append(f"utterances of {self.frames} frames run in a network compiled for them, which {agreement}")
        return artifact.with_files({GRAPH: graph, WEIGHTS: weights}, self.step(*notes), self.returns, precision)


def check_operators(data: bytes) -> None:
    """Refuse what OpenVINO is known to load and then to compute as something else, without a word.

    Raises:
        ModelError: If a serialized graph has an LSTM that was quantized for ONNX Runtime; OpenVINO 2026.4.1 gives
            embeddings of cosine 0.5.
    """
    import onnx

    for node in onnx.load_from_string(data).graph.node:
        if node.op_type == "DynamicQuantizeLSTM":
            raise ModelError(
                f"openvino: '{node.name}' is an LSTM quantized for ONNX Runtime ({node.op_type}), which OpenVINO"
                " computes wrongly. Quantize for it: ptq.target=openvino leaves LSTMs in float."
            )


def rewritten_for_openvino(artifact: Artifact) -> tuple[bytes, list[str]]:
    """The graph of an FP32 artifact in the forms that suit OpenVINO, and a note on what was rewritten.

    A quantized graph stays as it is: its scales belong to its operators.
    """
    import onnx

    front, network = split_front_end(onnx.load_from_string(artifact.onnx))
    done = rewrite(network, "openvino", float_form=True)
    model = done.model if front is None else join_front_end(front, done.model)
    applied = "; ".join(f"{name} ({count})" for name, count in done.applied.items())
    return model.SerializeToString(), [f"rewritten before: {applied}"] if applied else []


def load_twice(graph: bytes, weights: bytes, threads: int) -> "tuple[openvino.CompiledModel, float, float]":
    """Load an IR compiling it, then as it was kept; gives the latter and the seconds that both took."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            started = time.monotonic()
            network, _ = openvino_file.load_network(graph, weights, threads, Path(folder))
            seconds.append(time.monotonic() - started)
    return network, seconds[0], seconds[1]


def check_parity(artifact: Artifact, network: "openvino.CompiledModel", precision: str, context: Context) -> str:
    """Compare embeddings with those of ONNX Runtime at several batch sizes and lengths; gives a note.

    Raises:
        ModelError: If they differ, or OpenVINO cannot run the graph.
    """
    runner = OnnxRuntimeRunner(artifact, context.threads)
    shapes = ", ".join(f"{batch}x{frames}" for batch, frames in PARITY_SHAPES)
    on = f"at (batch x frames) {shapes}"
    pairs = [(run(network, inputs), runner.run(inputs)) for inputs in noise_for(artifact)]
    if precision != "fp32" and context.calibration and not artifact.front_end.in_graph:  # it takes no features
        chosen = spread(context.calibration, min(CHECKED_UTTERANCES, len(context.calibration)))
        speech = [load()[None] for load in chosen]
        pairs = [(run(network, inputs), runner.run(inputs)) for inputs in speech]
        on = f"on {len(speech)} calibration utterances"
    return agreement_of(pairs, precision, on)


def check_parity_at(
    shape: tuple[int, ...], artifact: Artifact, network: "openvino.CompiledModel", precision: str, context: Context
) -> str:
    """The same for a network compiled for one shape: on calibration audio brought to its length, or on noise.

    Raises:
        ModelError: If embeddings differ, or OpenVINO cannot run the graph.
    """
    inputs: Array = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    if precision != "fp32" and context.calibration and not artifact.front_end.in_graph:  # it takes no features
        utterance = context.calibration[0]()
        times = -(-shape[1] // len(utterance))
        inputs = np.concatenate([utterance] * times)[None, : shape[1]]
    pair = run(network, inputs), OnnxRuntimeRunner(artifact, context.threads).run(inputs)
    return agreement_of([pair], precision, "at that length")


def agreement_of(pairs: Sequence[tuple[Array, Array]], precision: str, on: str) -> str:
    """How near embeddings of OpenVINO come to those of ONNX Runtime, pairs of (batch, embedding_size).

    Raises:
        ModelError: If they are too far from each other for the precision.
    """
    if precision == "fp32":
        worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
        if not worst <= TOLERANCE:
            raise ModelError(
                f"openvino: embeddings differ from ONNX Runtime's by {worst:.1e} of the largest value (allowed"
                f" {TOLERANCE:.0e}) {on}. The graph was not converted; report it with its code."
            )
        return f"equals ONNX Runtime to {worst:.0e} {on}"
    cosines = [cosine(x, y) for a, b in pairs for x, y in zip(a, b, strict=True)]
    if not min(cosines) >= NEEDED_COSINE[precision]:
        raise ModelError(
            f"openvino: embeddings differ from ONNX Runtime's, cosine {min(cosines):.4f} (needed"
            f" {NEEDED_COSINE[precision]}) {on}. The graph was not converted; set precision=fp32, or quantize less."
        )
    return f"has cosine {np.mean(cosines):.5f} to ONNX Runtime in the mean, {min(cosines):.5f} at least, {on}"


def noise_for(artifact: Artifact) -> Iterator[Array]:
    """What the network takes, of several batch sizes and lengths."""
    rng = np.random.default_rng(0)
    for batch, frames in PARITY_SHAPES:
        yield rng.standard_normal(artifact.front_end.input_shape(batch, frames), dtype=np.float32)


def run(network: "openvino.CompiledModel", inputs: Array) -> Array:
    """Embeddings of a batch.

    Raises:
        ModelError: If OpenVINO cannot run the graph on this batch and length.
    """
    try:
        embeddings: Array = network({0: np.ascontiguousarray(inputs)})[0]
        reason = "" if len(embeddings) == len(inputs) else f"{len(embeddings)} embeddings come out"
    except RuntimeError as error:
        reason = openvino_file.reason_of(error)
    if reason:
        raise ModelError(
            f"openvino: OpenVINO does not run the graph on {len(inputs)} inputs of shape {list(inputs.shape[1:])}"
            f" ({reason}); ONNX Runtime does. An average pooling over more frames than the input has is one cause."
        )
    return embeddings


def about_precision(executed: Mapping[str, int], precision: str, elsewhere: str) -> list[str]:
    """What the weighted operators run in here, and what is to be known of BF16."""
    wanted = {"fp32": ("f32",), "bf16": ("bf16",), "int8": ("u8", "i8")}[precision]
    done, weighted = sum(executed.get(name, 0) for name in wanted), sum(executed.values())
    notes = [f"{done} of {weighted} weighted operators run in {precision.upper()} here"]
    if precision == "int8":
        notes[0] += f", everything else in {elsewhere.upper()}"
    if elsewhere == "bf16" and not has_bf16():
        notes.append(
            "this CPU has no BF16 instructions: OpenVINO imitates them with AVX-512 and computes in FP32 elsewhere, so"
            " nothing is gained here"
        )
    return notes
