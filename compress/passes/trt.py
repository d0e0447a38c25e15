"""TensorRT: a graph that its parser takes, and the command that builds the engine on the target."""

from dataclasses import dataclass, replace
from typing import ClassVar, final

from compress.artifact import FILE_NAMES, Artifact, Deferral, Format
from compress.errors import ModelError, SettingError
from compress.lint import Profile, Shapes, errors, lint
from compress.machine import probe_cuda
from compress.passes.base import Context, Pass
from compress.tensorrt.qdq import for_tensorrt


@final
@dataclass(frozen=True)
class TRT(Pass):
    """Prepare a TensorRT engine: FP16, with INT8 where the graph has Q/DQ.

    Engines do not travel between GPUs, so the engine is built on the target. The step is deferred with the graph
    to copy there and the ``trtexec`` command to run; trtexec comes with TensorRT and JetPack.
    """

    name: ClassVar[str] = "trt"
    accepts: ClassVar[Format] = Format.ONNX
    returns: ClassVar[Format] = Format.TENSORRT

    min_frames: int = 50  # shortest, typical and longest utterance of the optimization profile, in frames of 10 ms
    opt_frames: int = 300
    max_frames: int = 3000
    max_batch: int = 1

    def __post_init__(self) -> None:
        if not 3 <= self.min_frames <= self.opt_frames <= self.max_frames:
            frames = (self.min_frames, self.opt_frames, self.max_frames)
            raise SettingError(f"trt: 3 <= min_frames <= opt_frames <= max_frames must hold, got {frames}.")
        if self.max_batch < 1:
            raise SettingError(f"trt.max_batch must be at least 1, got {self.max_batch}.")

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        """Rewrite Q/DQ to what TensorRT takes and write down how to build the engine.

        Raises:
            ModelError: If the parser would refuse the graph still, or the front end is in it.
        """
        import onnx

        self.check_input(artifact)
        if artifact.front_end.in_graph:
            raise ModelError(
                "trt: the front end is in the graph, and in FP16 it is wrong: powers of the spectrum leave the range."
                " Export without onnx.waveform."
            )
        context.say("rewriting Q/DQ for TensorRT")
        graph = for_tensorrt(onnx.load_from_string(artifact.onnx))
        onnx.checker.check_model(graph)
        input_name = graph.graph.input[0].name
        findings = lint(graph, self.profile(input_name, artifact.front_end.num_mel_bins))
        if errors(findings):
            refused = "\n".join(map(str, errors(findings)))
            raise ModelError(f"trt: TensorRT would not take the graph; see docs/commands/lint.md.\n{refused}")
        notes = ["FP16 engine"]
        if artifact.precision == "int8":
            notes = ["INT8 with FP16 elsewhere: activations S8 symmetric, biases in float, as its parser demands"]
        notes += [str(finding) for finding in findings]
        deferral = Deferral(self.reason(), self.command(input_name, artifact))
        files = {FILE_NAMES[Format.ONNX]: graph.SerializeToString()}
        waiting = artifact.with_files(files, self.step(*notes), Format.TENSORRT, artifact.precision, deferral)
        return replace(waiting, golden=artifact.golden)  # what the engine's outputs are to be compared with

    def reason(self) -> str:
        """Why no engine is built here."""
        missing = probe_cuda().missing
        return f"{missing or 'engines are built with trtexec on the target'}; no engine was built."

    def profile(self, input_name: str, num_mel_bins: int) -> Profile:
        """Sizes of the features (batch, frames, num_mel_bins) that the engine is to take."""
        sizes = (1, self.min_frames), (1, self.opt_frames), (self.max_batch, self.max_frames)
        return {input_name: Shapes(*((batch, frames, num_mel_bins) for batch, frames in sizes))}

    def command(self, input_name: str, artifact: Artifact) -> str:
        """The ``trtexec`` line to run in the artifact folder on the target (TensorRT 8.5 to 10)."""
        shapes = self.profile(input_name, artifact.front_end.num_mel_bins)[input_name]._asdict()
        profile = " ".join(f"--{kind}Shapes={input_name}:{'x'.join(map(str, size))}" for kind, size in shapes.items())
        int8 = " --int8" if artifact.precision == "int8" else ""
        return f"trtexec --onnx=model.onnx --fp16{int8} {profile} --saveEngine=model.plan"
