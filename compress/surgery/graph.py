"""Trace a network and find which channels stand or fall together.

The network is exported to its ATen graph, every axis of every parameter is labelled, and the rules in
``rules.py`` unite labels operator by operator. A class of united labels is one coupled channel: removing it
means dropping the same indices from every (parameter, dimension) that carries it.
"""

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor, fx, nn

from compress.errors import SettingError
from compress.surgery.labels import Axis, Channels, Labels, Value, fixed
from compress.surgery.rules import RULES, Call, refuse_all
from compress.surgery.tracing import trace_operators

RESIZABLE = (  # torch's layers whose stored widths can be brought up to date
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.modules.batchnorm._NormBase, nn.PReLU, nn.RNNBase),
)

Removal: TypeAlias = Mapping[str, Iterable[int]]  # group name -> the channels to remove
Place: TypeAlias = tuple[str, int]  # a parameter or buffer, and one of its dimensions
Carrier: TypeAlias = tuple[Place, bool]  # where channels are carried, and whether it is leaky (see Member)


class Role(Enum):
    """What a tensor's dimension is to the channels on it."""

    PRODUCER = "producer"  # rows of a weight: they make the channel
    CONSUMER = "consumer"  # columns of a weight: they read the channel
    POINTWISE = "pointwise"  # biases, batch norm, gains: one number per channel


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer that carries a group's channels.

    Attributes:
        name: The tensor's name in the state dict (the first one, if it has several).
        dim: The dimension.
        role: What the dimension is to the channels.
        indices: For each channel of the group, the indices it owns.
        leaky: A consumer that reads something other than zero from a masked channel, because an operator
            such as the sigmoid lies between; masking must then silence its columns as well. Or a weight of which
            the same dimension makes and reads the channels, so that silencing one silences the other.
    """

    name: str
    dim: int
    role: Role
    indices: tuple[tuple[int, ...], ...]
    leaky: bool = False


@dataclass(frozen=True)
class ChannelGroup:
    """Channels born together and coupled alike: each owns as many indices of the same dimensions.

    Attributes:
        name: The layer that makes the channels (``#2``, ``#3`` follow if it makes several groups).
        members: Every dimension that carries them.
        width: Number of channels.
        parameters_per_channel: Parameters that go when a single channel is removed.
        bundle: Groups of one bundle must lose equally many channels: the directions and layers of an LSTM, which
            has one ``hidden_size``. None for a group that stands alone.
        frozen: Why the channels must stay; None if they may be removed.
    """

    name: str
    members: tuple[Member, ...]
    width: int
    parameters_per_channel: int
    frozen: str | None = None
    bundle: str | None = None


@dataclass(frozen=True)
class ChannelGraph:
    """The coupled channels of a network.

    Attributes:
        shapes: Shape of every parameter and buffer, one name for each tensor.
        parameters: Which of these are parameters.
        aliases: Further names of tensors that several modules share.
        stored_widths: Attributes, by dotted path, in which a module keeps a number of channels, and that number;
            groups have them as members beside tensors.
        all_groups: Prunable and frozen groups, in the order of the network's parameters.
        refusals: Where and why channels were frozen by an operator.
    """

    shapes: Mapping[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    aliases: Mapping[str, tuple[str, ...]]
    stored_widths: Mapping[str, int]
    all_groups: tuple[ChannelGroup, ...]
    refusals: tuple[str, ...]

    def groups(self) -> tuple[ChannelGroup, ...]:
        """The groups whose channels may be removed."""
        return tuple(group for group in self.all_groups if group.frozen is None)

    def frozen_groups(self) -> tuple[ChannelGroup, ...]:
        """The groups whose channels must stay, each with its reason."""
        return tuple(group for group in self.all_groups if group.frozen is not None)

    def chosen(self, channels: Removal) -> Iterator[tuple[ChannelGroup, tuple[int, ...]]]:
        """Check what is asked to be removed; yield each group with its sorted channels.

        Raises:
            SettingError: If a group is unknown or frozen, a channel does not exist, or none would be left; or if
                groups of one bundle would lose different numbers of channels.
        """
        known = {group.name: group for group in self.all_groups}
        self._check_bundles({name: len(set(asked)) for name, asked in channels.items()})
        for name, asked in channels.items():
            gone = tuple(sorted(set(asked)))
            if name not in known:
                raise SettingError(f"no channel group is called '{name}'.")
            group = known[name]
            if gone and group.frozen is not None:
                raise SettingError(f"{name}: channels cannot be removed: {group.frozen}.")
            if gone and not 0 <= gone[0] <= gone[-1] < group.width:
                raise SettingError(f"{name}: channels are numbered 0..{group.width - 1}, got {gone[0]}..{gone[-1]}.")
            if len(gone) == group.width:
                raise SettingError(f"{name}: all {group.width} channels would be removed; keep at least one.")
            if gone:
                yield group, gone

    def _check_bundles(self, removed: Mapping[str, int]) -> None:
        first: dict[str, ChannelGroup] = {}
        for group in self.groups():
            if group.bundle is None:
                continue
            other = first.setdefault(group.bundle, group)
            count, expected = removed.get(group.name, 0), removed.get(other.name, 0)
            if count != expected:
                raise SettingError(
                    f"{group.name} would lose {count} channels and {other.name} {expected}, but {group.bundle} is the"
                    " width of both. Remove equally many of each."
                )

    def removed_indices(self, channels: Removal) -> dict[Place, list[int]]:
        """The sorted indices to drop from each dimension, for the given channels."""
        found: defaultdict[Place, set[int]] = defaultdict(set)
        for group, gone in self.chosen(channels):
            for member in group.members:
                found[member.name, member.dim].update(i for channel in gone for i in member.indices[channel])
        return {place: sorted(indices) for place, indices in found.items()}


def trace(model: nn.Module, example: Tensor) -> ChannelGraph:
    """Find the coupled channels of a network, in eval mode.

    Args:
        model: Any network that ``torch.export`` accepts; it is left as it is.
        example: An input, features (batch, frames, num_mel_bins) for instance. Widths must not depend on it.

    Raises:
        ModelError: If the network cannot be exported.
    """
    names = tensor_names(model)
    labels = Labels()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    births = {
        name: tuple(Channels(labels.new(n), np.ones(n, dtype=np.bool_)) for n in tensor.shape)
        for name, tensor in tensors.items()
    }
    traced = trace_operators(model, example)
    tensor_of = {node: names[name] for node, name in traced.tensors.items()}
    refusals: list[str] = []
    values: dict[fx.Node, Any] = {}
    for node in traced.graph.nodes:
        if node in tensor_of:
            name = tensor_of[node]
            values[node] = Value(tuple(tensors[name].shape), births[name], constant=True)
        elif node.op == "call_function":
            path = traced.paths[node]
            values[node] = call(node, path, vars(model.get_submodule(path)), values, labels, refusals)
        elif node.op == "output":
            for result in node.all_input_nodes:
                freeze_all(labels, values[result].axes, "it is an output of the network")
        else:
            values[node] = like(node, constant=node.op == "get_attr" or "lifted" in node.name)
    used = {name for node, name in tensor_of.items() if node.users}
    for name in births.keys() - used:
        freeze_all(labels, births[name], "the traced forward pass does not use it")
    for path, module in model.named_modules():
        # A network's own module may hold a bare parameter, a gain per channel; torch's layers also store widths.
        if type(module).__module__.startswith("torch.") and not isinstance(module, RESIZABLE):
            held = [*module.named_parameters(path, recurse=False), *module.named_buffers(path, recurse=False)]
            for name, _ in held:
                freeze_all(labels, births[names[name]], f"{path}: {type(module).__name__} has a fixed width")
    stored = {
        f"{module}.{attribute}".removeprefix("."): (Channels(axis, np.ones(len(axis), dtype=np.bool_)),)
        for (module, attribute), axis in labels.stored.items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    aliases: defaultdict[str, list[str]] = defaultdict(list)
    for alias, name in names.items():
        if alias != name:
            aliases[name].append(alias)
    parameters = tuple(name for name, _ in model.named_parameters())
    return ChannelGraph(
        shapes=shapes,
        parameters=parameters,
        aliases={name: tuple(others) for name, others in aliases.items()},
        stored_widths={name: len(axes[0].labels) for name, axes in stored.items()},
        all_groups=bundled_groups(labels, {**births, **stored}, frozenset(parameters)),
        refusals=tuple(refusals),
    )


def tensor_names(model: nn.Module) -> dict[str, str]:
    """Map every name of a parameter or buffer to the first name of that tensor."""
    first: dict[int, str] = {}
    both = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in both}


def freeze_all(labels: Labels, axes: Iterable[Axis], reason: str) -> None:
    """Freeze every channel of these axes."""
    for axis in axes:
        labels.freeze(axis, reason)


def like(node: fx.Node, constant: bool) -> Any:
    """The node's result without channels: a value, or a tuple of them."""
    result = node.meta.get("val")
    if isinstance(result, list | tuple):
        return tuple(fixed(item.shape if isinstance(item, Tensor) else (), constant) for item in result)
    return fixed(result.shape if isinstance(result, Tensor) else (), constant)


def call(
    node: fx.Node,
    path: str,
    attributes: Mapping[str, Any],
    values: Mapping[fx.Node, Any],
    labels: Labels,
    refusals: list[str],
) -> Any:
    """Apply the rule of one operator call, made by the module at ``path``."""
    if node.target is operator.getitem:
        source: Any = values[node.args[0]]  # type: ignore[index]
        return source[node.args[1]]
    # Asked of the graph rather than the arguments: an operator without a schema may nest its tensors deeply.
    operands = [item for used in node.all_input_nodes for item in as_tuple(values[used])]
    constant = all(value.constant for value in operands)
    schema = getattr(node.target, "_schema", None)
    op = schema.name.removeprefix("aten::") if schema is not None else str(node.target)
    if not any(value.has_channels for value in operands):
        result = like(node, constant)
        return replace(result, zeros_of=path) if op == "zeros" else result
    arguments = (
        named_arguments(node, values) if schema is not None else {str(i): value for i, value in enumerate(operands)}
    )
    results = node.meta.get("val")
    several = isinstance(results, list | tuple)
    shapes = tuple(value.shape for value in as_tuple(like(node, constant))) or ((),)
    reads = {user.args[1] for user in node.users if user.target is operator.getitem and user.users}
    used = frozenset(i for i in reads if isinstance(i, int)) if several else frozenset({0})
    this = Call(op, path, arguments, shapes, used, labels, refusals, attributes)
    value = RULES.get(op, refuse_all)(this)
    if not several or isinstance(value, tuple):
        return value
    if value.has_channels and used - {0}:
        value = refuse_all(this, "gives states that are read, for which there is no removal rule")
    return (value, *like(node, constant)[1:])


def as_tuple(value: Any) -> tuple[Value, ...]:
    """One result or several, as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def named_arguments(node: fx.Node, values: Mapping[fx.Node, Any]) -> dict[str, Any]:
    """The arguments by the names of the operator's schema, with nodes replaced by their values."""
    named: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        given: Any = argument.default_value if argument.has_default_value() else None
        if i < len(node.args):
            given = node.args[i]
        elif argument.name in node.kwargs:
            given = node.kwargs[argument.name]
        named[argument.name] = fx.node.map_arg(given, lambda used: values[used])
    return named


def bundled_groups(
    labels: Labels, births: Mapping[str, tuple[Channels, ...]], parameters: frozenset[str]
) -> tuple[ChannelGroup, ...]:
    """Group the channels, and tell the groups that must stay of one width.

    A bundle of which an axis is not one whole group, frozen in part for instance, is frozen altogether.
    """
    place_of = {
        axis.labels[0]: (name, dim)
        for name, axes in births.items()
        for dim, axis in enumerate(axes[:2])
        if len(axis.labels)
    }
    while True:
        groups = list(group_channels(labels, births, parameters))
        holders: defaultdict[Place, list[ChannelGroup]] = defaultdict(list)
        for group in groups:
            for place in {(member.name, member.dim) for member in group.members}:
                holders[place].append(group)
        broken = False
        bundle_of: dict[str, str] = {}
        for bundle, axes in labels.bundles.items():
            found = [group for axis in axes for group in holders[place_of[axis[0]]]]
            reasons = [reason for axis in axes for label in axis.tolist() if (reason := labels.reason(label))]
            if not reasons and [group.width for group in found] == [len(axis) for axis in axes]:
                joined = {bundle_of.get(group.name, bundle) for group in found}
                bundle_of.update({group.name: bundle for group in found})
                bundle_of.update({name: bundle for name, other in bundle_of.items() if other in joined})
            elif len(reasons) < sum(map(len, axes)):
                why = reasons[0] if reasons else "its channels are coupled unequally"
                for axis in axes:
                    freeze_all(labels, [Channels(axis, axis > 0)], f"{bundle} is its width: {why}")
                broken = True
        if not broken:
            return tuple(replace(group, bundle=bundle_of.get(group.name)) for group in groups)


def group_channels(
    labels: Labels, births: Mapping[str, tuple[Channels, ...]], parameters: frozenset[str]
) -> Iterator[ChannelGroup]:
    """Gather the label classes, and put classes that own alike into one group."""
    owned: defaultdict[int, dict[Carrier, list[int]]] = defaultdict(dict)  # class of labels -> what it owns
    roles: dict[Place, Role] = {}
    for name, axes in births.items():
        for dim, axis in enumerate(axes):
            for index, label in enumerate(axis.labels.tolist()):
                both = label in labels.produced and label in labels.consumed  # such as W and W.T, tied
                carrier = ((name, dim), both or label in labels.leaky)
                owned[labels.find(label)].setdefault(carrier, []).append(index)
                if label in labels.produced:
                    roles[name, dim] = Role.PRODUCER
                elif label in labels.consumed:
                    roles[name, dim] = Role.CONSUMER
    alike: defaultdict[tuple[str | None, tuple[tuple[Carrier, int], ...]], list[int]] = defaultdict(list)
    for root, indices in owned.items():
        reason = labels.reason(root)
        if reason is None or any(roles.get(place) is Role.PRODUCER for place, _ in indices):
            alike[reason, tuple((carrier, len(mine)) for carrier, mine in indices.items())].append(root)
    taken: defaultdict[str, int] = defaultdict(int)
    for (reason, counts), roots in alike.items():
        carriers = [carrier for carrier, _ in counts]
        made = maker(carriers, roles)
        roots.sort(key=lambda root: owned[root][made][0])
        name = made[0][0].removesuffix(".weight")
        taken[name] += 1
        members = tuple(
            Member(
                name=place[0],
                dim=place[1],
                role=roles.get(place, Role.POINTWISE),
                indices=tuple(tuple(owned[root][place, leaky]) for root in roots),
                leaky=leaky,
            )
            for place, leaky in carriers
        )
        yield ChannelGroup(
            name=name if taken[name] == 1 else f"{name}#{taken[name]}",
            members=members,
            width=len(roots),
            parameters_per_channel=parameters_of_channel(members, births, parameters),
            frozen=reason,
        )


def maker(carriers: list[Carrier], roles: Mapping[Place, Role]) -> Carrier:
    """The weight that makes the channels, or failing that, the first tensor that carries them."""
    return next((carrier for carrier in carriers if roles.get(carrier[0]) is Role.PRODUCER), carriers[0])


def parameters_of_channel(
    members: Iterable[Member], births: Mapping[str, tuple[Channels, ...]], parameters: frozenset[str]
) -> int:
    """Parameters that go with the first channel of the group."""
    dropped: defaultdict[str, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
    for member in members:
        dropped[member.name][member.dim] += len(member.indices[0])
    total = 0
    for name in dropped.keys() & parameters:
        sizes = [len(axis.labels) for axis in births[name]]
        left = [size - dropped[name][dim] for dim, size in enumerate(sizes)]
        total += int(np.prod(sizes)) - int(np.prod(left))
    return total
