"""Remove channels from a network, or mask them in place of removing them."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from compress.errors import SettingError
from compress.surgery.graph import ChannelGraph, Removal, Role

Network = TypeVar("Network", bound=nn.Module)

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


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
        SettingError: If the channels do not exist, are frozen, or none of a group would be left; or if an LSTM would
            get as many units as projections.
    """
    model = copy.deepcopy(model)
    narrowed: dict[str, Tensor] = {}
    for (name, dim), gone in graph.removed_indices(channels).items():
        if name in graph.stored_widths:
            path, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(path), attribute, graph.stored_widths[name] - len(gone))
            continue
        tensor = narrowed.get(name, get_tensor(model, name))
        doomed = set(gone)
        kept = [i for i in range(tensor.shape[dim]) if i not in doomed]
        narrowed[name] = tensor.index_select(dim, torch.tensor(kept, device=tensor.device))
    for name, tensor in narrowed.items():
        replace_tensor(model, [name, *graph.aliases.get(name, ())], tensor)
    for module in model.modules():
        update_widths(module)
    return model


def widths_stored_in(model: nn.Module, graph: ChannelGraph) -> dict[str, int]:
    """Dotted path of every attribute that keeps a number of channels -> its value in this network."""
    found = {}
    for name in graph.stored_widths:
        path, _, attribute = name.rpartition(".")
        found[name] = int(getattr(model.get_submodule(path), attribute))
    return found


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
    """Make a layer's stored widths agree with its tensors.

    Raises:
        SettingError: If torch has no such layer.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups > 1 and module.in_channels == module.groups:  # depthwise: filters of its own for each channel
            module.groups = module.weight.shape[0] * module.groups // module.out_channels
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):  # instance norm too
        vector = module.running_mean if module.running_mean is not None else module.weight
        module.num_features = module.num_features if vector is None else vector.shape[0]
    elif isinstance(module, nn.RNNBase):
        rows, module.input_size = module.get_parameter("weight_ih_l0").shape
        module.hidden_size = rows // GATES[module.mode]
        module.proj_size = module.get_parameter("weight_hh_l0").shape[1] if module.proj_size else 0
        if module.proj_size == module.hidden_size:
            raise SettingError(
                f"an LSTM would have {module.hidden_size} units and as many projections, which torch takes for an LSTM"
                " without projection. Remove one channel more or less."
            )
        module.flatten_parameters()
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
            if (member.role is not Role.CONSUMER or member.leaky) and member.name not in graph.stored_widths:
                zero_indices(model, member.name, member.dim, [i for c in gone for i in member.indices[c]])
    return model


@torch.no_grad()
def mask_consumers(model: Network, graph: ChannelGraph, channels: Removal) -> Network:
    """Return a copy of the same shapes in which nothing reads these channels: only weight columns are zeroed.

    A second reference that shares no tensor with ``mask_channels`` (but for leaky ones).

    Raises:
        SettingError: As ``remove_channels``.
    """
    model = copy.deepcopy(model)
    for group, gone in graph.chosen(channels):
        for member in group.members:
            if (member.role is Role.CONSUMER or member.leaky) and member.name not in graph.stored_widths:
                zero_indices(model, member.name, member.dim, [i for c in gone for i in member.indices[c]])
    return model


def zero_indices(model: nn.Module, name: str, dim: int, indices: list[int]) -> None:
    """Zero slices of one parameter or buffer, in place."""
    tensor = get_tensor(model, name)
    tensor.index_fill_(dim, torch.tensor(indices, device=tensor.device), 0)
