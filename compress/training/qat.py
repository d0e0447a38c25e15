"""Quantization-aware training: a network that computes with the rounded numbers that the pass ``ptq`` will give it.

Weights of convolutions and linear layers are rounded per output channel with the batch norm that export folds into
them, their inputs and the results of convolutions to 8 bits. Gradients pass straight through the rounding.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from compress.calibration.collect import Tensor as Seen
from compress.errors import ModelError
from compress.machine import has_vnni

Layer: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Linear
BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d

MOVES = ("squeeze", "unsqueeze", "reshape", "view", "flatten", "transpose", "permute", "contiguous")
LONG_FRAMES = 600  # of the traced example: what has one frame here has one in every utterance
RANGE_CROPS = 128  # whose extremes are the ranges of activations
BATCH = 16  # crops at a time


@dataclass(frozen=True)
class Unit:
    """A layer as one operator of the exported graph, by dotted names.

    Attributes:
        layer: Convolution or linear layer.
        norm: The batch norm that alone takes its result, and that export folds into it.
        relu: Whether a ReLU alone takes what it gives.
        rounds_result: Whether the result has Q/DQ, too: that of a convolution, if it is not the embedding.
    """

    layer: str
    norm: str | None
    relu: bool
    rounds_result: bool


def fake_quantized(model: nn.Module, crops: Tensor, bits: int | None = None) -> nn.Module:
    """Copy a network to one that computes with rounded weights and activations.

    The ranges of activations are the extremes that the float network has on the first ``RANGE_CROPS`` crops, and stay.
    The copy has the same parameters; what is learned there is taken out by :func:`plain`.

    Args:
        model: In eval mode; its batch norms have to stay in it.
        crops: Features (crops, frames, num_mel_bins).
        bits: Of weights; None takes what ``ptq`` takes on this CPU.

    Raises:
        ModelError: If there is nothing to round.
    """
    from compress.quantization.placement import grid_of

    rounded = copy.deepcopy(model)
    units = units_of(rounded, crops[:1])
    if not units:
        raise ModelError("qat: the network has no convolution or linear layer that ptq quantizes.")
    inputs, results = ranges_of(rounded, units, crops[:RANGE_CROPS])
    for unit in units:
        layer, norm = rounded.get_submodule(unit.layer), rounded.get_submodule(unit.norm) if unit.norm else None
        assert norm is None or isinstance(norm, BatchNorm)
        levels = {8: 127, 7: 64}[bits or (8 if has_vnni() else 7)]
        parametrize.register_parametrization(layer, "weight", RoundedWeight(norm, levels))
        layer.register_forward_pre_hook(Rounding.of(*grid_of(*inputs[unit.layer], symmetric=False)).before)
        if unit.rounds_result:
            end = norm or layer
            end.register_forward_hook(Rounding.of(*grid_of(*results[unit.layer], symmetric=False)).after)
    return rounded


def plain(model: nn.Module) -> nn.Module:
    """Copy what :func:`fake_quantized` gave, trained or not, to a network of the same parameters without rounding."""
    result = copy.deepcopy(model)
    for module in list(result.modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Rounding)]:
                del hooks[number]
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            ordered = {"weight": module.get_parameter("weight"), **module._parameters}  # it was put behind the bias
            module._parameters.clear()
            module._parameters.update(ordered)
    return result


def count_rounded(model: nn.Module) -> int:
    """Count the layers that compute with rounded weights."""
    return sum(isinstance(module, RoundedWeight) for module in model.modules())


@dataclass(frozen=True)
class Rounding:
    """Rounds activations to an unsigned 8-bit grid: value = (integer - zero_point) * step."""

    step: float
    zero_point: int

    @classmethod
    def of(cls, step: Any, zero_point: Any) -> "Rounding":
        """Of the numbers of a ``quantization.placement.Grid``."""
        return cls(float(step), int(zero_point))

    def __call__(self, values: Tensor) -> Tensor:
        """Round; the gradient is 1 within the range and 0 outside."""
        return torch.fake_quantize_per_tensor_affine(values, self.step, self.zero_point, 0, 255)

    def before(self, _: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As a forward pre-hook: round the input."""
        return (self(given[0]), *given[1:])

    def after(self, _: nn.Module, __: tuple[Tensor, ...], result: Tensor) -> Tensor:
        """As a forward hook: round the result."""
        return self(result)


