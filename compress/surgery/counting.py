"""Parameters, bytes and multiply-accumulates, before and after a removal.

Each is a sum of products of widths: a weight has rows times columns times kernel elements, a convolution takes as
many multiply-accumulates for every output position, a matrix product its three sizes. How a width depends on the
number of channels that each group loses is known from the labels, so thousands of removals are counted in the time
that one would take to build.
"""

import copy
import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.surgery.graph import ChannelGraph, ChannelGroup, Place, Removal
from compress.surgery.labels import IntArray
from compress.surgery.removal import remove_channels

FloatArray: TypeAlias = NDArray[np.float64]
Sizes: TypeAlias = list[tuple[int, ...]]  # of matrix products: each one's multiply-accumulates are their product
Product: TypeAlias = tuple[float, Sequence[int]]  # a factor, and the rows of a width table that it is multiplied with

BYTES = 4  # of a weight in fp32


def count_parameters(model: nn.Module) -> int:
    """Count the weights; shared ones once, buffers such as batch-norm statistics not at all."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_after(graph: ChannelGraph, channels: Removal) -> int:
    """Predict ``count_parameters`` of the network without these channels, from shapes alone."""
    gone = graph.removed_indices(channels)
    return sum(
        math.prod(size - len(gone.get((name, dim), ())) for dim, size in enumerate(graph.shapes[name]))
        for name in graph.parameters
    )


class WidthTable:
    """How wide every dimension of every tensor is once so many channels of each group are gone.

    Channels of one group own the same number of indices everywhere, so their number is all that matters. Dimensions
    of the same width that depend alike on the groups share a row.

    Attributes:
        row_of: (tensor, dimension) -> its row.
        sizes: (rows,) the widths with every channel.
        owned: (rows, groups) indices that go with one channel of each group.
    """

    def __init__(self, graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> None:
        carried: defaultdict[Place, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for column, group in enumerate(groups):
            for member in group.members:
                carried[member.name, member.dim][column] += len(member.indices[0])
        rows: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
        self.row_of: dict[Place, int] = {}
        for name, shape in graph.shapes.items():
            for dim, size in enumerate(shape):
                alike = (size, tuple(carried[name, dim].items()))
                self.row_of[name, dim] = rows.setdefault(alike, len(rows))
        self.sizes: FloatArray = np.array([size for size, _ in rows], dtype=np.float64)
        self.owned: FloatArray = np.zeros((len(rows), len(groups)))
        for row, (_, owners) in enumerate(rows):
            for column, count in owners:
                self.owned[row, column] = count

    def widths(self, removed: IntArray) -> FloatArray:
        """The widths (removals, rows) once ``removed[i, j]`` channels of group j are gone in removal i."""
        left: FloatArray = self.sizes - removed @ self.owned.T
        return left


class Counter:
    """A sum of products of widths, as a function of how many channels each group has lost.

    Attributes:
        unit: What is counted, for messages.
    """

    def __init__(self, unit: str, table: WidthTable, products: Iterable[Product]) -> None:
        self.unit = unit
        changing = table.owned.sum(axis=1) > 0
        merged: defaultdict[tuple[int, ...], float] = defaultdict(float)
        for factor, rows in products:
            fixed = math.prod(table.sizes[row] for row in rows if not changing[row])
            merged[tuple(sorted(row for row in rows if changing[row]))] += factor * fixed
        self._constant = merged.pop((), 0.0)
        self._factors: FloatArray = np.array(list(merged.values()))
        rows_used = [row for key in merged for row in key]
        self._sizes, self._owned = table.sizes[rows_used], table.owned[rows_used]
        self._starts: IntArray = np.cumsum([0, *(len(key) for key in merged)])[:-1]

    def count(self, removed: IntArray) -> int:
        """How much is left when ``removed[i]`` channels of group i are gone."""
        return int(self.counts(removed[None])[0])

    def counts(self, removed: IntArray) -> IntArray:
        """The same for several removals at once: (removals, groups) -> (removals,)."""
        if not len(self._sizes):
            return np.full(len(removed), round(self._constant), dtype=np.int64)
        left = self._sizes - removed @ self._owned.T
        products: FloatArray = np.multiply.reduceat(left, self._starts, axis=1)
        counts: IntArray = np.rint(products @ self._factors + self._constant).astype(np.int64)
        return counts


class ParameterCounter(Counter):
    """Counts the parameters."""

    def __init__(self, graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> None:
        table = WidthTable(graph, groups)
        super().__init__("parameters", table, tensor_products(graph, table, graph.parameters))


class ByteCounter(Counter):
    """Counts the bytes of the weights and running statistics in fp32, without the header of a file."""

    def __init__(self, graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> None:
        table = WidthTable(graph, groups)
        super().__init__("bytes of weights", table, tensor_products(graph, table, graph.shapes, BYTES))


def tensor_products(graph: ChannelGraph, table: WidthTable, names: Iterable[str], each: float = 1) -> Iterable[Product]:
    """The numbers of elements of these tensors, ``each`` counted for one."""
    return ((each, [table.row_of[name, dim] for dim in range(len(graph.shapes[name]))]) for name in names)


class MacsCounter(Counter):
    """Counts the multiply-accumulates of convolutions and matrix products, as ``count_macs`` does.

    Which groups decide the sizes of a product cannot be read off its operands: some are activations. So the network
    is run thinned in a few known ways, and a size that changes is recognised by how it changes: as a multiple of some
    width in the table. A size that is a multiple of none counts as constant; that happens to no network known here,
    and would make the count too high.

    Args:
        model: The network.
        graph: Its channel groups.
        groups: Those whose channels may go.
        example: An input; multiply-accumulates are those for it.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup], example: Tensor) -> None:
        table = WidthTable(graph, groups)
        removed = thinnings(groups, table)
        seen = [
            matrix_products(remove_channels(model, graph, first_channels(groups, counts)).eval(), example)
            for counts in removed
        ]
        row_of = {proportions(widths): row for row, widths in enumerate(table.widths(removed).T)}
        products: list[Product] = []
        for sizes in zip(*seen, strict=True):  # of one product in every network
            factor, rows = 1.0, []
            for size in zip(*sizes, strict=True):  # one of its factors in every network
                if len(set(size)) == 1 or (key := proportions(size)) not in row_of:
                    factor *= size[0]
                else:
                    rows.append(row_of[key])
                    factor *= size[0] / table.sizes[rows[-1]]
            products.append((factor, rows))
        super().__init__("multiply-accumulates", table, products)


