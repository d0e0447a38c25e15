"""Choose which channels go, so that a given fraction of the parameters, bytes or multiply-accumulates is removed.

Groups are narrowed in steps, from one permitted width to the next. A schedule puts all steps of all groups in one
order: by the fraction of the group for a uniform choice, by score for a global one, by predicted loss for what is
saved for one driven by sensitivity. The removal is the beginning of that order, as long as the target asks for, found
by bisection and then polished by single steps.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from compress.errors import SettingError
from compress.surgery.counting import Counter, ParameterCounter
from compress.surgery.graph import ChannelGraph, ChannelGroup
from compress.surgery.labels import IntArray
from compress.surgery.scores import Scores
from compress.surgery.sensitivity import Sensitivity
from compress.surgery.widths import permitted_widths

Scope: TypeAlias = Literal["uniform", "global", "sensitivity"]
FloatArray: TypeAlias = NDArray[np.float64]

TOLERANCE = 0.01  # of the whole: what counts as having met the target
GOOD_ENOUGH = 0.0002  # of the whole: polishing stops here
NEAR = 24  # steps before and after the end of the prefix that polishing tries first


@dataclass(frozen=True)
class Selection:
    """Which channels to remove, and what that comes to.

    Attributes:
        channels: Group name -> channels to remove, sorted; groups left whole are absent.
        widths: Group name -> (channels before, channels after), for every prunable group.
        asked: The fraction that was asked for, of the parameters or of what else was counted.
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


@dataclass(frozen=True)
class Bounty:
    """What else removal is worth, beside what it saves of the target.

    Attributes:
        counter: Counts what is wanted gone, for example multiply-accumulates.
        price: Predicted loss that removing the whole of it would be worth.
    """

    counter: Counter
    price: float


@dataclass(frozen=True, eq=False)
class Schedule:
    """The order in which groups are narrowed, step by step.

    A state of the network is one position for each bundle: how many of its steps were taken.

    Attributes:
        graph: The network's channel groups.
        scores: Of every prunable group; in a group, the lowest go first.
        bundles: Indices of prunable groups that are narrowed together; most bundles are one group.
        widths: The widths that each bundle may have, widest first.
        order: The bundle that each step narrows.
    """

    graph: ChannelGraph
    scores: Scores
    bundles: Sequence[tuple[int, ...]]
    widths: Sequence[Sequence[int]]
    order: IntArray

    @property
    def start(self) -> IntArray:
        """Nothing removed."""
        return np.zeros(len(self.bundles), dtype=np.int64)

    @property
    def end(self) -> IntArray:
        """Every group at its smallest width."""
        return np.array([len(widths) - 1 for widths in self.widths], dtype=np.int64)

    def after(self, steps: int) -> IntArray:
        """The positions (bundles,) after the first so many steps."""
        positions: IntArray = np.bincount(self.order[:steps], minlength=len(self.bundles)).astype(np.int64)
        return positions

    def removed(self, positions: IntArray) -> IntArray:
        """How many channels each group has lost: positions (..., bundles) -> (..., groups)."""
        lost: IntArray = self._lost[np.arange(len(self.bundles)), positions][..., self._bundle_of]
        return lost

    def select(self, positions: IntArray, counter: Counter, asked: float) -> Selection:
        """The channels that are gone at these positions."""
        groups, removed = self.graph.groups(), self.removed(positions)
        parameters, nothing = ParameterCounter(self.graph, groups), np.zeros(len(groups), dtype=np.int64)
        return Selection(
            channels={
                group.name: tuple(sorted(ranked(self.scores, group)[:count]))
                for group, count in zip(groups, removed.tolist(), strict=True)
                if count
            },
            widths={
                group.name: (group.width, group.width - count)
                for group, count in zip(groups, removed.tolist(), strict=True)
            },
            asked=asked,
            achieved=1 - counter.count(removed) / max(1, counter.count(nothing)),
            parameters_before=parameters.count(nothing),
            parameters_after=parameters.count(removed),
        )

    @cached_property
    def _lost(self) -> IntArray:
        lost = np.zeros((len(self.bundles), max(map(len, self.widths), default=1)), dtype=np.int64)
        for bundle, widths in enumerate(self.widths):
            lost[bundle, : len(widths)] = widths[0] - np.array(widths)
        return lost

    @cached_property
    def _bundle_of(self) -> IntArray:
        bundle_of = np.zeros(sum(map(len, self.bundles)), dtype=np.int64)
        for bundle, members in enumerate(self.bundles):
            bundle_of[list(members)] = bundle
        return bundle_of


