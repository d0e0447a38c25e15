"""Export to ONNX with dynamic batch and frames, checked against PyTorch at several shapes.

With the front end in the graph too, where that is asked for, checked against the one in Python.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
import torch
from torch import nn

from compress.artifact import FILE_NAMES, Artifact, Format
from compress.errors import ModelError, SettingError
from compress.front_end_graph import front_end_graph, join_front_end
from compress.models import MIN_FRAMES, architecture
from compress.onnx_file import FEATURES, ONNX_OPSETS
from compress.passes.base import Array, Context, Pass
from compress.passes.optimize import notes_of
from compress.rewriting import rewrite
from compress.runners import OnnxRuntimeRunner
from compress.vectors import cosine

if TYPE_CHECKING:
    import onnx

INPUT, OUTPUT = FEATURES, "embedding"
SAMPLE_SHAPE = (2, 240)  # batch, frames of the traced example; neither may be 1, which export takes for a constant
PARITY_SHAPES = ((1, 200), (3, 345), (1, 97), (2, 100), (4, 1001))  # under 100 frames, and no multiple of 100, too
TOLERANCE = 1e-4  # relative to the largest embedding value; float32 runs differ by up to 5e-5 of it
FRONT_END_SECONDS = (0.5, 1.3, 3.0)  # of the waveforms on which a front end in the graph is checked
FRONT_END_COSINE = 0.9999  # between embeddings of features computed in the graph and in Python


@final
@dataclass(frozen=True)
class Onnx(Pass):
    """Write the network as an ONNX graph: feats (batch, frames, num_mel_bins) -> embedding.

    Or, with the front end in it: waveform (batch, samples) -> embedding.
    """

    name: ClassVar[str] = "onnx"
    accepts: ClassVar[Format] = Format.TORCH
    returns: ClassVar[Format] = Format.ONNX

    opset: int = 18
    waveform: bool = False  # put the front end into the graph
    optimize: bool = True  # rewrite the graph for ONNX Runtime, as the pass optimize does

    def __post_init__(self) -> None:
        if self.opset not in range(18, ONNX_OPSETS.stop):
            raise SettingError(f"onnx.opset must be in 18..{ONNX_OPSETS.stop - 1}, got {self.opset}.")

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        """Export, fold batch norms, write the metadata and check parity."""
        self.check_input(artifact)
        context.say("exporting")
        told: list[str] = []
        graph = export(artifact.module, artifact.front_end.num_mel_bins, self.opset, told.append)
        add_metadata(graph, artifact)
        try:
            graph, notes = self._checked(artifact, graph, context)
        except ModelError as refusal:
            raise ModelError(" ".join([str(refusal), *(f"{text}." for text in told)])) from refusal
        notes += tuple(told)
        exported = self._exported(artifact, graph, *notes)
        if not self.waveform:
            return exported
        graph = join_front_end(front_end_graph(artifact.front_end, self.opset), graph)
        artifact = replace(artifact, front_end=replace(artifact.front_end, in_graph=True))
        add_metadata(graph, artifact)
        context.say("checking the front end in the graph")
        similarity = front_end_parity(exported, self._exported(artifact, graph), context.threads)
        if not similarity >= FRONT_END_COSINE:
            raise ModelError(
                f"onnx: with the front end in the graph, embeddings have cosine {similarity:.6f} to those of features"
                f" computed in Python (needed {FRONT_END_COSINE}). Leave out waveform, and report it with the network."
            )
        seconds = ", ".join(f"{duration:g}" for duration in FRONT_END_SECONDS)
        inside = f"the front end is in the graph: cosine {similarity:.6f} to the one in Python at {seconds} s"
        return self._exported(artifact, graph, *notes, inside)

    def _checked(
        self, artifact: Artifact, graph: "onnx.ModelProto", context: Context
    ) -> "tuple[onnx.ModelProto, tuple[str, ...]]":
        """The exported graph, rewritten if asked for, with notes on how it was compared with PyTorch."""
        rewritten: tuple[str, ...] = ()
        if self.optimize:
            context.say("rewriting for ONNX Runtime")
            done = rewrite(graph, "onnxruntime")
            graph, rewritten = done.model, notes_of(done)[:1]
        context.say("checking parity with PyTorch")
        error = parity(artifact.module, self._exported(artifact, graph), context.threads)
        if not error <= TOLERANCE:
            raise ModelError(
                f"onnx: the exported graph differs from PyTorch by {error:.1e} of the largest value (allowed"
                f" {TOLERANCE:.0e}). The network was not exported; report it with its code."
            )
        shapes = ", ".join(f"{batch}x{frames}" for batch, frames in PARITY_SHAPES)
        note = f"equals PyTorch to {error:.0e} at (batch x frames) {shapes}; {len(graph.graph.node)} nodes"
        return graph, (note, *rewritten)

    def _exported(self, artifact: Artifact, graph: "onnx.ModelProto", *notes: str) -> Artifact:
        """The artifact of a graph."""
        files = {FILE_NAMES[Format.ONNX]: graph.SerializeToString()}
        return artifact.with_files(files, self.step(*notes), Format.ONNX, artifact.precision)


def export(
    model: nn.Module, num_mel_bins: int, opset: int, say: Callable[[str], None] = lambda _: None
) -> "onnx.ModelProto":
    """Export a network with dynamic batch and frames, by the one exporter of PyTorch or, if it fails, by the other.

    Args:
        model: In evaluation mode.
        num_mel_bins: Of its features.
        opset: Of the graph.
        say: Takes a sentence if the first exporter failed.

    Raises:
        ModelError: If both exporters fail, or silently fix the batch or frames axis; the first line of both.
    """
    exporters = {"torch.export": export_traced, "TorchScript": export_scripted}
    names = list(exporters)
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        names.reverse()
    failures: list[str] = []
    for name in names:
        try:
            with _quiet():
                graph = exporters[name](model, num_mel_bins, opset)
            strip_traces(graph)
            lower_ir_version(graph)
            refuse_fixed_axes(graph)
        except Exception as error:  # exporters raise whatever they meet
            failures.append(f"{name} does not take the network ({first_line(error.__cause__ or error).rstrip('.')})")
            continue
        for failure in failures:
            say(f"{failure}, {name} does")
        return graph
    raise ModelError(f"onnx: the network cannot be exported: {'; '.join(failures)}.")


def refuse_fixed_axes(graph: "onnx.ModelProto") -> None:
    """Read the graph back: an exporter may fix an axis without a word.

    Raises:
        ModelError: If the batch or frames axis of the input is a number.
    """
    fixed = [i for i in (0, 1) if not graph.graph.input[0].type.tensor_type.shape.dim[i].dim_param]
    if fixed:
        names = " and ".join(("batch", "frames")[i] for i in fixed)
        raise ModelError(f"the exporter fixed the {names} axis to the traced size; the network's code uses it")


def export_traced(model: nn.Module, num_mel_bins: int, opset: int) -> "onnx.ModelProto":
    """Export the graph that ``torch.export`` traces."""
    program = torch.onnx.export(
        model,
        (torch.zeros(*SAMPLE_SHAPE, num_mel_bins),),
        dynamo=True,
        opset_version=opset,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("frames", min=MIN_FRAMES)},),
        external_data=False,
        verbose=False,
    )
    assert program is not None, "torch.onnx.export returns a program when dynamo is on and no file is given"
    graph: onnx.ModelProto = program.model_proto
    return graph


def export_scripted(model: nn.Module, num_mel_bins: int, opset: int) -> "onnx.ModelProto":
    """Export by TorchScript, which keeps an LSTM whole.

    ``torch.export`` unrolls it over the frames of the example: that takes minutes, and with some numbers of frames the
    result is good for no other.

    Raises:
        ModelError: If the network's code branches on a value. TorchScript keeps the branch that the example took, and
            other values than those of the parity check may take the other. A number that it freezes is let through:
            parity at several shapes shows whether it mattered.
    """
    import onnx

    example = torch.zeros(*SAMPLE_SHAPE, num_mel_bins)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILE_NAMES[Format.ONNX]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.onnx.export(
                model,
                (example,),
                file,
                dynamo=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "batch", 1: "frames"}, OUTPUT: {0: "batch"}},
            )
        graph = onnx.load(file)
    for warning in caught:
        branches = warning.category.__name__ == "TracerWarning" and "Python boolean" in str(warning.message)
        path = Path(warning.filename)
        if branches and not path.is_relative_to(Path(torch.__file__).parent):  # its layers check their inputs
            raise ModelError(
                f"its code branches on a value at {path.name}:{warning.lineno}; only one branch would be exported"
            )
    with torch.no_grad():
        graph.graph.output[0].type.tensor_type.shape.dim[-1].dim_value = model(example).shape[-1]
    return graph


def strip_traces(graph: "onnx.ModelProto") -> None:
    """Drop the exporter's notes on where in the source each node came from: a megabyte, with paths of this machine."""
    for node in graph.graph.node:
        del node.metadata_props[:]
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.initializer):
        del value.metadata_props[:]
    del graph.graph.value_info[:]
    del graph.graph.metadata_props[:]
    del graph.metadata_props[:]


