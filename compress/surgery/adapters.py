"""Channels that were chosen elsewhere: a list by layer, or the masks of a pruner such as NNI's ``L1NormPruner``.

What is asked for is output channels of layers; what can be removed is channels of groups, which several layers make
and read together. Where the layers of a group were masked differently, only channels that all of them gave up are
removed: one that a layer keeps is still in use, and removing it would take what nobody asked for. What stays for
that reason is told.
"""

import pickle
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from compress.errors import InputError, unknown_name
from compress.files import read_json
from compress.surgery.graph import ChannelGraph, ChannelGroup, Member, Role

Lists: TypeAlias = Mapping[str, Sequence[int]]  # layer -> output channels to remove, or 0 and 1 for all channels
Masks: TypeAlias = Mapping[str, Mapping[str, Tensor | None]]  # layer -> "weight", "bias" -> 1 where it is kept


@dataclass(frozen=True)
class Requested:
    """What of a request can be removed.

    Attributes:
        channels: Group name -> channels to remove, sorted.
        dropped: What stays although it was asked for, and why; a sentence each.
    """

    channels: Mapping[str, tuple[int, ...]]
    dropped: tuple[str, ...]


def read_request(path: Path, graph: ChannelGraph) -> Requested:
    """Read a JSON file of channels by layer, or the masks of a pruner saved by ``torch.save``.

    Raises:
        InputError: If the file is missing, damaged or something else.
        SettingError: If it names a layer that the network does not have; the nearest name is offered.
    """
    if path.suffix == ".json":
        return channels_of_lists(graph, read_json(path), str(path))
    return channels_of_masks(graph, load_masks(path), str(path))


def plain_dictionary(factory: object = None) -> dict[Any, Any]:
    """Stands for ``collections.defaultdict``, in which NNI gives its masks and which torch does not load."""
    return {}


def load_masks(path: Path) -> Any:
    """Load what ``torch.save`` wrote, without running code."""
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    try:
        with torch.serialization.safe_globals([(plain_dictionary, "collections.defaultdict"), dict]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} holds no masks that can be read safely. Give channels by layer in a .json file, or a dictionary of"
            " tensors saved by torch.save."
        ) from error


def channels_of_lists(graph: ChannelGraph, lists: Lists, source: str = "channels") -> Requested:
    """Find the channels of groups that a request names by layer.

    Args:
        graph: The network's channel groups.
        lists: For each layer, the output channels to remove, or a mask of as many 0 and 1 as it has channels, with a 1
            for each that is kept.
        source: Where the request is from, for errors.

    Raises:
        InputError: If it is of another form, or a channel does not exist.
        SettingError: If it names a layer that the network does not have; the nearest name is offered.
    """
    if not isinstance(lists, Mapping):
        raise InputError(f'{source} must map layers to channels, {{"layer": [0, 5]}}; it holds {described(lists)}.')
    rows = {layer: listed(f"{source}: {layer}", value, width_of(graph, layer)) for layer, value in lists.items()}
    return channels_of_rows(graph, rows)


def channels_of_masks(graph: ChannelGraph, masks: Masks, source: str = "masks") -> Requested:
    """Find the channels of groups whose whole row of a weight is masked.

    Args:
        graph: The network's channel groups.
        masks: As NNI's pruners give them: ``{layer: {"weight": mask, "bias": mask}}``, 1 where a weight is kept.
        source: Where they are from, for errors.

    Raises:
        InputError: If they are of another form, or not of the shape of the layer's weight.
        SettingError: If they name a layer that the network does not have; the nearest name is offered.
    """
    if not isinstance(masks, Mapping):
        raise InputError(f"{source} must map layers to masks, {{layer: {{'weight': mask}}}}; got {described(masks)}.")
    rows: dict[str, set[int]] = {}
    scattered: list[str] = []
    for layer, of_layer in masks.items():
        width = width_of(graph, layer)
        if not isinstance(of_layer, Mapping):
            raise InputError(
                f"{source}: {layer} must have masks by name, {{'weight': mask}}; got {described(of_layer)}."
            )
        mask = of_layer.get("weight")
        if mask is None:  # the pruner left the layer alone
            continue
        if not isinstance(mask, Tensor) or not mask.ndim or len(mask) != width:
            shape = list(mask.shape) if isinstance(mask, Tensor) else described(mask)
            raise InputError(f"{source}: the mask of {layer}.weight must have {width} rows, got {shape}.")
        kept = mask.bool().reshape(width, -1)
        rows[layer] = set((~kept.any(1)).nonzero().flatten().tolist())
        partly = int((kept.any(1) & ~kept.all(1)).sum())
        if partly:
            scattered.append(f"{layer}: {partly} channels stay: their masks leave some of their weights")
    found = channels_of_rows(graph, rows)
    return Requested(found.channels, (*scattered, *found.dropped))