class RoundedWeight(nn.Module):
    """A weight as its rounded product with the scale of a batch norm, divided by that scale.

    Args:
        norm: That is folded into the weight; None without one.
        levels: On each side of 0.
    """

    def __init__(self, norm: BatchNorm | None, levels: int) -> None:
        super().__init__()
        self.norm, self.levels = [norm], levels  # in a list: the batch norm is registered in its own place

    def forward(self, weight: Tensor) -> Tensor:
        """(out_channels, ...) -> the same shape; the gradient of the weight is that of its rounded value."""
        scale = self.scale(weight)
        folded = weight * scale
        with torch.no_grad():
            largest = folded.abs().flatten(1).amax(dim=1)
            step = torch.where(largest > 0, largest / self.levels, 1.0).clamp(min=1e-12)
        points = torch.zeros(len(step), dtype=torch.int32, device=weight.device)
        rounded = torch.fake_quantize_per_channel_affine(folded, step, points, 0, -self.levels, self.levels)
        return rounded / scale

    def scale(self, weight: Tensor) -> Tensor:
        """What the batch norm multiplies each output channel by; 1 where that is almost nothing."""
        norm, shape = self.norm[0], (len(weight), *(1,) * (weight.ndim - 1))
        if norm is None or norm.running_var is None:
            return torch.ones(shape, device=weight.device)
        scale = torch.rsqrt(norm.running_var + norm.eps) * (1.0 if norm.weight is None else norm.weight)
        return torch.where(scale.abs() > 1e-8, scale, 1.0).reshape(shape)


@torch.no_grad()
def ranges_of(
    model: nn.Module, units: list[Unit], crops: Tensor
) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """The extremes of what each layer reads and, behind batch norm and ReLU, gives."""
    inputs, results = {unit.layer: Seen() for unit in units}, {unit.layer: Seen() for unit in units}
    handles = []

    def watch(seen: Seen, relu: bool = False) -> Any:
        def look(_: nn.Module, given: Any, result: Tensor | None = None) -> None:
            values = given[0] if result is None else result
            if not seen.add((values.relu() if relu else values).cpu().numpy(), count=False):
                raise ModelError("qat: an activation of the network is NaN or infinite. Check its weights.")

        return look

    for unit in units:
        layer = model.get_submodule(unit.layer)
        handles.append(layer.register_forward_pre_hook(watch(inputs[unit.layer])))
        end = model.get_submodule(unit.norm) if unit.norm else layer
        handles.append(end.register_forward_hook(watch(results[unit.layer], unit.relu)))
    try:
        for batch in torch.split(crops, BATCH):
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    found = [
        {name: (r.low, r.high) for name, r in ((n, s.range("minmax", False, 100.0)) for n, s in kind.items())}
        for kind in (inputs, results)
    ]
    return found[0], found[1]


@dataclass(eq=False)
class _Call:
    """A call of a function of PyTorch: its name, the tensors given to it, and what it gave."""

    name: str
    given: list[Tensor]
    result: Any


@dataclass(eq=False)
class _Calls(TorchFunctionMode):
    """Notes every call, and keeps the tensors alive, so that none is taken for another."""

    calls: list[_Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append(_Call(func.__name__, list(_tensors((args, kwargs))), result))
        return result

    def users(self, value: Tensor) -> list[_Call]:
        """The calls that take a value, those that read its shape apart."""
        return [
            call
            for call in self.calls
            if any(given is value for given in call.given) and (isinstance(call.result, Tensor) or _holds(call.result))
        ]

    def sole_user(self, value: Tensor, through_moves: bool) -> _Call | None:
        """The one call that takes a value; None if there are others, or none."""
        users = self.users(value)
        if len(users) == 1 and through_moves and users[0].name in MOVES and isinstance(users[0].result, Tensor):
            return self.sole_user(users[0].result, through_moves)
        return users[0] if len(users) == 1 else None


def _holds(result: Any) -> bool:
    return isinstance(result, list | tuple) and any(isinstance(part, Tensor) for part in result)


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for part in given:
            yield from _tensors(part)
    elif isinstance(given, dict):
        yield from _tensors(list(given.values()))


@torch.no_grad()
def units_of(model: nn.Module, crop: Tensor) -> list[Unit]:
    """Find the layers that ``ptq`` quantizes in the exported graph, and what export makes one with each.

    Args:
        model: In eval mode.
        crop: Features (1, frames, num_mel_bins).
    """
    example = crop.repeat(1, -(-LONG_FRAMES // crop.shape[1]), 1)
    with _Calls() as seen:
        embedding = model(example)
    norms = {
        id(module.running_mean): name
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    }
    units = []
    for name, layer in model.named_modules():
        if not isinstance(layer, Layer) or _reads_one_channel(layer):
            continue
        call = next((c for c in seen.calls if any(given is layer.weight for given in c.given)), None)
        if call is None:
            continue
        result, norm = call.result, None
        user = seen.sole_user(result, through_moves=True)
        if user is not None and user.name == "batch_norm":
            norm = next((norms[id(given)] for given in user.given if id(given) in norms), None)
            result = user.result if norm else result
        user = seen.sole_user(result, through_moves=False)
        leaves = _leads_to(seen, result, embedding)
        frames = isinstance(layer, nn.Conv1d | nn.Conv2d) and max(call.result.shape[2:]) > 1
        units.append(Unit(name, norm, user is not None and user.name == "relu", frames and not leaves))
    return units


def _reads_one_channel(layer: Layer) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.in_channels == 1 and layer.groups == 1


def _leads_to(seen: _Calls, value: Tensor, end: Tensor) -> bool:
    """Whether a value is the network's result, moved at most."""
    if value is end:
        return True
    return any(call.name in MOVES and _leads_to(seen, call.result, end) for call in seen.users(value))