def lower_ir_version(graph: "onnx.ModelProto") -> None:
    """Give the file the oldest version of the format that its operators need; older runtimes refuse newer ones."""
    import onnx

    graph.ir_version = onnx.helper.find_min_ir_version_for(graph.opset_import, ignore_unknown=True)


def add_metadata(graph: "onnx.ModelProto", artifact: Artifact) -> None:
    """Write what a runtime needs to know into the file, with the keys that sherpa-onnx reads among them.

    Those that sherpa-onnx insists on are left out where the front end is in the graph: it computes features itself.
    """
    import onnx

    front_end = artifact.front_end
    sherpa = architecture(artifact.arch).onnx_metadata if artifact.arch and not front_end.in_graph else {}
    onnx.helper.set_model_props(
        graph,
        {
            "task": artifact.task,
            "sample_rate": str(front_end.sample_rate),
            "num_mel_bins": str(front_end.num_mel_bins),
            "window": front_end.window,
            "output_dim": str(artifact.embedding_size),
            "normalize_samples": "1",
            "feature_normalize_type": "global-mean" if front_end.cmn else "",
            **sherpa,
        },
    )


def parity(model: nn.Module, exported: Artifact, threads: int) -> float:
    """Largest difference between PyTorch and ONNX Runtime over all parity shapes, relative to the largest value."""
    runner = OnnxRuntimeRunner(exported, threads)
    rng = np.random.default_rng(0)
    worst = 0.0
    for batch, frames in PARITY_SHAPES:
        features: Array = rng.standard_normal((batch, frames, exported.front_end.num_mel_bins), dtype=np.float32)
        try:
            with torch.inference_mode():
                expected = model(torch.from_numpy(features)).numpy()
        except RuntimeError as error:
            raise ModelError(
                f"onnx: the network does not run on {batch} x {frames} frames ({first_line(error)}); a deployed one"
                " must take utterances of any length."
            ) from error
        try:
            found = runner.run(features)
        except Exception as error:  # ONNX Runtime's exceptions are private classes of the native module
            raise ModelError(
                f"onnx: the exported graph does not run on {batch} x {frames} frames, as the network does"
                f" ({first_line(error)}). The network was not exported."
            ) from error
        if found.shape != expected.shape:
            return float("inf")
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        worst = max(worst, float(difference))
    return worst


def front_end_parity(on_features: Artifact, on_waveforms: Artifact, threads: int) -> float:
    """Lowest cosine between embeddings of a graph on Python's features and of one with the front end inside.

    The waveforms are noise that dies away, so that features reach from loud to the floor under the logarithm.
    """
    runners = OnnxRuntimeRunner(on_features, threads), OnnxRuntimeRunner(on_waveforms, threads)
    rate, rng = on_features.front_end.sample_rate, np.random.default_rng(0)
    cosines = []
    for duration_s in FRONT_END_SECONDS:
        noise = rng.uniform(-1, 1, int(duration_s * rate))
        waveform: Array = (noise * np.geomspace(0.9, 1e-5, len(noise))).astype(np.float32)
        expected, found = (runner.run(runner.artifact.front_end(waveform)[None])[0] for runner in runners)
        cosines.append(cosine(found, expected))
    return min(cosines)


def first_line(error: BaseException) -> str:
    """What an error says first, without the pages of advice that exporters add."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress prints and deprecation warnings off the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
