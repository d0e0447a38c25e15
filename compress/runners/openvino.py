"""OpenVINO on the CPU."""

import threading
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from compress import openvino_file
from compress.artifact import Artifact, Format
from compress.runners.base import Runner

Array = NDArray[np.float32]


class OpenVinoRunner(Runner):
    """Runs an OpenVINO artifact.

    A compiled network is kept in the user's cache folder, so that loading it again is quick; see
    ``openvino_file.cache_folder``.

    Attributes:
        from_cache: Whether it was loaded from there.
    """

    runtime: ClassVar[str] = "openvino"
    format: ClassVar[Format] = Format.OPENVINO
    run_once: ClassVar[Callable[[str, tuple[int, ...], int], None]] = staticmethod(openvino_file.run_once)

    def __init__(self, artifact: Artifact, threads: int | None = None, device: str = "cpu") -> None:
        super().__init__(artifact, threads)
        openvino_file.need_openvino()
        graph, weights = (artifact.files[name] for name in (openvino_file.GRAPH, openvino_file.WEIGHTS))
        network, self.from_cache = openvino_file.load_network(graph, weights, threads, openvino_file.cache_folder())
        self._request = network.create_infer_request()
        self._turn = threading.Lock()  # a request serves one caller at a time, and refuses a second

    @classmethod
    def missing(cls) -> str | None:
        """Why OpenVINO cannot be used here, or None when it can."""
        return openvino_file.missing()

    def run(self, inputs: Array) -> Array:
        """(batch, frames, num_mel_bins), or (batch, samples) if that is taken -> (batch, embedding_size)."""
        with self._turn:
            given = {0: np.ascontiguousarray(inputs, np.float32)}
            embedding: Array = self._request.infer(given, share_inputs=True)[0]
        return embedding
