"""Which channels a prune pass removes: scores, sensitivities and targets brought together for one network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from compress.artifact import MACS_SECONDS, Artifact
from compress.errors import InputError, SettingError
from compress.files import read_json
from compress.models import architecture
from compress.passes.base import Array, Cell, Context, spread
from compress.passes.latency import Stopwatch, course_within, meet_latency, whole_course
from compress.passes.targets import macs_counter, target_of
from compress.surgery import (
    ChannelGraph,
    ParameterCounter,
    Removal,
    Sensitivity,
    activation_scores,
    bn_scale_scores,
    choose_channels,
    cosine_loss,
    kept_groups,
    l1_scores,
    l2_scores,
    measure_sensitivity,
    read_request,
    remove_channels,
    taylor_scores,
    trace,
)
from compress.surgery.labels import IntArray
from compress.surgery.scores import Scores
from compress.surgery.selection import Bounty, Schedule, bundled, meet, schedule_of
from compress.surgery.sensitivity import FRACTIONS, read_sensitivity, write_sensitivity
from compress.surgery.widths import layer_of

if TYPE_CHECKING:
    from compress.passes.prune import Prune

TRACE_FRAMES = 120  # longer than one context segment of CAM++; the trace does not depend on it
CROP_S = 2.0  # of the utterances by which channels are scored
BATCH = 8
TABLE = "sensitivity.json"  # beside embedded weights
TOLD = 5  # sentences on channels that stay although they were asked for


@dataclass(frozen=True)
class Plan:
    """What is going to be removed.

    Attributes:
        graph: The network's channel groups.
        channels: Group name -> channels to remove.
        keep: Groups that the settings leave whole.
        notes: What was asked for and what is reached.
    """

    graph: ChannelGraph
    channels: Removal
    keep: frozenset[str]
    notes: tuple[str, ...]

    def rows(self, artifact: Artifact) -> list[dict[str, Cell]]:
        """The channel groups with what one channel costs, which stay and why, and the widths planned."""
        groups = self.graph.groups()
        counter = macs_counter(artifact, self.graph)
        left = counter.counts(np.eye(len(groups), dtype=np.int64))
        whole = counter.count(np.zeros(len(groups), dtype=np.int64))
        macs = {group.name: whole - int(count) for group, count in zip(groups, left, strict=True)}
        return [
            {
                "group": group.name,
                "width": group.width,
                "planned": group.width - len(tuple(self.channels.get(group.name, ()))),
                "parameters each": group.parameters_per_channel,
                "MACs each": macs.get(group.name),
                "stays because": group.frozen or ("keep names a layer of it" if group.name in self.keep else None),
                "members": tuple(dict.fromkeys(layer_of(m.name) for m in group.members if m.name in self.graph.shapes)),
            }
            for group in self.graph.all_groups
        ]


@dataclass(frozen=True)
class Planner:
    """Makes the plan of a prune pass for one network."""

    settings: "Prune"
    artifact: Artifact
    context: Context

    @cached_property
    def graph(self) -> ChannelGraph:
        """The network's channel groups."""
        self.context.say("tracing channels")
        return trace(self.artifact.module, torch.from_numpy(noise(self.artifact)[None, :TRACE_FRAMES]))

    @cached_property
    def keep(self) -> frozenset[str]:
        """The groups that the settings leave whole."""
        return kept_groups(self.graph, self.settings.keep)

    def plan(self) -> Plan:
        """Choose what to remove.

        Raises:
            SettingError: If the target cannot be reached, or a layer is named that is not there.
            InputError: If a file of channels or sensitivities cannot be used, or utterances have no speakers.
        """
        if self.settings.channels is not None:
            return self.requested(Path(self.settings.channels))
        keep = self.keep  # first of all: a wrong pattern should not be told after minutes of scoring
        scores, notes = self.scores()
        sensitivity = self.sensitivity(scores) if self.settings.scope == "sensitivity" else None
        reach = self.fast if self.settings.latency_ratio is not None else self.small
        channels, told = reach(scores, sensitivity)
        return Plan(self.graph, channels, keep, (*told, *notes))

    def requested(self, path: Path) -> Plan:
        """Remove the channels of a file, as far as they can be."""
        found = read_request(path, self.graph)
        for sentence in found.dropped:
            self.context.say(sentence)
        more = len(found.dropped) - TOLD
        rest = [f"channels of {more} more layers stay"] if more > 0 else []
        told = f"{self.parameters_removed(found.channels)}; the channels are those of {path.name}"
        return Plan(self.graph, found.channels, frozenset(), (told, *found.dropped[:TOLD], *rest))

    def small(self, scores: Scores, sensitivity: Sensitivity | None) -> tuple[Removal, list[str]]:
        """Meet a target that can be counted."""
        settings = self.settings
        target = target_of(settings.target, getattr(settings, settings.target), self.artifact, self.graph)
        selection = choose_channels(
            self.graph,
            scores,
            target.ratio,
            settings.scope,
            settings.round_to,
            counter=target.counter,
            sensitivity=sensitivity,
            keep=self.keep,
            words=target.words,
        )
        removed = removed_counts(self.graph, selection.channels)
        told = [target.met(target.counter.count(0 * removed), target.counter.count(removed))]
        if target.counter.unit != "parameters":
            told.append(self.parameters_removed(selection.channels))
        return selection.channels, told

    def fast(self, scores: Scores, sensitivity: Sensitivity | None) -> tuple[Removal, list[str]]:
        """Build and time networks of several widths until one saves as much latency as asked.

        With a target of size, too, all of them meet it.
        """
        settings, dense = self.settings, self.artifact.module
        asked = settings.latency_ratio
        assert asked is not None, "called only for this target"
        macs = macs_counter(self.artifact, self.graph)
        size = (
            None
            if settings.size_target is None
            else target_of(settings.size_target, getattr(settings, settings.size_target), self.artifact, self.graph)
        )

        def schedule_with(bounty: Bounty | None) -> Schedule:
            return schedule_of(
                self.graph,
                scores,
                settings.scope,
                settings.round_to,
                counter=size.counter if size else macs,
                sensitivity=sensitivity,
                keep=self.keep,
                bounty=bounty,
            )

        schedule = schedule_with(None)
        self.context.say("exporting; candidates are timed beside the dense network in ONNX Runtime, one thread")
        stopwatch = Stopwatch(dense, noise(self.artifact, self.artifact.front_end.frames_of(MACS_SECONDS)))

        def saved(positions: IntArray) -> float:
            return stopwatch.saved(remove_channels(dense, self.graph, schedule.select(positions, macs, 0).channels))

        if size is None:
            course = whole_course(schedule, macs)
        else:
            counter, ratio, words = size.counter, size.ratio, size.words
            course = course_within(schedule_with, macs, lambda order: meet(order, counter, ratio, words), saved)
        level = meet_latency(course, asked, saved, self.context.say, f"prune.latency_ratio {asked}")
        channels = schedule.select(level.positions, macs, asked).channels
        before = stopwatch.dense_ms
        told = (
            f"saved {level.saved:.1%} of the latency (asked {asked:.1%}): {before:.1f} to"
            f" {before * (1 - level.saved):.1f} ms for {MACS_SECONDS:g} s of audio, ONNX Runtime, one thread"
        )
        return channels, [told, self.parameters_removed(channels)]

    def parameters_removed(self, channels: Removal) -> str:
        """A sentence on the parameters."""
        counter = ParameterCounter(self.graph, self.graph.groups())
        removed = removed_counts(self.graph, channels)
        before, after = counter.count(0 * removed), counter.count(removed)
        return f"removed {1 - after / before:.1%} of the parameters: {before:,} to {after:,}"

    def scores(self) -> tuple[Scores, list[str]]:
        """The scores of every group, and a note on groups that the score says nothing of."""
        model, graph, settings = self.artifact.module, self.graph, self.settings
        normalise = settings.normalise
        l1 = l1_scores(model, graph, normalise)
        match settings.score:
            case "l1":
                return l1, []
            case "l2":
                return l2_scores(model, graph, normalise), []
            case "bn_scale":
                scores = bn_scale_scores(model, graph, normalise)
            case "activation":
                scores = activation_scores(model, graph, batches(self.scored_crops()), normalise)
            case _:
                speakers = self.speakers(settings.score_utterances)
                labelled = zip(batches(self.scored_crops()), batches(speakers), strict=True)
                scores = taylor_scores(model, graph, list(labelled), normalise)
        missing = len(l1.keys() - scores.keys())
        if missing == len(l1):
            raise SettingError(f"prune.score {settings.score} says nothing of any channel of this network. Use l1.")
        note = f"{missing} of {len(l1)} groups were scored by l1: {settings.score} says nothing of them"
        return {**l1, **scores}, [note] if missing else []

    def scored_crops(self) -> Tensor:
        """The utterances that channels are scored on."""
        count = self.settings.score_utterances
        self.context.say(f"scoring channels by {self.settings.score} on {count} utterances")
        return self.crops(count)

    def crops(self, count: int) -> Tensor:
        """Utterances of one length, (count, frames, num_mel_bins): cut, or repeated."""
        frames = self.artifact.front_end.frames_of(CROP_S)
        loaded = [load() for load in spread(self.settings.calibration(self.context), count)]
        return torch.from_numpy(np.stack([np.resize(features, (frames, features.shape[1])) for features in loaded]))

    def speakers(self, count: int) -> Tensor:
        """Numbers (count,) of the speakers of the same utterances.

        Raises:
            InputError: If one has none.
        """
        known = self.context.speakers or [None] * len(self.context.calibration)
        speakers = spread(spread(known, self.settings.calibration_utterances), count)
        if None in speakers:
            raise InputError(
                "prune.score taylor needs the speaker of every calibration utterance. Put an utt2spk beside the"
                " calibration list, or choose another score."
            )
        names = sorted({str(speaker) for speaker in speakers})
        return torch.tensor([names.index(str(speaker)) for speaker in speakers])

    def sensitivity(self, scores: Scores) -> Sensitivity:
        """The table of the file that the settings name; measured now, and written there, if it is not there yet."""
        settings, groups = self.settings, self.graph.groups()
        bundles = [[groups[i].name for i in bundle] for bundle in bundled(groups)]
        made_from = {"network": self.artifact.sha256, "score": settings.score, "loss": settings.sensitivity_loss}
        path = packaged_table(self.artifact, made_from) if settings.sensitivity is None else Path(settings.sensitivity)
        if path is not None and path.exists():
            self.context.say(f"sensitivities of {path if settings.sensitivity else 'the embedded weights'}")
            return read_sensitivity(path, made_from, [names[0] for names in bundles])
        if settings.sensitivity_loss == "eer":
            on = "the EER on the trials"
        else:
            on = f"the cosine on {settings.sensitivity_utterances} utterances of {CROP_S:g} s"
        advice = "" if path else "; with prune.sensitivity=FILE.json it is kept for other targets"
        self.context.say(f"sensitivity of {len(bundles)} groups at {len(FRACTIONS)} fractions, by {on}{advice}")
        tracked = self.context.progress.track(bundles, "prune: sensitivity of groups")
        table = measure_sensitivity(self.artifact.module, self.graph, scores, self.loss(), tracked)
        if path is not None:
            write_sensitivity(path, table, made_from)
        return table

    def loss(self) -> Callable[[nn.Module], float]:
        """What is lost by a masked network.

        Raises:
            SettingError: If the EER is asked for and there are no trials.
        """
        if self.settings.sensitivity_loss == "cosine":
            return cosine_loss(self.artifact.module, batches(self.crops(self.settings.sensitivity_utterances)))
        score = self.context.score
        if score is None:
            raise SettingError(
                "prune.sensitivity_loss eer needs trials, which only `compress run` has. Use cosine, or run it there."
            )
        before = score(self.artifact)
        return lambda model: max(0.0, score(replace(self.artifact, model=model)) - before)


def packaged_table(artifact: Artifact, made_from: Mapping[str, str]) -> Path | None:
    """The table of sensitivities that came with embedded weights, if the network still has them and it fits."""
    folder = architecture(artifact.arch).weights if artifact.arch else None
    if folder is None or not (folder / TABLE).exists():
        return None
    found = read_json(folder / TABLE)
    return folder / TABLE if all(found[name] == value for name, value in made_from.items()) else None


def removed_counts(graph: ChannelGraph, channels: Removal) -> IntArray:
    """How many channels each prunable group loses."""
    return np.array([len(tuple(channels.get(group.name, ()))) for group in graph.groups()], dtype=np.int64)


def batches(items: Tensor) -> list[Tensor]:
    """Cut a tensor along its first axis."""
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def noise(artifact: Artifact, frames: int = 300) -> Array:
    """Features to trace, time and check with where no audio is needed: (frames, num_mel_bins) of seeded noise."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((frames, artifact.front_end.num_mel_bins)).astype(np.float32)
