"""OpenVINO on the CPU."""

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compress import openvino_file
from compress.artifact import Artifact, Format
from compress.runners.base import Runner

Array = NDArray[np.float32]


class OpenVinoRunner(Runner):
    """Runs an OpenVINO artifact.

    A compiled network is kept in the user's cache folder, so that loading it again is quick; see
    ``openvino_file.cache_folder``. Where the artifact names a length, utterances of that length run in a network
    compiled for it alone, and the one for all others is loaded with the first of them.

    Attributes:
        from_cache: Whether the network that was loaded first came from there.
    """

    runtime: ClassVar[str] = "openvino"
    format: ClassVar[Format] = Format.OPENVINO
    run_once: ClassVar[Callable[[str, tuple[int, ...], int], None]] = staticmethod(openvino_file.run_once)

    def __init__(self, artifact: Artifact, threads: int | None = None, device: str = "cpu") -> None:
        super().__init__(artifact, threads)
        openvino_file.need_openvino()
        frames = openvino_file.fixed_frames_of(artifact.files[openvino_file.GRAPH])
        self._fixed = artifact.front_end.input_shape(1, frames) if frames else None
        self._requests: dict[tuple[int, ...] | None, Any] = {}  # by the only shape they take
        self._turn = threading.Lock()  # a request serves one caller at a time, and refuses a second
        self.from_cache = self._load(self._fixed)

    @classmethod
    def missing(cls) -> str | None:
        """Why OpenVINO cannot be used here, or None when it can."""
        return openvino_file.missing()

    def run(self, inputs: Array) -> Array:
        """(batch, frames, num_mel_bins), or (batch, samples) if that is taken -> (batch, embedding_size)."""
        shape = self._fixed if inputs.shape == self._fixed else None
        with self._turn:
            if shape not in self._requests:
                self._load(shape)
            given = {0: np.ascontiguousarray(inputs, np.float32)}
            embedding: Array = self._requests[shape].infer(given, share_inputs=True)[0]
        return embedding

    def _load(self, shape: tuple[int, ...] | None) -> bool:
        """Load the network for a shape, None for all; tells whether it had been compiled before."""
        graph, weights = (self.artifact.files[name] for name in (openvino_file.GRAPH, openvino_file.WEIGHTS))
        cache = openvino_file.cache_folder()
        network, kept = openvino_file.load_network(graph, weights, self.threads, cache, shape)
        self._requests[shape] = network.create_infer_request()
        return kept