def thinnings(groups: Sequence[ChannelGroup], table: WidthTable) -> IntArray:
    """Numbers of channels to remove, (removals, groups), by which every two widths in the table can be told apart.

    The first removal is none. The second takes half, so that every width that can change does. The others are random,
    and as many as it takes.
    """
    bundles = {group.bundle or group.name: group.width for group in groups}
    of_bundle = np.zeros((len(groups), len(bundles)), dtype=np.int64)
    for i, group in enumerate(groups):
        of_bundle[i, list(bundles).index(group.bundle or group.name)] = group.width > 1
    kinds = len({proportions(row) for row in np.column_stack([table.sizes, table.owned @ of_bundle])})
    for number in itertools.count(2):
        rng = np.random.default_rng(number)
        lost = [[0, width // 2, *rng.integers(0, width // 2 + 1, number)] for width in bundles.values()]
        removed: IntArray = np.array(lost, dtype=np.int64).reshape(len(bundles), 2 + number).T @ of_bundle.T
        if not groups or len({proportions(widths) for widths in table.widths(removed).T}) == kinds:
            return removed
    raise AssertionError("random removals tell any two widths apart in the end")


def first_channels(groups: Sequence[ChannelGroup], counts: IntArray) -> Mapping[str, range]:
    """The first so many channels of each group."""
    return {group.name: range(int(count)) for group, count in zip(groups, counts, strict=True)}


def proportions(sizes: Iterable[float]) -> tuple[int, ...]:
    """Whole numbers in lowest terms."""
    whole = [int(size) for size in sizes]
    divisor = math.gcd(*whole) or 1
    return tuple(size // divisor for size in whole)


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Count the multiply-accumulates of convolutions and matrix products for one input, in eval mode."""
    return sum(math.prod(sizes) for sizes in matrix_products(copy.deepcopy(model).eval(), example))


def matrix_products(model: nn.Module, example: Tensor) -> Sizes:
    """The sizes whose product is the multiply-accumulates, of every convolution and matrix product in turn."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    # Without oneDNN a recurrent layer runs as matrix products.
    plain = torch.backends.mkldnn.flags(enabled=False) if recurrent else nullcontext()
    # setting the oneDNN flags warns about Intel GPUs
    with warnings.catch_warnings(action="ignore"), torch.no_grad(), plain, ProductRecorder() as recorder:
        model(example)
    return [*recorder.products]


class ProductRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the sizes of every matrix product that is made meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: Sizes = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note its sizes."""
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in PRODUCTS:
            self.products += PRODUCTS[func._overloadpacket](result, *args)
        return result


def product(result: Tensor, left: Tensor, right: Tensor, *_: Any) -> Sizes:
    """mm, bmm."""
    return [(*left.shape, right.shape[-1])]


def sum_and_product(result: Tensor, summand: Tensor, left: Tensor, right: Tensor, *_: Any) -> Sizes:
    """addmm, baddbmm."""
    return [(*left.shape, right.shape[-1])]


def convolution(result: Tensor, x: Tensor, weight: Tensor, *further: Any) -> Sizes:
    """Convolution: the whole weight at every position of the output; of the input, if it is transposed."""
    transposed = further[4]
    return [(*weight.shape, x.shape[0], *(x if transposed else result).shape[2:])]


def attention(result: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Sizes:
    """Attention in one operator: a score for every query and key, then a weighted sum of the values."""
    return [(*query.shape, key.shape[-2]), (*query.shape[:-1], *value.shape[-2:])]


PRODUCTS: Mapping[Any, Callable[..., Sizes]] = {
    torch.ops.aten.mm: product,
    torch.ops.aten.bmm: product,
    torch.ops.aten.addmm: sum_and_product,
    torch.ops.aten.baddbmm: sum_and_product,
    torch.ops.aten.convolution: convolution,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
}
