"""Choose which channels go, so that a given fraction of the parameters is removed.

Each group can be narrowed in quanta (8 channels, say). All quanta of all groups are put in one order, by
fraction of the group for a uniform choice or by score for a global one; the removal is a prefix of that
order, found by bisection, then polished by single quanta of single groups.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from compress.errors import SettingError
from compress.surgery.counting import ParameterCounter
from compress.surgery.graph import ChannelGraph, ChannelGroup, Role
from compress.surgery.labels import IntArray
from compress.surgery.scores import Scores

Scope: TypeAlias = Literal["uniform", "global"]

LINEAR_QUANTUM = 8  # channels; tensor cores and vector units want multiples of it
CONV2D_QUANTUM = 16  # 2-D convolutions are slow at widths between multiples of 16
TOLERANCE = 0.01  # of all parameters: what counts as having hit the ratio
GOOD_ENOUGH = 0.0002  # of all parameters: polishing stops here


@dataclass(frozen=True)
class Selection:
    """Which channels to remove, and what that comes to.

    Attributes:
        channels: Group name -> channels to remove, sorted; groups left whole are absent.
        widths: Group name -> (channels before, channels after), for every prunable group.
        asked: The fraction of parameters that was asked for.
        achieved: The fraction that these channels remove.
        parameters_before: Of the whole network.
        parameters_after: Of the whole network.
    """

    channels: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, tuple[int, int]]
    asked: float
    achieved: float
    parameters_before: int
    parameters_after: int


class Quantum(NamedTuple):
    """A step of one group from one permitted width to the next; sorts by cost."""

    cost: float
    score: float  # mean score of the step's channels; decides between equal costs
    group: int
    step: int


def choose_channels(
    graph: ChannelGraph,
    scores: Scores,
    ratio: float,
    scope: Scope = "uniform",
    round_to: int | None = None,
    min_width: int | None = None,
) -> Selection:
    """Choose the lowest-scored channels whose removal takes ``ratio`` of the parameters.

    Args:
        graph: The network's channel groups.
        scores: Of each prunable group; see ``l1_scores``.
        ratio: Fraction of PARAMETERS to remove, in [0, 1).
        scope: "uniform" takes the same fraction of channels from every group, "global" the channels with the
            lowest scores wherever they are.
        round_to: A narrowed group keeps a multiple of this; by default 8, and 16 for groups made by Conv2d.
        min_width: No group is narrowed below this, nor below one multiple; the same defaults.

    Returns:
        The selection. Small networks cannot always hit the ratio closely; see ``achieved``.

    Raises:
        SettingError: If a setting is out of range, or the ratio cannot be reached.
    """
    if not 0 <= ratio < 1:
        raise SettingError(f"ratio must be in [0, 1), a fraction of the parameters, got {ratio}.")
    if scope not in get_args(Scope):
        raise SettingError(f"scope must be one of {', '.join(get_args(Scope))}, got '{scope}'.")
    for name, value in (("round_to", round_to), ("min_width", min_width)):
        if value is not None and value < 1:
            raise SettingError(f"{name} must be at least 1, got {value}.")
    groups = graph.groups()
    steps = [permitted_widths(graph, group, round_to, min_width) for group in groups]
    order = sorted(quanta(groups, steps, scores, scope))
    counter = ParameterCounter(graph, groups)
    widths = [np.array(permitted) for permitted in steps]

    def parameters(taken: IntArray) -> int:
        removed = np.array([w[0] - w[t] for w, t in zip(widths, taken, strict=True)], dtype=np.int64)
        return counter.count(removed)

    nothing = np.zeros(len(groups), dtype=np.int64)
    before = parameters(nothing)
    target = before * (1 - ratio)
    fewest = parameters(np.array([len(w) - 1 for w in widths], dtype=np.int64))
    if fewest > target + TOLERANCE * before:
        raise SettingError(
            f"ratio {ratio} cannot be reached: with all {len(groups)} prunable groups at their smallest width, "
            f"{1 - fewest / before:.3f} of the parameters is removed. Lower the ratio, round_to or min_width."
        )

    def prefix(length: int) -> IntArray:
        taken = nothing.copy()
        for quantum in order[:length]:
            taken[quantum.group] += 1
        return taken

    low, high = 0, len(order)  # the longest prefix that does not remove too much
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if parameters(prefix(middle)) >= target else (low, middle - 1)
    start = prefix(low)
    taken = polish(start, widths, parameters, target, before) if ratio > 0 else nothing
    after = parameters(taken)
    channels = {
        group.name: tuple(sorted(ranked(scores, group)[: int(w[0] - w[t])]))
        for group, w, t in zip(groups, widths, taken, strict=True)
        if t
    }
    kept = {group.name: (int(w[0]), int(w[t])) for group, w, t in zip(groups, widths, taken, strict=True)}
    return Selection(channels, kept, ratio, 1 - after / before, before, after)


def permitted_widths(
    graph: ChannelGraph, group: ChannelGroup, round_to: int | None, min_width: int | None
) -> list[int]:
    """The widths a group may have: its own, then the multiples of its quantum below, down to its floor."""
    producers = [member for member in group.members if member.role is Role.PRODUCER]
    default = CONV2D_QUANTUM if any(len(graph.shapes[m.name]) == 4 for m in producers) else LINEAR_QUANTUM
    quantum = default if round_to is None else round_to
    floor = max(default if min_width is None else min_width, quantum)
    largest = (group.width - 1) // quantum * quantum
    return [group.width, *(width for width in range(largest, 0, -quantum) if width >= floor)]


def ranked(scores: Scores, group: ChannelGroup) -> list[int]:
    """The group's channels, least important first."""
    return [int(channel) for channel in np.argsort(scores[group.name], kind="stable")]


def quanta(groups: tuple[ChannelGroup, ...], steps: list[list[int]], scores: Scores, scope: Scope) -> Iterator[Quantum]:
    """Every step of every group with its cost; within a group, costs never fall from step to step."""
    for i, (group, widths) in enumerate(zip(groups, steps, strict=True)):
        ascending = np.sort(scores[group.name])
        for step, (wide, narrow) in enumerate(itertools.pairwise(widths)):
            score = float(ascending[group.width - wide : group.width - narrow].mean())
            # A fraction p of the channels, rounded to the nearest permitted width, crosses here.
            fraction = 1 - (wide + narrow) / 2 / group.width
            yield Quantum(fraction if scope == "uniform" else score, score, i, step)


def polish(
    start: IntArray, widths: list[IntArray], parameters: Callable[[IntArray], int], target: float, total: int
) -> IntArray:
    """Approach the target by single quanta, no group more than one away from where it started."""
    best, error = start.copy(), abs(parameters(start) - target)
    while error > GOOD_ENOUGH * total:
        found = best
        for i, w in enumerate(widths):
            for step in (max(start[i] - 1, 0), start[i], min(start[i] + 1, len(w) - 1)):
                trial = best.copy()
                trial[i] = step
                if abs(parameters(trial) - target) < error:
                    found, error = trial, abs(parameters(trial) - target)
        if found is best:
            break
        best = found
    return best
