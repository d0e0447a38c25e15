"""PyTorch, eager, on the CPU or a CUDA device."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from compress.artifact import Artifact, Format
from compress.runners.base import Runner

Array = NDArray[np.float32]


def run_once(folder: str, shape: tuple[int, ...], threads: int) -> None:
    """Load an artifact folder and run it a few times: what a small deployed process does."""
    runner = TorchRunner(Artifact.load(Path(folder)), threads)
    for _ in range(3):
        runner.run(np.zeros(shape, np.float32))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch use so many threads meanwhile.

    Their number decides in which order sums are taken, and so the last bits of a result.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchRunner(Runner):
    """Runs a torch artifact as it is."""

    runtime: ClassVar[str] = "torch"
    format: ClassVar[Format] = Format.TORCH
    run_once: ClassVar[Callable[[str, tuple[int, ...], int], None]] = staticmethod(run_once)

    def __init__(self, artifact: Artifact, threads: int | None = None, device: str = "cpu") -> None:
        super().__init__(artifact, threads)
        self.device = device
        self.model = artifact.module if device == "cpu" else copy.deepcopy(artifact.module).to(device)

    def run(self, inputs: Array) -> Array:
        """(batch, frames, num_mel_bins) -> (batch, embedding_size)."""
        if self.threads is not None and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)  # one setting per process: another runner may have changed it
        with torch.inference_mode():
            tensor = torch.from_numpy(np.ascontiguousarray(inputs)).to(self.device)
            embedding: Array = self.model(tensor).cpu().numpy()  # copying to the CPU waits for the device
        return embedding
