"""What the passes have in common that teach a network on speech."""

from compress.data import DataFolder
from compress.machine import probe_cuda
from compress.passes.base import Pass, spread


class LearningPass(Pass):
    """A pass that learns from a data folder, or without one from the calibration list, on a device.

    Attributes:
        data: A data folder of speech; none: the calibration list.
        utterances: So many of the calibration list, without ``data``.
        device: ``cpu`` or ``cuda``.
    """

    data: str | None
    utterances: int
    device: str

    @property
    def calibration_utterances(self) -> int:
        """Utterances of the calibration list, where it is what is learned from."""
        return self.utterances if self.data is None else 0

    def learned(self, calibration: DataFolder) -> DataFolder:
        """The data folder, or what is taken of the calibration list."""
        if self.data is not None:
            return DataFolder.read(self.data)
        return calibration.subset(spread(calibration.utterances, self.utterances))

    def missing(self) -> str | None:
        """Why the device cannot be used here."""
        if self.device == "cuda" and probe_cuda().missing:
            return f"device cuda: {probe_cuda().missing}. Use {self.name}.device=cpu."
        return None
