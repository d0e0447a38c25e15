"""Which widths a narrowed layer may have: multiples that runtimes want, and layers that are to be left whole."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from compress.errors import SettingError
from compress.surgery.graph import ChannelGraph, ChannelGroup

# Dimensions of a layer's weight -> the multiple that its number of channels should be of.
#
# ONNX Runtime lays the channels of float convolutions over images out in blocks of 16 on AVX-512. Measured for CAM++
# with ONNX Runtime 1.31.1 on one core of an AMD Zen 4, 3 s of audio: 24 channels in the 2-D front take as long as 32,
# 31 take longer than 32, and 16 pay fully (1.58 against 2.47 times the speed of the whole network at 40 % of the
# parameters). Convolutions over time and matrix products work in blocks of 8, less strictly: odd widths cost 5 % per
# operation in float and 16 % in INT8. TensorRT's and cuDNN's tensor cores want multiples of 8 in half precision.
MULTIPLES: Mapping[int, int] = {
    2: 8,  # linear and recurrent layers
    3: 8,  # convolutions over time
    4: 16,  # over images: the 2-D front of a speech network
    5: 16,
}


def multiple_for(graph: ChannelGraph, group: ChannelGroup) -> int:
    """The multiple that suits every layer which makes or reads the group's channels."""
    ranks = {len(graph.shapes[member.name]) for member in group.members if member.name in graph.shapes}
    return max((MULTIPLES[rank] for rank in ranks if rank in MULTIPLES), default=1)


def permitted_widths(
    graph: ChannelGraph, groups: Sequence[ChannelGroup], round_to: int | None, min_width: int | None
) -> list[int]:
    """The widths that groups of one bundle may have: their own, then multiples below it, down to a floor.

    Args:
        graph: The network's channel groups.
        groups: They must stay of one width.
        round_to: A narrowed group keeps a multiple of this; None takes what the runtimes want, see ``MULTIPLES``.
        min_width: The floor; None takes one multiple of what the runtimes want.
    """
    wanted = max(multiple_for(graph, group) for group in groups)
    quantum = wanted if round_to is None else round_to
    floor = max(wanted if min_width is None else min_width, quantum, *(least_width(graph, group) for group in groups))
    width = groups[0].width
    return [width, *(narrow for narrow in range((width - 1) // quantum * quantum, 0, -quantum) if narrow >= floor)]


def least_width(graph: ChannelGraph, group: ChannelGroup) -> int:
    """What torch asks of a group: an LSTM with projection must have more units than projections."""
    projections = [graph.shapes[m.name][0] for m in group.members if ".weight_hr_l" in m.name and m.dim == 1]
    return max(projections, default=0) + 1


def layer_of(tensor: str) -> str:
    """The layer that a parameter or buffer belongs to."""
    return tensor.rpartition(".")[0]


def kept_groups(graph: ChannelGraph, patterns: Iterable[str]) -> frozenset[str]:
    """The groups that must stay as they are so that layers are left whole.

    Args:
        graph: The network's channel groups.
        patterns: Names of layers, or of modules that contain them, with ``*`` and ``?`` as in file names.

    Returns:
        Names of the groups that have a member in a matching layer, as its rows or as its columns.

    Raises:
        SettingError: If a pattern matches no layer; offers a name near it.
    """
    layers: dict[str, set[str]] = {}
    for tensor in [*graph.shapes, *(alias for aliases in graph.aliases.values() for alias in aliases)]:
        parts = layer_of(tensor).split(".")
        for depth in range(1, len(parts) + 1):
            layers.setdefault(".".join(parts[:depth]), set()).add(tensor)
    first_name = {alias: name for name, aliases in graph.aliases.items() for alias in aliases}
    whole: set[str] = set()
    for pattern in patterns:
        matching = [tensors for layer, tensors in layers.items() if fnmatchcase(layer, pattern)]
        if not matching:
            near = difflib.get_close_matches(pattern.strip("*."), layers, n=3, cutoff=0.4)
            hint = f"Near it are {', '.join(near)}." if near else "A dry run lists the layers."
            raise SettingError(f"keep: no layer matches '{pattern}'. {hint}")
        whole.update(first_name.get(tensor, tensor) for tensors in matching for tensor in tensors)
    return frozenset(group.name for group in graph.all_groups if any(m.name in whole for m in group.members))
