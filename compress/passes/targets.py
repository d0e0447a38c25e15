"""What pruning is to reach: a fraction that goes, or a size that is left."""

from dataclasses import dataclass

import numpy as np
import torch

from compress.artifact import MACS_SECONDS, Artifact
from compress.errors import SettingError
from compress.surgery import ByteCounter, ChannelGraph, Counter, MacsCounter, ParameterCounter
from compress.units import format_count

MB = 1_000_000


@dataclass(frozen=True)
class Target:
    """What is to be removed, as it was asked for.

    Attributes:
        setting: ``ratio``, ``macs_ratio``, ``params`` or ``size_mb``.
        asked: Its value.
        counter: Counts what the setting is about.
        ratio: The fraction of that to remove.
    """

    setting: str
    asked: float
    counter: Counter
    ratio: float

    @property
    def words(self) -> str:
        """The setting and its value, for errors."""
        return (
            f"prune.{self.setting} {self.asked:,}" if self.setting == "params" else f"prune.{self.setting} {self.asked}"
        )

    def met(self, before: int, after: int) -> str:
        """Tell what was reached, from the counts before and after."""
        removed = f"removed {1 - after / before:.1%} of the {self.counter.unit}"
        match self.setting:
            case "ratio":
                return f"{removed} (asked {self.asked:.1%}): {before:,} to {after:,}"
            case "macs_ratio":
                span = f"{format_count(before)} to {format_count(after)} for {MACS_SECONDS:g} s of audio"
                return f"{removed} (asked {self.asked:.1%}): {span}"
            case "params":
                return f"{removed}: {before:,} to {after:,} (asked {self.asked:,})"
            case _:
                return f"{removed}: {before / MB:.2f} MB to {after / MB:.2f} MB (asked {self.asked:g} MB)"


def target_of(setting: str, asked: float, artifact: Artifact, graph: ChannelGraph) -> Target:
    """Read a target for a network.

    Raises:
        SettingError: If the network is smaller already.
    """
    groups = graph.groups()
    if setting == "ratio":
        return Target(setting, asked, ParameterCounter(graph, groups), asked)
    if setting == "macs_ratio":
        return Target(setting, asked, macs_counter(artifact, graph), asked)
    counter = ParameterCounter(graph, groups) if setting == "params" else ByteCounter(graph, groups)
    limit = asked if setting == "params" else asked * MB
    before = counter.count(np.zeros(len(groups), dtype=np.int64))
    target = Target(setting, asked, counter, 1 - limit / before)
    if limit > before:
        has = f"{before:,} parameters" if setting == "params" else f"{before / MB:.2f} MB of weights"
        raise SettingError(f"{target.words}: the network has {has}, no more. Ask for less than that.")
    return target


def macs_counter(artifact: Artifact, graph: ChannelGraph) -> MacsCounter:
    """Count multiply-accumulates for as much audio as an artifact's figure is about."""
    front_end = artifact.front_end
    example = torch.zeros(1, front_end.frames_of(MACS_SECONDS), front_end.num_mel_bins)
    return MacsCounter(artifact.module, graph, graph.groups(), example)
