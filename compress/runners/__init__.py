"""Running artifacts: one class per runtime."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress.artifact import Artifact, Format
from compress.errors import MachineError
from compress.runners.base import Runner
from compress.runners.onnxruntime_runner import OnnxRuntimeRunner
from compress.runners.openvino import OpenVinoRunner
from compress.runners.tensorrt import TensorRTRunner
from compress.runners.torch_runner import TorchRunner, torch_threads

RUNNERS: tuple[type[Runner], ...] = (TorchRunner, OnnxRuntimeRunner, OpenVinoRunner, TensorRTRunner)

__all__ = [
    "RUNNERS",
    "OnnxRuntimeRunner",
    "OpenVinoRunner",
    "Runner",
    "TensorRTRunner",
    "TorchRunner",
    "golden_outputs",
    "load",
    "open_runner",
    "runners_for",
    "torch_threads",
]


def runners_for(format: Format) -> list[type[Runner]]:
    """Runtimes that load a format and can run here."""
    return [runner for runner in RUNNERS if runner.format == format and runner.missing() is None]


def open_runner(artifact: Artifact, threads: int | None = None, device: str = "cpu") -> Runner:
    """Load an artifact in the first runtime that can run it here.

    Raises:
        MachineError: If there is none.
    """
    if artifact.deferred is not None:
        raise MachineError(
            f"the artifact is not built yet: {artifact.deferred.reason} Then: {artifact.deferred.command}"
        )
    usable = runners_for(artifact.format)
    if not usable:
        reasons = [f"{r.runtime}: {r.missing()}" for r in RUNNERS if r.format == artifact.format]
        raise MachineError(f"no runtime here runs {artifact.format.value} artifacts. {' '.join(reasons)}".rstrip())
    return usable[0](artifact, threads, device)


def load(model: Path | str, threads: int | None = None, arch: str | None = None) -> Runner:
    """Load a model for use.

    Args:
        model: An artifact folder of any format, for example ``runs/demo/03-ptq``, an ``.onnx`` file, a checkpoint
            (with ``arch``), or the name of a network with embedded weights.
        threads: Threads per call; None leaves the choice to the runtime.
        arch: Network of a checkpoint.

    Returns:
        An object with ``embed(waveform, sample_rate) -> (embedding_size,)``.

    Raises:
        SettingError: If ``model`` is neither a known name nor a path.
        ModelError: If what lies there cannot be used.
        MachineError: If no runtime here can run it.
    """
    return open_runner(Artifact.open(model, arch), threads)


def golden_outputs(runner: Runner, inputs: list[NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Inputs (frames, num_mel_bins) or (samples,) and this runner's embeddings, by which a target checks itself."""
    name, golden = runner.artifact.front_end.input_name, {}
    for i, utterance in enumerate(inputs):
        golden[f"{name}_{i}"] = utterance[None]
        golden[f"embedding_{i}"] = runner.run(utterance[None])
    return golden
