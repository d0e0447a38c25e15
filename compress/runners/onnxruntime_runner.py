"""ONNX Runtime on the CPU."""

from collections.abc import Callable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from compress import onnx_file
from compress.artifact import Artifact, Format
from compress.runners.base import Runner

Array = NDArray[np.float32]


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX artifact."""

    runtime: ClassVar[str] = "onnxruntime"
    format: ClassVar[Format] = Format.ONNX
    run_once: ClassVar[Callable[[str, tuple[int, ...], int], None]] = staticmethod(onnx_file.run_once)

    def __init__(self, artifact: Artifact, threads: int | None = None, device: str = "cpu") -> None:
        super().__init__(artifact, threads)
        self.session = onnx_file.open_session(artifact.onnx, threads)
        self.input = self.session.get_inputs()[0].name

    def run(self, inputs: Array) -> Array:
        """(batch, frames, num_mel_bins), or (batch, samples) of a graph with front end -> (batch, embedding_size)."""
        embedding: Array = self.session.run(None, {self.input: np.ascontiguousarray(inputs, np.float32)})[0]
        return embedding
