"""Give a freshly built network the widths of a pruned state dict, so that it loads."""

import copy
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from compress.errors import ModelError
from compress.surgery.graph import RESIZABLE, tensor_names
from compress.surgery.removal import GATES, get_tensor, replace_tensor, update_widths

Network = TypeVar("Network", bound=nn.Module)


def resize_to(
    model: Network, shapes: Mapping[str, Sequence[int]], stored_widths: Mapping[str, int] | None = None
) -> Network:
    """Return a copy of a network whose layers and gains have the given widths.

    Convolutions, linear and recurrent layers, batch and instance norms can be resized. Resized tensors hold zeros
    until a state dict is loaded.

    Args:
        model: The network at its full widths; left as it is.
        shapes: Key of the state dict -> shape. Keys that are absent keep their shape.
        stored_widths: Dotted path of an attribute that keeps a number of channels -> that number; see
            ``widths_stored_in``.

    Raises:
        ModelError: Names the first key or attribute that the network does not have, whose kind of tensor does not
            fit, whose layer cannot be resized, or that disagrees with another key of its layer.
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
    for name, width in (stored_widths or {}).items():
        path, _, attribute = name.rpartition(".")
        present = vars(modules[path]).get(attribute) if path in modules else None
        if type(present) is not int or type(width) is not int or width < 1:
            raise ModelError(f"{name}: {type(model).__name__} has no such width to set to {width}.")
        setattr(modules[path], attribute, width)
    for path, module in modules.items():
        if isinstance(module, RESIZABLE):
            check_widths(path, module)
            update_widths(module)
    return model


def check_widths(path: str, module: nn.Module) -> None:
    """Refuse a layer whose own tensors disagree on its number of channels."""
    if isinstance(module, nn.RNNBase):
        check_recurrent(path, module)
        return
    own = {name: tensor for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.ndim}
    widths = {name: tensor.shape[0] for name, tensor in own.items()}
    for name, width in widths.items():
        first, expected = next(iter(widths.items()))
        if width != expected:
            raise ModelError(f"{path}.{name} has {width} channels, but {path}.{first} has {expected}.")


def check_recurrent(path: str, module: nn.RNNBase) -> None:
    """Refuse a recurrent layer whose tensors disagree on its number of units."""
    rows, inputs = module.get_parameter("weight_ih_l0").shape
    gates, output = GATES[module.mode], module.get_parameter("weight_hh_l0").shape[1]
    wide = output * (2 if module.bidirectional else 1)
    for name, tensor in module.named_parameters():
        kind, _, layer = name.removesuffix("_reverse").rpartition("_l")
        expected = {
            "weight_ih": (rows, inputs if layer == "0" else wide),
            "weight_hh": (rows, output),
            "weight_hr": (output, rows // gates),
        }.get(kind, (rows,))
        if tuple(tensor.shape) != expected or rows % gates or not (module.proj_size or output == rows // gates):
            raise ModelError(
                f"{path}.{name} has shape {tuple(tensor.shape)}, but {expected} goes with {path}.weight_ih_l0."
            )
