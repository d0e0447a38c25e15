"""Prove on real features that a removal was exact, before anyone relies on it.

Right shapes, the right parameter count and finite output all hold for a network that lost the wrong columns;
only equality with a masked network tells. It is asked in float64: right removals differ there by 1e-15 and
wrong ones by 1e-3 or more, whereas in float32 a deep network comes to 2e-6 when right.
"""

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.surgery.graph import ChannelGraph, ChannelGroup, Member, Removal, Role
from compress.surgery.removal import get_tensor, mask_channels, mask_consumers, remove_channels

CONTROL_TRIES = 16  # a wrong column may happen to be dead; a network where so many are is not worth checking


@dataclass(frozen=True)
class GateReport:
    """What the gate measured.

    Attributes:
        max_relative_error: Removed against masked network, relative to the largest output value.
        effect: Dense against masked network, likewise: how much the removal matters on these features.
        control_error: A removal with one wrong column against the masked network, likewise.
        seconds: Time that the check took.
    """

    max_relative_error: float
    effect: float
    control_error: float
    seconds: float


def verify_removal(
    dense: nn.Module,
    pruned: nn.Module,
    graph: ChannelGraph,
    channels: Removal,
    features: Tensor,
    tolerance: float = 1e-10,
) -> GateReport:
    """Check that ``pruned`` is ``dense`` without these channels, and equals it with them masked.

    The comparison is made in float64 and eval mode. Two references are used, zeroed producers and zeroed
    consumers. Two negative controls show that the check could have failed: the dense network must differ from
    the masked one, and so must a removal with one wrong column.

    Args:
        dense: The network before removal.
        pruned: The network after it.
        graph: Traced from ``dense``.
        channels: What was removed.
        features: An input of both networks, (batch, frames, num_mel_bins) for instance; real speech is best.
        tolerance: Largest allowed error, relative to the largest output value.

    Returns:
        What was measured; all zero but the error and the time if nothing was removed.

    Raises:
        ModelError: If the networks differ; names the first channel group that is wrong. Or if the features
            cannot tell a right removal from a wrong one, or the network does not run in float64.
        SettingError: As ``remove_channels``.
    """
    start = time.perf_counter()
    gone = {group.name: doomed for group, doomed in graph.chosen(channels)}
    features = features.double()
    dense = in_float64(dense)
    masked = mask_channels(dense, graph, gone)
    try:
        expected = output(masked, features)
    except RuntimeError as error:  # it makes float32 of its input, for instance
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"the removal cannot be checked: {type(dense).__name__} does not run in float64: {reason}"
        ) from error
    worst = max(
        difference(pruned_output(pruned, features), expected),
        difference(output(mask_consumers(dense, graph, gone), features), expected),
    )
    # The tensors are compared too: a wrong column can hide behind a channel that is dead on these features.
    culprit = first_wrong_tensor(dense, pruned, graph, gone)
    if culprit is None and not worst <= tolerance:  # not a number is an error too
        culprit = first_wrong_group(dense, graph, gone, features, tolerance)
    if culprit is not None:
        raise ModelError(
            f"{culprit}: removing its channels changes the network's function (relative error {worst:.1e}, allowed "
            f"{tolerance:.0e}). Leave this group out and report the network."
        )
    if not gone:
        return GateReport(worst, 0.0, 0.0, time.perf_counter() - start)
    effect = difference(output(dense, features), expected)
    if not effect > tolerance:
        raise ModelError(
            "the removal cannot be checked: the channels to remove have no effect on these features. Use real speech."
        )
    control = control_error(dense, graph, gone, features, expected, tolerance)
    if not control > tolerance:
        raise ModelError(
            "the removal cannot be checked: on these features, a wrong column makes no difference. Use real speech."
        )
    return GateReport(worst, effect, control, time.perf_counter() - start)