def choose_channels(
    graph: ChannelGraph,
    scores: Scores,
    ratio: float,
    scope: Scope = "uniform",
    round_to: int | None = None,
    min_width: int | None = None,
    *,
    counter: Counter | None = None,
    sensitivity: Sensitivity | None = None,
    keep: frozenset[str] = frozenset(),
    words: str | None = None,
) -> Selection:
    """Choose the lowest-scored channels whose removal takes ``ratio`` of the parameters, or of what else is counted.

    Args:
        graph: The network's channel groups.
        scores: Of each prunable group; see ``l1_scores``.
        ratio: Fraction to remove, in [0, 1).
        scope: "uniform" takes the same fraction of channels from every group, "global" the channels with the
            lowest scores wherever they are, "sensitivity" those whose removal is predicted to cost least.
        round_to: A narrowed group keeps a multiple of this; by default what runtimes want, see ``widths.MULTIPLES``.
        min_width: No group is narrowed below this, nor below one multiple; the same defaults.
        counter: Counts what ``ratio`` is a fraction of; the parameters by default.
        sensitivity: For scope "sensitivity", what narrowing each group costs; see ``measure_sensitivity``.
        keep: Groups to leave whole; see ``kept_groups``.
        words: How the target was asked for, for the error; "ratio 0.4" by default.

    Returns:
        The selection. Small networks cannot always meet the ratio closely; see ``achieved``.

    Raises:
        SettingError: If a setting is out of range, or the ratio cannot be reached.
    """
    if not 0 <= ratio < 1:
        raise SettingError(f"ratio must be in [0, 1), a fraction to remove, got {ratio}.")
    counter = counter or ParameterCounter(graph, graph.groups())
    schedule = schedule_of(
        graph, scores, scope, round_to, min_width, counter=counter, sensitivity=sensitivity, keep=keep
    )
    positions = meet(schedule, counter, ratio, words or f"ratio {ratio}")
    if scope == "sensitivity":
        assert sensitivity is not None, "schedule_of refuses this scope without it"
        even = schedule_of(graph, scores, "uniform", round_to, min_width, keep=keep)
        positions = cheaper(schedule, [positions, meet(even, counter, ratio, "")], counter, ratio, sensitivity)
    return schedule.select(positions, counter, ratio)


def schedule_of(
    graph: ChannelGraph,
    scores: Scores,
    scope: Scope = "uniform",
    round_to: int | None = None,
    min_width: int | None = None,
    *,
    counter: Counter | None = None,
    sensitivity: Sensitivity | None = None,
    keep: frozenset[str] = frozenset(),
    bounty: Bounty | None = None,
) -> Schedule:
    """Put every step of every group in the order of a scope; the arguments are those of ``choose_channels``.

    A bounty moves what it is for forward in the order by predicted loss.

    Raises:
        SettingError: If a setting is out of range or missing.
    """
    if scope not in get_args(Scope):
        raise SettingError(f"scope must be one of {', '.join(get_args(Scope))}, got '{scope}'.")
    for name, value in (("round_to", round_to), ("min_width", min_width)):
        if value is not None and value < 1:
            raise SettingError(f"{name} must be at least 1, got {value}.")
    groups = graph.groups()
    bundles = bundled(groups)
    widths = [
        [groups[bundle[0]].width]
        if any(groups[i].name in keep for i in bundle)
        else permitted_widths(graph, [groups[i] for i in bundle], round_to, min_width)
        for bundle in bundles
    ]
    schedule = Schedule(graph, scores, bundles, widths, np.zeros(0, dtype=np.int64))
    if scope == "sensitivity":
        if sensitivity is None:
            raise SettingError("scope sensitivity needs the losses of measure_sensitivity.")
        order = by_predicted_loss(schedule, counter or ParameterCounter(graph, groups), sensitivity, bounty)
    else:
        order = by_fraction_or_score(schedule, scope)
    return Schedule(graph, scores, bundles, widths, np.array(order, dtype=np.int64))


