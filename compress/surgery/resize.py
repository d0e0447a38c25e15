"""Give a freshly built network the widths of a pruned state dict, so that it loads."""

import copy
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from compress.errors import ModelError
from compress.surgery.graph import tensor_names
from compress.surgery.removal import get_tensor, replace_tensor, update_widths

Network = TypeVar("Network", bound=nn.Module)

RESIZABLE = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU),
)


def resize_to(model: Network, shapes: Mapping[str, Sequence[int]]) -> Network:
    """Return a copy of a network whose convolutions, linear layers, batch norms and gains have the given widths.

    Resized tensors hold zeros until a state dict is loaded.

    Args:
        model: The network at its full widths; left as it is.
        shapes: Key of the state dict -> shape. Keys that are absent keep their shape.

    Raises:
        ModelError: Names the first key that the network does not have, whose kind of tensor does not fit, whose
            layer cannot be resized, or that disagrees with another key of its layer.
    """
    model = copy.deepcopy(model)
    first_names = tensor_names(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    asked: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        if key not in first_names:
            raise ModelError(f"{key}: {type(model).__name__} has no such tensor.")
        name, wanted, have = first_names[key], tuple(shape), tuple(get_tensor(model, key).shape)
        if asked.setdefault(name, wanted) != wanted:
            raise ModelError(f"{key} shares its tensor with {name}, but {wanted} is not {asked[name]}.")
        if wanted == have:
            continue
        if len(wanted) != len(have) or wanted[2:] != have[2:] or 0 in wanted:
            raise ModelError(f"{key}: {type(model).__name__} has shape {have} there, which cannot become {wanted}.")
        module = modules[key.rpartition(".")[0]]
        # A network's own module may hold a bare parameter, a gain per channel; torch's layers also store widths.
        if not isinstance(module, RESIZABLE) and type(module).__module__.startswith("torch."):
            raise ModelError(f"{key}: the width of {type(module).__name__} cannot be changed from {have} to {wanted}.")
        aliases = [alias for alias, first in first_names.items() if first == name]
        replace_tensor(model, aliases, get_tensor(model, key).detach().new_zeros(wanted))
    for path, module in modules.items():
        if isinstance(module, RESIZABLE):
            check_widths(path, module)
            update_widths(module)
    return model


def check_widths(path: str, module: nn.Module) -> None:
    """Refuse a layer whose own tensors disagree on its number of channels."""
    own = {name: tensor for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.ndim}
    widths = {name: tensor.shape[0] for name, tensor in own.items()}
    for name, width in widths.items():
        first, expected = next(iter(widths.items()))
        if width != expected:
            raise ModelError(f"{path}.{name} has {width} channels, but {path}.{first} has {expected}.")
