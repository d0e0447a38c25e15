"""Post-training quantization to INT8, calibrated on unlabeled audio."""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from compress.artifact import FILE_NAMES, Artifact, Format
from compress.errors import ModelError, SettingError
from compress.machine import has_vnni
from compress.passes.base import Array, Context, Pass
from compress.passes.qdq import count_quantized, insert_qdq
from compress.runners import OnnxRuntimeRunner
from compress.vectors import cosine

CHECKED_UTTERANCES = 10


@final
@dataclass(frozen=True)
class PTQ(Pass):
    """Static INT8 with explicit Q/DQ for ONNX Runtime on x86."""

    name: ClassVar[str] = "ptq"
    accepts: ClassVar[Format] = Format.ONNX
    returns: ClassVar[Format] = Format.ONNX

    utterances: int = 40  # calibration utterances, spread evenly over the list
    reduce_range: bool | None = None  # 7-bit weights; by default on a CPU without VNNI, where 8 bits saturate

    def __post_init__(self) -> None:
        if self.utterances < 1:
            raise SettingError(f"ptq.utterances must be at least 1, got {self.utterances}.")

    @property
    def calibration_utterances(self) -> int:
        """How many calibration utterances the pass will ask for."""
        return self.utterances

    def precision_after(self, precision: str) -> str:
        """INT8, from a float graph only.

        Raises:
            ModelError: If the graph is not fp32.
        """
        if precision != "fp32":
            raise ModelError(f"ptq takes an fp32 graph; this one is {precision} already.")
        return "int8"

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        """Calibrate, insert Q/DQ, and compare embeddings with the float graph."""
        import onnx

        self.check_input(artifact)
        utterances = context.utterances(self.utterances, "ptq.utterances")
        reduce_range = not has_vnni() if self.reduce_range is None else self.reduce_range
        context.say(f"calibrating on {len(utterances)} utterances")
        loaded = [load() for load in utterances]
        seconds = sum(map(len, loaded)) * artifact.front_end.frame_shift_ms / 1000
        quantized = insert_qdq(onnx.load_from_string(artifact.onnx), iter(loaded), reduce_range)
        done, weighted = count_quantized(quantized)
        files = {FILE_NAMES[Format.ONNX]: quantized.SerializeToString()}
        result = artifact.with_files(files, self.step(), Format.ONNX, "int8")
        context.say("comparing with the float graph")
        similarity = mean_cosine(artifact, result, loaded[:CHECKED_UTTERANCES], context.threads)
        notes = (
            f"calibrated on {len(loaded)} utterances, {seconds:.0f} s, by their extremes",
            f"{done} of {weighted} weighted operators in INT8: U8 activations, S8 weights per channel"
            + (", 7 bits" if reduce_range else ""),
            f"cosine to the float graph {similarity:.4f} on {len(loaded[:CHECKED_UTTERANCES])} calibration utterances",
        )
        return artifact.with_files(files, self.step(*notes), Format.ONNX, "int8")


def mean_cosine(reference: Artifact, artifact: Artifact, utterances: list[Array], threads: int) -> float:
    """Mean cosine between two ONNX artifacts' embeddings of the same utterances (frames, num_mel_bins)."""
    runners = [OnnxRuntimeRunner(a, threads) for a in (reference, artifact)]
    cosines = []
    for utterance in utterances:
        a, b = (runner.run(utterance[None])[0] for runner in runners)
        cosines.append(cosine(a, b))
    return float(np.mean(cosines))