def bundled(groups: Sequence[ChannelGroup]) -> list[tuple[int, ...]]:
    """Gather the indices of the groups that must stay of one width."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(f"bundle {group.bundle}" if group.bundle else f"group {group.name}", []).append(i)
    return [tuple(indices) for indices in members.values()]


def ranked(scores: Scores, group: ChannelGroup) -> list[int]:
    """The group's channels, least important first."""
    return [int(channel) for channel in np.argsort(scores[group.name], kind="stable")]


def by_fraction_or_score(schedule: Schedule, scope: Scope) -> list[int]:
    """Order the steps by the fraction of their group, ties by score; or by score."""
    groups = schedule.graph.groups()
    steps: list[tuple[float, float, int, int]] = []
    for bundle, (members, widths) in enumerate(zip(schedule.bundles, schedule.widths, strict=True)):
        ascending = [np.sort(schedule.scores[groups[i].name]) for i in members]
        for step, (wide, narrow) in enumerate(itertools.pairwise(widths)):
            score = float(np.mean([s[widths[0] - wide : widths[0] - narrow].mean() for s in ascending]))
            # A fraction p of the channels, rounded to the nearest permitted width, crosses here.
            fraction = 1 - (wide + narrow) / 2 / widths[0]
            steps.append((fraction if scope == "uniform" else score, score, bundle, step))
    return [bundle for _, _, bundle, _ in sorted(steps)]


def by_predicted_loss(
    schedule: Schedule, counter: Counter, sensitivity: Sensitivity, bounty: Bounty | None = None
) -> list[int]:
    """Order the steps greedily: next comes the one with the least predicted loss, less the bounty, for what it saves.

    Of each group's losses the lower convex hull is taken, so that a first step that costs much does not hide a second
    that costs nothing.
    """
    rises = [
        convex_rises([widths[0] - w for w in widths], losses)
        for widths, losses in zip(schedule.widths, predicted_losses(schedule, sensitivity), strict=True)
    ]
    order: list[int] = []
    positions, end = schedule.start, schedule.end
    whole = 1 if bounty is None else bounty.counter.count(schedule.removed(positions))
    while len(open_ := np.flatnonzero(positions < end)):
        trials = np.tile(positions, (len(open_) + 1, 1))  # the state as it is, then with each one further
        trials[np.arange(1, len(open_) + 1), open_] += 1
        removed = schedule.removed(trials)
        left = counter.counts(removed)
        rise = np.array([rises[bundle][positions[bundle]] for bundle in open_])
        if bounty is not None:
            wanted = bounty.counter.counts(removed)
            rise -= bounty.price * (wanted[0] - wanted[1:]) / whole
        chosen = int(open_[np.argmin(rise / np.maximum(left[0] - left[1:], 1e-9))])
        positions[chosen] += 1
        order.append(chosen)
    return order


def predicted_losses(schedule: Schedule, sensitivity: Sensitivity) -> list[FloatArray]:
    """For each bundle, the predicted loss at each of its widths."""
    groups = schedule.graph.groups()
    return [
        sensitivity.losses_at(groups[members[0]].name, 1 - np.array(widths) / widths[0])
        for members, widths in zip(schedule.bundles, schedule.widths, strict=True)
    ]


