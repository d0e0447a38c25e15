"""Remove channels from a network, or mask them in place of removing them."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from compress.surgery.graph import ChannelGraph, Removal, Role

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def remove_channels(model: Network, graph: ChannelGraph, channels: Removal) -> Network:
    """Return a copy of the network without these channels.

    Types, devices, ``requires_grad``, the training flag, batch-norm statistics and sharing of parameters are
    kept; widths stored in convolutions, linear layers and batch norms are brought up to date.

    Args:
        model: The network that ``graph`` was traced from; left as it is.
        graph: Its channel groups.
        channels: Group name -> channels to remove.

    Raises:
        SettingError: If the channels do not exist, are frozen, or none of a group would be left.
    """
    model = copy.deepcopy(model)
    keep: dict[str, list[tuple[int, list[int]]]] = {}
    for (name, dim), gone in graph.removed_indices(channels).items():
        doomed = set(gone)
        keep.setdefault(name, []).append((dim, [i for i in range(graph.shapes[name][dim]) if i not in doomed]))
    for name, kept in keep.items():
        narrow = get_tensor(model, name)
        for dim, indices in kept:
            narrow = narrow.index_select(dim, torch.tensor(indices, device=narrow.device))
        replace_tensor(model, [name, *graph.aliases.get(name, ())], narrow)
    for module in model.modules():
        update_widths(module)
    return model


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this name."""
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def replace_tensor(model: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Put one tensor in the place of a parameter or buffer, under all of its names."""
    old = get_tensor(model, names[0])
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    for name in names:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, new)


def update_widths(module: nn.Module) -> None:
    """Make a layer's stored widths agree with its tensors."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups > 1 and module.groups == module.out_channels:  # depthwise: a group per channel
            module.groups = module.weight.shape[0]
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        vector = module.running_mean if module.running_mean is not None else module.weight
        module.num_features = module.num_features if vector is None else vector.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]


@torch.no_grad()
def mask_channels(model: Network, graph: ChannelGraph, channels: Removal) -> Network:
    """Return a copy of the same shapes in which these channels are zero from their birth to their end.

    Weight rows, biases, batch norm (scale, offset AND statistics, or its shift would leak) and gains are zeroed.
    Weight columns are left alone, so that a removal that drops a wrong one shows; only columns behind an
    operator that does not map zero to zero, such as the sigmoid, are zeroed too.

    Raises:
        SettingError: As ``remove_channels``.
    """
    model = copy.deepcopy(model)
    for group, gone in graph.chosen(channels):
        for member in group.members:
            if member.role is not Role.CONSUMER or member.leaky:
                zero_indices(model, member.name, member.dim, [i for c in gone for i in member.indices[c]])
    return model


@torch.no_grad()
def mask_consumers(model: Network, graph: ChannelGraph, channels: Removal) -> Network:
    """Return a copy of the same shapes in which nothing reads these channels: only weight columns are zeroed.

    A second reference that shares no tensor with ``mask_channels`` (but for leaky columns).

    Raises:
        SettingError: As ``remove_channels``.
    """
    model = copy.deepcopy(model)
    for group, gone in graph.chosen(channels):
        for member in group.members:
            if member.role is Role.CONSUMER:
                zero_indices(model, member.name, member.dim, [i for c in gone for i in member.indices[c]])
    return model


def zero_indices(model: nn.Module, name: str, dim: int, indices: list[int]) -> None:
    """Zero slices of one parameter or buffer, in place."""
    tensor = get_tensor(model, name)
    tensor.index_fill_(dim, torch.tensor(indices, device=tensor.device), 0)