def channels_of_rows(graph: ChannelGraph, rows: Mapping[str, set[int]]) -> Requested:
    """Map rows of layers' weights to channels of groups: those that every layer named in the group gives up."""
    layers = {tensor_of(graph, layer): layer for layer in rows}
    channels: dict[str, tuple[int, ...]] = {}
    dropped: list[str] = []
    for group in graph.all_groups:
        named = [m for m in group.members if m.name in layers and m.dim == 0 and m.role is not Role.CONSUMER]
        given = {member.name: channels_given(member, rows[layers[member.name]]) for member in named}
        agreed = set.intersection(*given.values()) if given and group.frozen is None else set()
        if agreed:
            channels[group.name] = tuple(sorted(agreed))
        for member in named:
            asked = rows[layers[member.name]] & {row for own in member.indices for row in own}
            stay = asked - {row for channel in agreed for row in member.indices[channel]}
            if stay:
                why = why_they_stay(group, member, agreed, given, layers)
                dropped.append(f"{layers[member.name]}: {len(stay)} of {len(asked)} channels stay: {why}")
    return Requested(channels, (*dropped, *level_bundles(graph, channels)))


def channels_given(member: Member, rows: set[int]) -> set[int]:
    """The channels all of whose rows are given up."""
    return {channel for channel, own in enumerate(member.indices) if rows.issuperset(own)}


def why_they_stay(
    group: ChannelGroup, member: Member, agreed: set[int], given: Mapping[str, set[int]], layers: Mapping[str, str]
) -> str:
    """Why rows that a layer gives up are not removed."""
    if group.frozen is not None:
        return group.frozen
    keepers = [layers[name] for name, theirs in given.items() if given[member.name] - theirs]
    if given[member.name] > agreed:
        return f"{', '.join(keepers)} makes the same channels and keeps them"
    return "a channel has several rows there, and not all of them were named"


def level_bundles(graph: ChannelGraph, channels: dict[str, tuple[int, ...]]) -> list[str]:
    """Let groups that must stay of one width lose as many channels as that of them which loses fewest."""
    bundles: defaultdict[str, list[str]] = defaultdict(list)
    for group in graph.groups():
        if group.bundle is not None:
            bundles[group.bundle].append(group.name)
    dropped = []
    for bundle, names in bundles.items():
        fewest = min(len(channels.get(name, ())) for name in names)
        for name in names:
            asked = channels.pop(name, ())
            if fewest:
                channels[name] = asked[:fewest]
            if len(asked) > fewest:
                dropped.append(
                    f"{name}: {len(asked) - fewest} of {len(asked)} channels stay: {bundle} is the width of others too,"
                    " which lose fewer"
                )
    return dropped


def tensor_of(graph: ChannelGraph, layer: str) -> str:
    """The name under which the graph knows a layer's weight."""
    first_name = {alias: name for name, aliases in graph.aliases.items() for alias in aliases}
    return first_name.get(f"{layer}.weight", f"{layer}.weight")


def width_of(graph: ChannelGraph, layer: str) -> int:
    """The number of output channels of a layer.

    Raises:
        SettingError: If the network has no such layer; the nearest name is offered.
    """
    name = tensor_of(graph, layer)
    if not graph.shapes.get(name):
        weights = [*graph.shapes, *(alias for aliases in graph.aliases.values() for alias in aliases)]
        raise unknown_name("layer", str(layer), [w.removesuffix(".weight") for w in weights if w.endswith(".weight")])
    return graph.shapes[name][0]


def listed(where: str, value: Any, width: int) -> set[int]:
    """Read the channels of one layer.

    A list of as many 0 and 1 as the layer has channels is a mask; as numbers, it would name channels twice or all.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(type(item) is int for item in value):
        raise InputError(f"{where} must be a list of channel numbers, or of 0 and 1, got {described(value)}.")
    if len(value) == width and set(value) <= {0, 1}:
        return {channel for channel, kept in enumerate(value) if not kept}
    outside = [channel for channel in value if not 0 <= channel < width]
    if outside:
        raise InputError(f"{where}: channels are numbered 0..{width - 1}, got {outside[0]}.")
    if len(set(value)) < len(value):
        raise InputError(f"{where} names a channel twice; a mask of 0 and 1 would have {width} entries.")
    return set(value)


def described(value: Any) -> str:
    """A value of the wrong form, as errors quote it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