def predicted_loss(schedule: Schedule, positions: IntArray, sensitivity: Sensitivity) -> float:
    """The sum of what narrowing each group alone is predicted to cost."""
    losses = predicted_losses(schedule, sensitivity)
    return float(sum(losses[bundle][position] for bundle, position in enumerate(positions)))


def convex_rises(xs: Sequence[float], ys: Sequence[float] | FloatArray) -> list[float]:
    """How much the lower convex hull of the points rises from each to the next."""
    hull: list[int] = []
    for i in range(len(xs)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (ys[b] - ys[a]) * (xs[i] - xs[a]) < (ys[i] - ys[a]) * (xs[b] - xs[a]):
                break
            hull.pop()
        hull.append(i)
    heights = np.interp(xs, [xs[i] for i in hull], [ys[i] for i in hull])
    return [float(rise) for rise in np.diff(heights)]


def meet(schedule: Schedule, counter: Counter, ratio: float, words: str) -> IntArray:
    """The positions at which the counter has lost ``ratio`` of what it counts, as nearly as they allow.

    Raises:
        SettingError: If even the smallest widths leave too much; tells how far they go. ``words`` name the target.
    """

    def left(positions: IntArray) -> int:
        return counter.count(schedule.removed(positions))

    before, fewest = left(schedule.start), left(schedule.end)
    target = before * (1 - ratio)
    if fewest > target + TOLERANCE * before:
        raise SettingError(
            f"{words} cannot be reached: with all {int((schedule.end > 0).sum())} prunable groups at their smallest "
            f"width, {1 - fewest / max(1, before):.3f} of the {counter.unit} is removed ({fewest:,} of {before:,} "
            "stay). Ask for less, keep fewer layers, or lower round_to."
        )
    if ratio == 0:
        return schedule.start
    low, high = 0, len(schedule.order)  # the most steps that do not remove too much
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left(schedule.after(middle)) >= target else (low, middle - 1)
    positions = schedule.after(low)
    near = np.unique(schedule.order[max(0, low - NEAR) : low + NEAR])
    for bundles in (near, np.arange(len(schedule.bundles))):

        def error(states: IntArray) -> FloatArray:
            off: FloatArray = np.abs(counter.counts(schedule.removed(states)) - target)
            return off

        positions = polish(schedule, positions, schedule.after(low), bundles, error, GOOD_ENOUGH * before)
    return positions


def polish(
    schedule: Schedule,
    positions: IntArray,
    start: IntArray,
    bundles: IntArray,
    error: Callable[[IntArray], FloatArray],
    good_enough: float,
) -> IntArray:
    """Lower the error by single steps of these bundles, none more than one away from where it started."""
    while (present := float(error(positions[None])[0])) > good_enough:
        trials = np.tile(positions, (3 * len(bundles), 1))
        for i, bundle in enumerate(bundles):
            around = start[bundle] + np.array([-1, 0, 1])
            trials[3 * i : 3 * i + 3, bundle] = np.clip(around, 0, len(schedule.widths[bundle]) - 1)
        errors = error(trials)
        if not len(errors) or errors.min() >= present:
            break
        positions = trials[int(errors.argmin())]
    return positions


def cheaper(
    schedule: Schedule, states: Sequence[IntArray], counter: Counter, ratio: float, sensitivity: Sensitivity
) -> IntArray:
    """Of several states that meet a target, the one with the least predicted loss."""
    counts = counter.counts(schedule.removed(np.stack([schedule.start, *states])))
    errors = np.abs(counts[1:] / max(1, counts[0]) - (1 - ratio))
    met = [state for state, error in zip(states, errors, strict=True) if error <= max(TOLERANCE, errors.min())]
    return min(met, key=lambda state: predicted_loss(schedule, state, sensitivity))
