"""What every runtime offers: features in, embedding out, with a fixed number of threads."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from compress.artifact import Artifact, Format
from compress.audio import check_waveform, resample
from compress.errors import InputError, ModelError

Array = NDArray[np.float32]


class Runner(ABC):
    """A loaded artifact. A runtime is one subclass, named in ``runners/__init__.py``.

    Attributes:
        runtime: Name in the table.
        format: What it loads.
        run_once: Loads an artifact folder and runs it on input of ``shape`` with ``threads`` threads, in a fresh
            process whose peak memory is measured: (folder, shape, threads).
        threads: Threads per call; None leaves the choice to the runtime.
    """

    runtime: ClassVar[str]
    format: ClassVar[Format]
    run_once: ClassVar[Callable[[str, tuple[int, ...], int], None]]
    device: str = "cpu"

    def __init__(self, artifact: Artifact, threads: int | None = None, device: str = "cpu") -> None:
        if artifact.format != self.format:
            raise ModelError(f"{self.runtime} runs {self.format.value} artifacts, not {artifact.format.value}.")
        self.artifact, self.threads = artifact, threads

    @classmethod
    def missing(cls) -> str | None:
        """Why this runtime cannot run here, or None when it can."""
        return None

    @abstractmethod
    def run(self, inputs: Array) -> Array:
        """(batch, frames, num_mel_bins), or (batch, samples) of a graph with front end -> (batch, embedding_size)."""

    def embed(self, waveform: Array, sample_rate: int) -> Array:
        """Compute the embedding of one utterance.

        Args:
            waveform: (samples,) in [-1, 1).
            sample_rate: Its rate in hertz; resampled where the model's differs.

        Returns:
            (embedding_size,), not length-normalised.

        Raises:
            InputError: If the waveform is empty, too short, all zero, or holds NaN.
            ModelError: If the network gives NaN or infinite values.
        """
        front_end = self.artifact.front_end
        check_waveform(waveform, "waveform")
        resampled = resample(waveform, sample_rate, front_end.sample_rate)
        frames = front_end.num_frames(len(resampled))
        length = f"{len(waveform) / sample_rate:.3f} s ({frames} frames)"
        if frames < self.artifact.min_frames:
            raise InputError(f"a waveform of {length} is too short for an embedding. Give a longer one; 1 s is better.")
        embedding: Array = self.run(front_end(resampled)[None])[0]
        if not np.isfinite(embedding).all():
            raise ModelError(f"{self.runtime}: the embedding of a waveform of {length} is not a number.")
        return embedding
