"""TensorRT engines, in a child process: a crash in native code is an error here and not the end of the program."""

import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compress.artifact import Artifact, Format
from compress.errors import MachineError, ModelError
from compress.machine import probe_cuda
from compress.runners.base import Runner
from compress.tensorrt.target import child, serve
from compress.tensorrt.target.plan import PLAN, sidecar_of

Array = NDArray[np.float32]

LAST_LINES = 4  # of what the child printed, told if it ends


def run_once(folder: str, shape: tuple[int, ...], threads: int) -> None:
    """Load the engine of an artifact folder and run it a few times, in this process: its memory is measured."""
    from compress.tensorrt.target import cuda, engine

    driver = cuda.probe()
    with cuda.Context(), engine.load(Path(folder) / PLAN, driver.devices[0], driver) as loaded:
        for _ in range(3):
            loaded.run(np.zeros(shape, np.float32))


class TensorRTRunner(Runner):
    """Runs an engine that was built here, on the first GPU.

    Features and embeddings go through pipes, which adds to the latency of a call; that of the engine alone is in
    ``build.json``.
    """

    runtime: ClassVar[str] = "tensorrt"
    format: ClassVar[Format] = Format.TENSORRT
    run_once: ClassVar[Callable[[str, tuple[int, ...], int], None]] = staticmethod(run_once)
    device = "cuda"

    def __init__(self, artifact: Artifact, threads: int | None = None, device: str = "cuda") -> None:
        super().__init__(artifact, threads)
        self._turn = threading.Lock()
        folder = tempfile.TemporaryDirectory()
        plan = Path(folder.name) / PLAN
        for path in (plan, sidecar_of(plan)):
            if path.name not in artifact.files:
                raise ModelError(f"the artifact has no {path.name}. Build the engine again: compress trt")
            path.write_bytes(artifact.files[path.name])
        self._log = (Path(folder.name) / "log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-m", serve.__name__, str(plan), "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=child.environment(),
        )
        self.close = weakref.finalize(self, end, self._process, self._log, folder)
        self._answer()

    @classmethod
    def missing(cls) -> str | None:
        """Why engines cannot run here, or None when they can."""
        missing = probe_cuda().missing
        if missing is None and importlib.util.find_spec("tensorrt") is None:
            return "TensorRT is not installed for this Python"
        return missing

    def run(self, inputs: Array) -> Array:
        """(batch, frames, num_mel_bins) -> (batch, embedding_size).

        Raises:
            ModelError: If the engine's profile does not have that shape.
            MachineError: If the engine's process has crashed.
        """
        assert self._process.stdin is not None, "it was asked for"
        with self._turn:
            with suppress(BrokenPipeError):  # it has ended; why is told below
                values = np.ascontiguousarray(inputs, np.float32).tobytes()
                serve.send(self._process.stdin, {"shape": inputs.shape}, values)
            header, data = self._answer()
        return np.frombuffer(data, np.float32).reshape(header["shape"])

    def _answer(self) -> tuple[dict[str, Any], bytes]:
        """The next answer of the child: its header, and the values if it has any."""
        stream = self._process.stdout
        assert stream is not None, "it was asked for"
        line = stream.readline()
        header: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
        if "error" in header:
            raise ModelError(header["error"])
        if not header:
            raise MachineError(f"tensorrt: {child.ending(self._process.wait())}. {self._last_lines()}")
        return header, stream.read(4 * int(np.prod(header["shape"]))) if "shape" in header else b""

    def _last_lines(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()[-LAST_LINES:]
        return "\n  ".join(["The last lines of its log:", *lines]) if lines else "It printed nothing."


def end(process: "subprocess.Popen[bytes]", log: Any, folder: "tempfile.TemporaryDirectory[str]") -> None:
    """Let the child end, which gives back what it has of the GPU."""
    assert process.stdin is not None, "it was asked for"
    assert process.stdout is not None, "it was asked for"
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    log.close()
    folder.cleanup()
