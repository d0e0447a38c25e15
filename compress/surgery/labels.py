"""Channel labels: which indices of which axes are one and the same channel.

Every axis of every parameter is given fresh labels, one per index. Operators unite labels, and what is left
in one class at the end stands or falls together. Values passed between operators carry labels on the axes
that hold channels, and nothing on those that do not (batch, frames, mel bins).
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]

FIXED = 0  # the label of an index that can never be removed, such as one that comes from the network's input


@dataclass(frozen=True, eq=False)
class Channels:
    """An axis that holds channels.

    Attributes:
        labels: (n,) the label of each index.
        zero: (n,) whether the slice at this index is exactly zero once its channel is masked. It is lost by
            operators that do not map zero to zero, such as the sigmoid.
    """

    labels: IntArray
    zero: BoolArray

    def take(self, index: IntArray) -> "Channels":
        """Pick indices, as slicing, repeating and tiling do."""
        return Channels(self.labels[index], self.zero[index])

    def with_zero(self, zero: BoolArray | bool) -> "Channels":
        """The same labels with another ``zero``."""
        return Channels(self.labels, np.broadcast_to(np.asarray(zero, dtype=np.bool_), self.labels.shape))


Axis: TypeAlias = Channels | None  # None: no channels live on this axis


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor in the traced graph, as far as channels are concerned.

    Attributes:
        shape: Its shape for the traced example.
        axes: One entry per axis.
        constant: Whether it depends on parameters, buffers and constants alone, not on the network's input.
        zeros_of: Path of the module that made it of zeros, as a recurrent layer makes its own initial state.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    constant: bool = False
    zeros_of: str | None = None

    @property
    def has_channels(self) -> bool:
        """Whether any axis holds channels."""
        return any(axis is not None for axis in self.axes)


def fixed(shape: Iterable[int], constant: bool = False) -> Value:
    """A tensor without channels."""
    sizes = tuple(int(size) for size in shape)
    return Value(sizes, (None,) * len(sizes), constant)


class Labels:
    """Union-find over labels, with the reason why a class is frozen and the marks that weights leave."""

    def __init__(self) -> None:
        self._parent = [FIXED]
        self._reasons: dict[int, str] = {FIXED: "it has a fixed width"}
        self.produced: set[int] = set()  # labels of weight rows: a weighted sum makes the channel
        self.consumed: set[int] = set()  # labels of weight columns: a weighted sum reads the channel
        self.leaky: set[int] = set()  # columns that read something other than zero from a masked channel
        self.bundles: defaultdict[str, list[IntArray]] = defaultdict(list)  # axes that must stay of one size
        self.stored: dict[tuple[str, str], IntArray] = {}  # (module, attribute) -> the axis whose width it holds

    def new(self, count: int) -> IntArray:
        """Make ``count`` labels, each a class of its own."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count, dtype=np.int64)

    def find(self, label: int) -> int:
        """The label that stands for the class of ``label``."""
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def unite(self, left: IntArray, right: IntArray, reason: str) -> None:
        """Couple two axes index by index. Meeting a FIXED index freezes the other, for ``reason``."""
        if len(left) != len(right):
            raise ValueError(f"axes of {len(left)} and {len(right)} channels meet ({reason}).")
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            a, b = self.find(a), self.find(b)
            if a == b:
                continue
            if FIXED in (a, b):
                self._reasons.setdefault(max(a, b), reason)
                continue
            a, b = min(a, b), max(a, b)
            self._parent[b] = a
            if b in self._reasons:
                self._reasons.setdefault(a, self._reasons.pop(b))

    def store(self, module: str, attribute: str, axis: IntArray) -> None:
        """Note that an attribute of a module holds the width of this axis."""
        known = self.stored.setdefault((module, attribute), axis)
        if known is not axis:
            self.unite(known, axis, f"{module}.{attribute} is the width of several axes")

    def freeze(self, axis: Axis, reason: str) -> None:
        """Keep every channel of this axis; the first reason is the one reported."""
        if axis is not None:
            for label in axis.labels.tolist():
                self._reasons.setdefault(self.find(label), reason)

    def reason(self, label: int) -> str | None:
        """Why the class of ``label`` is frozen; None if it may be removed."""
        return self._reasons.get(self.find(label))
