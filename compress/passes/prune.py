"""Structured pruning: whole channels are removed, exactly, and batch norm is re-estimated on unlabeled audio."""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch

from compress.artifact import Artifact, Format
from compress.errors import SettingError
from compress.passes.base import Array, Context, Pass
from compress.passes.recovery import batch_norms, mean_cosine, reestimate_batch_norm
from compress.surgery import choose_channels, l1_scores, remove_channels, trace, verify_removal

TRACE_FRAMES = 120  # longer than one context segment of CAM++; the trace does not depend on it
COSINE_UTTERANCES = 20


@final
@dataclass(frozen=True)
class Prune(Pass):
    """Remove the channels with the smallest L1 norm until a fraction of the parameters is gone."""

    name: ClassVar[str] = "prune"
    accepts: ClassVar[Format] = Format.TORCH
    returns: ClassVar[Format] = Format.TORCH

    ratio: float = 0.4  # fraction of PARAMETERS to remove
    scope: str = "uniform"  # uniform: the same share of every group; global: the lowest scores anywhere
    round_to: int | None = None  # widths are multiples of this; by default 8, and 16 after 2-D convolutions
    bn_utterances: int = 60  # unlabeled utterances for batch-norm re-estimation; 0 leaves batch norm as it is

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise SettingError(f"prune.ratio must be in 0..1 (fraction of parameters to remove), got {self.ratio}.")
        if self.scope not in ("uniform", "global"):
            raise SettingError(f"prune.scope must be uniform or global, got '{self.scope}'.")
        if self.round_to is not None and self.round_to < 1:
            raise SettingError(f"prune.round_to must be at least 1, got {self.round_to}.")
        if self.bn_utterances < 0 or self.bn_utterances == 1:
            raise SettingError(f"prune.bn_utterances must be 0 or at least 2, got {self.bn_utterances}.")

    @property
    def calibration_utterances(self) -> int:
        """How many calibration utterances the pass will ask for."""
        return self.bn_utterances

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        """Trace, choose, remove, verify in float64, and re-estimate batch norm."""
        self.check_input(artifact)
        dense = artifact.module
        utterances = [load() for load in context.utterances(self.bn_utterances, "prune.bn_utterances")]
        probes = utterances[:COSINE_UTTERANCES] or [_noise(artifact)]
        context.say("tracing channels")
        graph = trace(dense, torch.from_numpy(probes[0][None, :TRACE_FRAMES]))
        selection = choose_channels(graph, l1_scores(dense, graph), self.ratio, self.scope, self.round_to)  # type: ignore[arg-type]
        pruned = remove_channels(dense, graph, selection.channels)
        context.say("checking that removed equals masked, in float64")
        gate = verify_removal(dense, pruned, graph, selection.channels, torch.from_numpy(probes[0][None]))
        notes = [
            f"removed {selection.achieved:.1%} of the parameters (asked {self.ratio:.1%}):"
            f" {selection.parameters_before:,} to {selection.parameters_after:,}",
            f"removed network equals masked network in float64 to {gate.max_relative_error:.0e}"
            f" ({gate.seconds:.1f} s; a wrong column would show as {gate.control_error:.0e})",
        ]
        if selection.channels and self.bn_utterances and batch_norms(pruned):
            before = mean_cosine(dense, pruned, probes)
            context.say(f"re-estimating batch norm on {len(utterances)} utterances")
            reestimate_batch_norm(pruned, utterances)
            after = mean_cosine(dense, pruned, probes)
            notes.append(
                f"batch norm re-estimated on {len(utterances)} utterances:"
                f" cosine to the dense embedding {before:.3f} to {after:.3f}"
            )
        return artifact.with_model(pruned, self.step(*notes))


def _noise(artifact: Artifact) -> Array:
    """Features to trace and check with where no audio was given: (300, num_mel_bins) of seeded noise."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((300, artifact.front_end.num_mel_bins)).astype(np.float32)
