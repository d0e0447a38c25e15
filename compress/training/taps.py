"""Reading what layers inside a network give, in a form in which two networks can be compared."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import SettingError, unknown_name

STRETCHES = 8  # of time, over each of which features are averaged: small enough to keep, and blind to strides
MOST_LAYERS = 4  # that are compared if none are named
PROBE_FRAMES = (120, 160)  # whatever changes between them is time


@dataclass(frozen=True)
class Tap:
    """A layer of the student and the one of the teacher that it should equal, each with its axis of time, if any."""

    student: str
    teacher: str
    student_axis: int | None
    teacher_axis: int | None


def choose_taps(
    student: nn.Module, teacher: nn.Module, num_mel_bins: int, layers: Sequence[str], setting: str = "distill.layers"
) -> list[Tap]:
    """Find the layers to compare.

    Args:
        student: In eval mode, as the teacher.
        teacher: Any network of the same features.
        num_mel_bins: Of the features.
        layers: Names, or pairs ``student=teacher``. Without any, up to ``MOST_LAYERS`` of those that have one name in
            both networks and an axis of time are taken, spread evenly from front to back.
        setting: What ``layers`` are called where they were given.

    Raises:
        SettingError: If a layer is not there or gives no tensor, or none were named and none have one name in both.
    """
    if layers:
        named = [name.partition("=") for name in layers]
        pairs = [(ours, theirs if equals else ours) for ours, equals, theirs in named]
    else:
        also = dict(_units(teacher))
        pairs = [(name, name) for name, _ in _units(student) if name in also]
    ours = _time_axes(student, [name for name, _ in pairs], num_mel_bins, setting)
    theirs = _time_axes(teacher, [name for _, name in pairs], num_mel_bins, setting)
    if layers:
        for whose, axes, names in (
            ("student", ours, [name for name, _ in pairs]),
            ("teacher", theirs, [name for _, name in pairs]),
        ):
            for name in names:
                if name not in axes:
                    raise SettingError(f"{setting}: {name} of the {whose} gives no tensor to compare.")
        return [Tap(a, b, ours[a], theirs[b]) for a, b in pairs]
    taps = [Tap(a, b, ours[a], theirs[b]) for a, b in pairs if ours.get(a) is not None and theirs.get(b) is not None]
    if not taps:
        raise SettingError(
            f"{setting}: no layer has the same name in student and teacher. Name pairs, such as layer2=blocks.1, or set"
            " gamma to 0."
        )
    places = np.linspace(0, len(taps) - 1, MOST_LAYERS + 1).round().astype(int)[1:]
    return [taps[place] for place in sorted(set(places.tolist()))]


@contextmanager
def tapped(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Give a mapping that holds, after each call of the network, what the named layers gave."""
    seen: dict[str, Tensor] = {}

    def see(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor):
                seen[name] = output

        return model.get_submodule(name).register_forward_hook(hook)

    handles = [see(name) for name in dict.fromkeys(names)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def stretched(output: Tensor, time_axis: int | None) -> Tensor:
    """Average over stretches of time: (batch, channels, STRETCHES), or (batch, channels, 1) of what has no time."""
    if time_axis is None:
        return output.flatten(1)[:, :, None]
    return F.adaptive_avg_pool1d(output.movedim(time_axis, -1).flatten(1, -2), STRETCHES)


def _units(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules of a network that are called, by name: containers without a forward are looked into."""
    for name, child in model.named_children():
        if type(child) in (nn.ModuleDict, nn.ModuleList):
            yield from _units(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _time_axes(model: nn.Module, names: Sequence[str], num_mel_bins: int, setting: str) -> Mapping[str, int | None]:
    """The axis of each named layer's output that grows with the utterance; layers without one tensor are left out."""
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise unknown_name(f"layer in {setting}", name, known)
    shapes = []
    with tapped(model, names) as seen, torch.no_grad():
        for frames in PROBE_FRAMES:
            model(torch.zeros(1, frames, num_mel_bins))
            shapes.append({name: output.shape for name, output in seen.items()})
    short, long = shapes
    found: dict[str, int | None] = {}
    for name, shape in short.items():
        grown = [axis for axis, size in enumerate(shape) if size != long[name][axis]]
        if len(shape) >= 2 and shape[0] == 1 and 0 not in grown and len(grown) <= 1:
            found[name] = grown[0] if grown else None
    return found
