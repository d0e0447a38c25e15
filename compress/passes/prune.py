"""Structured pruning: whole channels are removed, exactly, and the network recovers on unlabeled audio."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, final, get_args

import torch
from torch import nn

from compress.artifact import MACS_SECONDS, Artifact, Format
from compress.errors import InputError, SettingError
from compress.passes.base import Array, Context, Pass, Preview, spread
from compress.passes.planning import Plan, Planner, noise
from compress.passes.recovery import batch_norms, mean_cosine, reconstruct_consumers, reestimate_batch_norm
from compress.surgery import Normalise, Scope, remove_channels, verify_removal, widths_stored_in

COSINE_UTTERANCES = 20
DEFAULT_RATIO = 0.4

Score: TypeAlias = Literal["l1", "l2", "bn_scale", "activation", "taylor"]
Loss: TypeAlias = Literal["cosine", "eer"]

FRACTIONS = {
    "ratio": "parameters to remove",
    "macs_ratio": "multiply-accumulates to remove",
    "latency_ratio": "latency to save",
}
TARGETS = (*FRACTIONS, "params", "size_mb", "channels")
SIZES = ("ratio", "params", "size_mb")  # targets that latency_ratio may be given together with
CHOICES = {
    "scope": get_args(Scope),
    "score": get_args(Score),
    "normalise": get_args(Normalise),
    "sensitivity_loss": get_args(Loss),
}


@final
@dataclass(frozen=True)
class Prune(Pass):
    """Remove whole channels, those that matter least, until the network is as small or as fast as asked."""

    name: ClassVar[str] = "prune"
    accepts: ClassVar[Format] = Format.TORCH
    returns: ClassVar[Format] = Format.TORCH

    ratio: float | None = None  # fraction of PARAMETERS to remove; 0.4 if no target is given
    macs_ratio: float | None = None  # fraction of the multiply-accumulates to remove
    latency_ratio: float | None = None  # fraction of the latency to save, measured here in ONNX Runtime, one thread
    params: int | None = None  # parameters to leave
    size_mb: float | None = None  # megabytes (10^6 bytes) of fp32 weights to leave
    channels: str | None = None  # a file of channels by layer, or of masks, chosen elsewhere: they go as they are
    scope: Scope = "sensitivity"  # the least loss; uniform: the same share of every group; global: the lowest scores
    score: Score = "l1"  # l1, l2, bn_scale, activation (on unlabeled speech), taylor (with speakers)
    normalise: Normalise = "mean"  # scores are divided by the mean of their group, its max, or none
    score_utterances: int = 32  # for the scores activation and taylor
    sensitivity: str | None = None  # file of the table of scope sensitivity: read if it is there, else written
    sensitivity_loss: Loss = "cosine"  # to the dense embedding; or eer, on the run's trials
    sensitivity_utterances: int = 8  # for the loss cosine
    round_to: int | None = None  # widths are multiples of this; by default 8, and 16 for 2-D convolutions
    keep: tuple[str, ...] = ()  # names of layers to leave whole, with * and ?
    bn_utterances: int = 60  # unlabeled utterances to re-estimate batch norm on, or without any, to fit weights on

    def __post_init__(self) -> None:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        both = self.latency_ratio is not None and self.size_target is not None
        if len(given) > (2 if both else 1):
            raise SettingError(
                f"prune: one target is needed, got {' and '.join(given)}. Leave all but one out;"
                " latency_ratio alone may stand beside one of size."
            )
        if both and self.scope != "sensitivity":
            raise SettingError(
                f"prune: two targets, {' and '.join(given)}, need the scope sensitivity, got '{self.scope}'."
            )
        if not given:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        for name, what in FRACTIONS.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise SettingError(f"prune.{name} must be in 0..1 (fraction of {what}), got {value}.")
        if self.size_mb is not None and not 0 < self.size_mb < float("inf"):
            raise SettingError(f"prune.size_mb must be more than 0, got {self.size_mb}.")
        for name in ("params", "round_to", "score_utterances", "sensitivity_utterances"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"prune.{name} must be at least 1, got {value}.")
        if self.bn_utterances < 0 or self.bn_utterances == 1:
            raise SettingError(f"prune.bn_utterances must be 0 or at least 2, got {self.bn_utterances}.")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                listed = f"{', '.join(known[:-1])} or {known[-1]}"
                raise SettingError(f"prune.{name} must be {listed}, got '{getattr(self, name)}'.")
        if self.channels is not None and self.keep:
            raise SettingError("prune: channels says what goes, layer by layer. Leave keep out.")

    @property
    def target(self) -> str:
        """The name of the setting that says how far to go."""
        return next(name for name in TARGETS if getattr(self, name) is not None)

    @property
    def size_target(self) -> str | None:
        """The name of the setting that says how small the network is to be, if one does."""
        return next((name for name in SIZES if getattr(self, name) is not None), None)

    @property
    def calibration_utterances(self) -> int:
        """How many calibration utterances the pass will ask for."""
        return max(self._utterances_for.values())

    @property
    def _utterances_for(self) -> dict[str, int]:
        """The settings by which utterances are asked for, as far as they matter."""
        scored = self.channels is None and self.score in ("activation", "taylor")
        measured = self.scope == "sensitivity" and self.sensitivity_loss == "cosine"
        known = self.sensitivity is not None and Path(self.sensitivity).exists()
        compared = self.channels is None and measured and not known
        return {
            "prune.bn_utterances": self.bn_utterances,
            "prune.score_utterances": self.score_utterances if scored else 0,
            "prune.sensitivity_utterances": self.sensitivity_utterances if compared else 0,
        }

    def calibration(self, context: Context) -> list[Callable[[], Array]]:
        """All utterances that the pass asks for; each part of it takes some of them.

        Raises:
            InputError: If there are fewer.
        """
        wanted = self._utterances_for
        if not context.calibration and wanted["prune.sensitivity_utterances"]:
            raise InputError(
                "prune.scope sensitivity measures on unlabeled utterances, and there are none. Give a --calib list, or"
                " set prune.scope=uniform and prune.bn_utterances=0."
            )
        return context.utterances(self.calibration_utterances, max(wanted, key=wanted.__getitem__))

    @property
    def reads(self) -> tuple[str, ...]:
        """The file of channels."""
        return () if self.channels is None else (self.channels,)

    def preview(self, artifact: Artifact, context: Context) -> Preview:
        """The channel groups, what one channel of each costs, and the widths planned."""
        self.check_input(artifact)
        known = self.sensitivity is not None and Path(self.sensitivity).exists()
        plan = Planner(self if known else replace(self, sensitivity=None), artifact, context).plan()
        return Preview(tuple(plan.rows(artifact)), (*plan.notes, f"MACs are for {MACS_SECONDS:g} s of audio"))

    def run(self, artifact: Artifact, context: Context) -> Artifact:
        """Trace, choose, remove, verify in float64, and recover on unlabeled utterances."""
        self.check_input(artifact)
        dense = artifact.module
        utterances: list[Array] = []
        if self.bn_utterances:
            utterances = [load() for load in spread(self.calibration(context), self.bn_utterances)]
        probes = utterances[:COSINE_UTTERANCES] or [noise(artifact)]
        plan = Planner(self, artifact, context).plan()
        pruned = remove_channels(dense, plan.graph, plan.channels)
        context.say("checking that removed equals masked, in float64")
        gate = verify_removal(dense, pruned, plan.graph, plan.channels, torch.from_numpy(probes[0][None]))
        notes = [
            *plan.notes,
            f"removed network equals masked network in float64 to {gate.max_relative_error:.0e}"
            f" ({gate.seconds:.1f} s; a wrong column would show as {gate.control_error:.0e})",
        ]
        if plan.channels and self.bn_utterances:
            context.say(f"recovering on {len(utterances)} utterances")
            pruned, note = recover(dense, pruned, plan, utterances, probes)
            notes.append(note)
        return artifact.with_model(pruned, self.step(*notes), widths_stored_in(pruned, plan.graph))


def recover(
    dense: nn.Module, pruned: nn.Module, plan: Plan, utterances: list[Array], probes: list[Array]
) -> tuple[nn.Module, str]:
    """Re-estimate batch norm, or without any, fit the weights that lost inputs; kept if embeddings come nearer.

    Returns:
        The better network, and what was done with the mean cosine to the dense embedding before and after.
    """
    recovered = copy.deepcopy(pruned)
    if batch_norms(pruned):
        reestimate_batch_norm(recovered, utterances)
        done = "batch norm re-estimated"
    else:
        fitted = reconstruct_consumers(dense, recovered, plan.graph, plan.channels, utterances)
        done = f"{len(fitted)} weights that lost inputs fitted by least squares"
    before, after = mean_cosine(dense, pruned, probes), mean_cosine(dense, recovered, probes)
    note = f"{done} on {len(utterances)} utterances: cosine to the dense embedding {before:.3f} to {after:.3f}"
    return (recovered, note) if after >= before else (pruned, f"{note}, so it was left as it was")