def in_float64(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode."""
    return copy.deepcopy(model).eval().double()


@torch.no_grad()
def output(model: nn.Module, features: Tensor) -> Tensor:
    """All outputs of a float64 network, end to end."""
    return torch.cat([tensor.flatten() for tensor in tensors_in(model(features))])


def tensors_in(result: Any) -> Iterator[Tensor]:
    """The tensors of a network's result: one, or several in tuples, lists and dictionaries."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping | list | tuple):
        for item in result.values() if isinstance(result, Mapping) else result:
            yield from tensors_in(item)


def pruned_output(model: nn.Module, features: Tensor) -> Tensor | None:
    """The output of a pruned network; None if it does not even run."""
    try:
        return output(in_float64(model), features)
    except (RuntimeError, ValueError, IndexError, AssertionError):  # widths that do not fit together
        return None


def difference(actual: Tensor | None, expected: Tensor) -> float:
    """Largest error, relative to the largest expected value; infinite if there is nothing to compare."""
    if actual is None or actual.shape != expected.shape:
        return float("inf")
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((actual - expected).abs().max() / scale)


def first_wrong_tensor(dense: nn.Module, pruned: nn.Module, graph: ChannelGraph, channels: Removal) -> str | None:
    """Name the group, or failing that the tensor, where ``pruned`` is not ``dense`` without the channels."""
    actual, right = in_float64(pruned), remove_channels(dense, graph, channels)
    for name in graph.shapes:
        got, expected = get_tensor(actual, name), get_tensor(right, name)
        if got.shape != expected.shape or not torch.equal(got, expected):
            return owner_of_difference(graph, channels, name, got, expected) or name
    return None


def first_wrong_group(
    dense: nn.Module,
    graph: ChannelGraph,
    channels: Mapping[str, tuple[int, ...]],
    features: Tensor,
    tolerance: float,
) -> str:
    """Name the first group whose removal changes the function, by bisecting the groups; bundles stay together."""
    bundles = {group.name: group.bundle or group.name for group in graph.all_groups}
    units = list(dict.fromkeys(bundles[name] for name in channels))

    def fails(length: int) -> bool:
        some = {name: gone for name, gone in channels.items() if bundles[name] in units[:length]}
        got = pruned_output(remove_channels(dense, graph, some), features)
        return not all(
            difference(got, output(mask(dense, graph, some), features)) <= tolerance
            for mask in (mask_channels, mask_consumers)
        )

    low, high = 1, len(units)  # the shortest prefix of groups that fails
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(middle) else (middle + 1, high)
    return next(name for name in channels if bundles[name] == units[low - 1])


def owner_of_difference(graph: ChannelGraph, channels: Removal, name: str, actual: Tensor, right: Tensor) -> str | None:
    """The group whose channels sit where a tensor differs; of rows and columns, what differs at fewer places."""
    gone = graph.removed_indices(channels)
    carried = [(group.name, member) for group, _ in graph.chosen(channels) for member in group.members]
    owners: list[tuple[int, str]] = []
    for group_name, member in carried:
        if member.name != name:
            continue
        if actual.ndim != right.ndim or actual.shape[member.dim] != right.shape[member.dim]:
            return group_name
        doomed = set(gone[name, member.dim])
        kept = [i for i in range(graph.shapes[name][member.dim]) if i not in doomed]
        mine = {i for indices in member.indices for i in indices}
        differs = (actual != right).transpose(0, member.dim).flatten(1).any(1) if right.ndim > 1 else actual != right
        places = differs.nonzero().flatten().tolist()
        if any(kept[place] in mine for place in places):
            owners.append((len(places), group_name))
    return min(owners)[1] if owners else None


def control_error(
    dense: nn.Module,
    graph: ChannelGraph,
    channels: Mapping[str, tuple[int, ...]],
    features: Tensor,
    expected: Tensor,
    tolerance: float,
) -> float:
    """The error of a removal that drops one wrong column; of several tries, the first that shows."""
    error = 0.0
    for wrong in islice(with_wrong_column(graph, channels), CONTROL_TRIES):
        error = difference(output(remove_channels(dense, wrong, channels), features), expected)
        if error > tolerance:
            break
    return error


def with_wrong_column(graph: ChannelGraph, channels: Removal) -> Iterator[ChannelGraph]:
    """Graphs in which one weight mistakes a removed channel's columns for those of a kept one.

    One per group with its first kept channel, then one per group with its second, and so on: a kept channel that is
    dead on the features shows nothing.
    """
    chosen = [(group, gone, sorted(set(range(group.width)) - set(gone))) for group, gone in graph.chosen(channels)]
    for rank in range(max((len(kept) for _, _, kept in chosen), default=0)):
        for group, gone, kept in chosen:
            consumer = next((member for member in group.members if member.role is Role.CONSUMER), None)
            if consumer is not None and rank < len(kept):
                indices = list(consumer.indices)
                indices[gone[0]], indices[kept[rank]] = indices[kept[rank]], indices[gone[0]]
                yield with_member(graph, group, consumer, replace(consumer, indices=tuple(indices)))


def with_member(graph: ChannelGraph, group: ChannelGroup, old: Member, new: Member) -> ChannelGraph:
    """The graph with one member of one group exchanged."""
    members = tuple(new if member is old else member for member in group.members)
    changed = replace(group, members=members)
    return replace(graph, all_groups=tuple(changed if each is group else each for each in graph.all_groups))
