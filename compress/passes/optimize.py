"""Rewriting an ONNX graph for a runtime without changing what it computes."""

from dataclasses import dataclass
from typing import ClassVar, final

from compress.artifact import FILE_NAMES, Artifact, Format
from compress.errors import ModelError, unknown_name
from compress.front_end_graph import join_front_end, split_front_end
from compress.passes.base import Context, Pass
from compress.rewriting import RUNTIMES, Rewriting, Runtime, rewrite


@final
@dataclass(frozen=True)
class Optimize(Pass):
    """Rewrite the graph for a runtime, without loss."""

    name: ClassVar[str] = "optimize"
    accepts: ClassVar[Format] = Format.ONNX
    returns: ClassVar[Format] = Format.ONNX

    runtime: Runtime = "onnxruntime"
    float_form: bool = False  # also forms that pay only while the graph stays in floating point

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise unknown_name("runtime of optimize", self.runtime, RUNTIMES)

    def precision_after(self, precision: str) -> str:
        """The same, from a float graph only.

        Raises:
            ModelError: If the graph is quantized.
        """
        if precision != "fp32":
            raise ModelError(f"optimize takes an fp32 graph; this one is {precision} already. Optimize before ptq.")
        return precision

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        """Rewrite, and compare with the graph as it was at several batch sizes and lengths."""
        import onnx

        self.check_input(artifact)
        context.say(f"rewriting for {self.runtime}")
        front, network = split_front_end(onnx.load_from_string(artifact.onnx))
        done = rewrite(network, self.runtime, self.float_form)
        graph = done.model if front is None else join_front_end(front, done.model)
        files = {FILE_NAMES[Format.ONNX]: graph.SerializeToString()}
        return artifact.with_files(files, self.step(*notes_of(done)), Format.ONNX, artifact.precision)


def notes_of(done: Rewriting) -> tuple[str, ...]:
    """What was rewritten, how often, and how it was checked."""
    applied = "; ".join(f"{name} ({count})" for name, count in done.applied.items())
    shapes = ", ".join(f"{batch}x{frames}" for batch, frames in done.compared)
    return (
        f"rewritten: {applied or 'nothing'}; {done.nodes_before} nodes before, {done.nodes_after} after",
        f"equals the graph before to {done.error:.0e} at (batch x frames) {shapes}",
    )
