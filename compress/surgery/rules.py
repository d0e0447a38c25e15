"""How each operator passes channels on: an allow-list, one rule per ATen operator.

A rule reads the labels of the operands, unites or freezes them, and returns the labels of the result. An
operator without a rule freezes every channel that enters it and says so: nothing is guessed. To support
another operator, write its rule and add it to ``RULES``.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np

from compress.surgery.labels import FIXED, Axis, BoolArray, Channels, IntArray, Labels, Value, fixed


@dataclass(frozen=True, eq=False)
class Call:
    """One operator call of the traced graph.

    Attributes:
        op: Name of the ATen operator, without overload.
        where: Path of the module that made the call.
        arguments: The operator's arguments by the names of its schema, defaults included.
        shapes: Shapes of the results.
        used: Which results are used.
        labels: The labels of the whole network.
        refusals: Collects why channels were frozen, for the user to read.
        attributes: Of the module that made the call.
    """

    op: str
    where: str
    arguments: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    used: frozenset[int]
    labels: Labels
    refusals: list[str]
    attributes: Mapping[str, Any]

    @property
    def place(self) -> str:
        """Where the call was made, for the user to read."""
        return self.where or "the network"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first result."""
        return self.shapes[0]

    @property
    def operands(self) -> list[Value]:
        """Every tensor operand, those in lists included."""
        found: list[Value] = []
        for argument in self.arguments.values():
            items = argument if isinstance(argument, list | tuple) else [argument]
            found.extend(item for item in items if isinstance(item, Value))
        return found

    @property
    def constant(self) -> bool:
        """Whether no operand depends on the network's input."""
        return all(value.constant for value in self.operands)

    def refuse(self, axes: Iterable[Axis], why: str) -> None:
        """Freeze these axes, and record why if that froze a channel."""
        reason = f"{self.place}: {self.op} {why}"
        for axis in axes:
            if axis is not None:
                self.labels.freeze(axis, reason)
                if reason not in self.refusals:
                    self.refusals.append(reason)

    def result(self, axes: Iterable[Axis]) -> Value:
        """The result of the call, with these axes."""
        return Value(self.shape, tuple(axes), self.constant)


Rule: TypeAlias = Callable[[Call], Value | tuple[Value, ...]]
OneResult: TypeAlias = Callable[[Call], Value]


# ---------------------------------------------------------------------------------------------- helpers


def position(dim: int, ndim: int) -> int:
    """A dimension counted from the front."""
    return dim % ndim if ndim else 0


def refuse_all(call: Call, why: str = "has no removal rule") -> Value:
    """Freeze every channel that enters the call."""
    call.refuse((axis for value in call.operands for axis in value.axes), why)
    return fixed(call.shape, call.constant)


def couple(call: Call, axes: Sequence[Axis]) -> list[Channels]:
    """Unite axes that meet index by index; a meeting with an axis without channels freezes the others."""
    live = [axis for axis in axes if axis is not None]
    if len(live) < len(axes):
        call.refuse(live, "joins it with a tensor of fixed width")
        return []
    for other in live[1:]:
        call.labels.unite(live[0].labels, other.labels, f"{call.place}: {call.op} joins it with a fixed width")
    return live


def contract(call: Call, read: Axis, columns: Axis) -> None:
    """A weighted sum: the columns of a weight read the channels of an activation."""
    if read is None:  # the network's input, or what is left of frozen channels
        call.labels.freeze(columns, f"{call.place} reads a tensor of fixed width")
        return
    live = couple(call, [read, columns])
    if live:
        labels = live[1].labels.tolist()
        call.labels.consumed.update(labels)
        call.labels.leaky.update(label for label, zero in zip(labels, read.zero, strict=True) if not zero)
        if not live[1].zero.all():
            call.refuse(live, "reads it with a weight whose columns cannot be masked")


def produce(call: Call, rows: Axis, bias: Value | None) -> Axis:
    """The channels that a weight's rows and its bias make."""
    if rows is not None:
        call.labels.produced.update(rows.labels.tolist())
    if bias is None:
        return rows
    live = couple(call, [rows, bias.axes[0]])
    return live[0].with_zero(live[0].zero & live[1].zero) if live else None


def bystander(axis: Axis, bias: Value | None) -> Axis:
    """An axis that a weighted sum leaves alone; a bias is added to its masked channels too."""
    return axis if axis is None or bias is None else axis.with_zero(False)


# ------------------------------------------------------------------------------------- weighted sums


def convolution(call: Call) -> Value:
    """conv1d, conv2d, conv3d: dense, depthwise (each channel has filters of its own), or in groups of channels."""
    x, weight, bias = call.arguments["input"], call.arguments["weight"], call.arguments["bias"]
    groups = call.arguments["groups"]
    if not weight.constant:
        return refuse_all(call, "has a computed weight")
    kernel = weight.axes[2:]
    at = len(x.shape) - len(kernel) - 1
    call.refuse(x.axes[at + 1 :], "slides along the channels")
    for axis in kernel:
        call.labels.freeze(axis, "it is a kernel axis")
    if groups == 1:
        contract(call, x.axes[at], weight.axes[1])
        made = produce(call, weight.axes[0], bias)
    elif weight.shape[1] == 1:
        call.labels.freeze(weight.axes[1], "it is the single input of a depthwise filter")
        read = x.axes[at] and x.axes[at].take(np.repeat(np.arange(groups), weight.shape[0] // groups))
        live = couple(call, [read, weight.axes[0]] + ([] if bias is None else [bias.axes[0]]))
        kept = either_zero(live[:2]) if live else False
        made = live[0].with_zero(kept if bias is None else kept & live[2].zero) if live else None
    else:
        # Every group loses the same of its channels, so that the groups stay of one size.
        read = unite_blocks(call, x.axes[at], groups)
        contract(call, read, weight.axes[1])
        made = produce(call, weight.axes[0], bias)
        unite_blocks(call, made, groups)
    return call.result([*(bystander(axis, bias) for axis in x.axes[:at]), made, *(None for _ in kernel)])


def unite_blocks(call: Call, axis: Axis, count: int) -> Axis:
    """Unite the first, second, ... channel of each of ``count`` equal blocks; returns the first block."""
    if axis is None:
        return None
    blocks = axis.labels.reshape(count, -1)
    for block in blocks[1:]:
        call.labels.unite(blocks[0], block, f"{call.place}: {call.op} joins it with a fixed width")
    return Channels(blocks[0], np.all(axis.zero.reshape(count, -1), axis=0))


def linear(call: Call) -> Value:
    """linear: x @ weight.T + bias."""
    x, weight, bias = call.arguments["input"], call.arguments["weight"], call.arguments["bias"]
    if not weight.constant or len(weight.shape) != 2:
        return refuse_all(call, "has a computed weight")
    contract(call, x.axes[-1], weight.axes[1])
    made = produce(call, weight.axes[0], bias)
    return call.result([*(bystander(axis, bias) for axis in x.axes[:-1]), made])


def matmul(call: Call) -> Value:
    """matmul, mm, bmm: with a constant matrix on the right (a weight, pooling over segments), or in general."""
    left, right = call.arguments["self"], call.arguments.get("other", call.arguments.get("mat2"))
    if len(left.shape) < 2 or len(right.shape) < 2:
        return refuse_all(call, "with a vector has no removal rule")
    if right.constant and not left.constant and len(right.shape) == 2:
        contract(call, left.axes[-1], right.axes[0])
        return call.result([*left.axes[:-1], produce(call, right.axes[1], None)])
    call.refuse([left.axes[-1], right.axes[-2]], "sums over the channels of two activations")
    batch = len(call.shape) - 2
    lead = [Value(value.shape[:-2], value.axes[:-2]) for value in (left, right)]
    axes = [broadcast(call, lead, i, call.shape[:batch], either_zero) for i in range(batch)]
    return call.result([*axes, left.axes[-2], right.axes[-1]])


def batch_norm(call: Call) -> Value:
    """batch_norm, instance_norm: scale and offset per channel, on axis 1."""
    x = call.arguments["input"]
    given = {name: v for name in ("weight", "bias", "running_mean", "running_var") if (v := call.arguments[name])}
    live = couple(call, [x.axes[1], *(vector.axes[0] for vector in given.values())])
    axes = [bystander(axis, x) for axis in x.axes]
    axes[1] = None
    if live:
        zero: dict[str, Any] = {"weight": False, "bias": True, "running_mean": True}  # where there is none
        zero.update({name: vector.zero for name, vector in zip(given, live[1:], strict=True)})
        axes[1] = live[0].with_zero((live[0].zero & zero["running_mean"] | zero["weight"]) & zero["bias"])
    if call.arguments.get("use_input_stats", call.arguments.get("training")):
        call.refuse([axis for i, axis in enumerate(axes) if i != 1], "normalises over the channels")
        axes = [axis if i == 1 else None for i, axis in enumerate(axes)]
    return call.result(axes)


def layer_norm(call: Call) -> Value:
    """layer_norm: over axes without channels (statistics over channels change with every one removed)."""
    x, over = call.arguments["input"], len(call.arguments["normalized_shape"])
    gains = [axis for name in ("weight", "bias") if call.arguments[name] for axis in call.arguments[name].axes]
    call.refuse([*x.axes[-over:], *gains], "normalises over the channels")
    return call.result([*(axis and axis.with_zero(False) for axis in x.axes[:-over]), *[None] * over])


def recurrent(gates: int) -> Rule:
    """A rule for LSTM, GRU and RNN of any depth, both directions, with or without projection.

    Removing unit k of a layer and direction takes its row of each gate and its column of ``weight_hh``; a
    masked unit stays at its initial state, which must be zero. All layers and directions have one number of
    units, so they are a bundle: any units may go, but equally many of each.
    """

    def rule(call: Call) -> Value | tuple[Value, ...]:
        given = call.arguments
        x, weights, layers = given.get("input") or given["data"], given["params"], given["num_layers"]
        directions = 2 if given["bidirectional"] else 1
        each = len(weights) // (layers * directions)
        biases = 2 if given["has_biases"] else 0
        states = given["hx"] if isinstance(given["hx"], list | tuple) else [given["hx"]]
        if any(state.zeros_of != call.where for state in states):
            return refuse_all(call, "starts from a state that was given to it")
        if any(axis is None for weight in weights for axis in weight.axes):
            return refuse_all(call, "has a computed weight")
        call.refuse(x.axes[:-1], "runs along the channels")
        read: Axis = x.axes[-1]
        for layer in range(layers):
            starts = [(layer * directions + direction) * each for direction in range(directions)]
            cells = [recurrent_cell(call, read, weights[i : i + 2], weights[i + 2 : i + each], gates) for i in starts]
            read = always_zero(np.concatenate(cells))
        output = call.result([*[None] * (len(call.shape) - 1), read])
        if layers * directions > 1 or each > 2 + biases:
            return output  # the last states are of several layers, or of another width
        return (output, *(Value(shape, (*[None] * (len(shape) - 1), read)) for shape in call.shapes[1:]))

    return rule


def recurrent_cell(call: Call, read: Axis, weights: Sequence[Value], further: Sequence[Value], gates: int) -> IntArray:
    """One layer and direction; returns the labels of its outputs.

    Args:
        call: Of the whole stack of layers.
        read: The channels that it reads.
        weights: ``weight_ih`` (gates * hidden, input) and ``weight_hh`` (gates * hidden, output).
        further: Two biases or none, then ``weight_hr`` (output, hidden) or none.
        gates: How many blocks of rows a unit has a row in.
    """
    labels = call.labels
    from_input, from_state = weights
    rows = [axis.labels.reshape(gates, -1) for value in (*weights, *further) if (axis := value.axes[0]) is not None]
    projection = further[-1] if further and len(further[-1].shape) == 2 else None
    if projection is not None:
        rows.pop()
    units: IntArray = rows[0][0]
    for gate in np.concatenate(rows):
        labels.produced.update(gate.tolist())
        labels.unite(units, gate, f"{call.place}: {call.op} joins it with a fixed width")
    labels.bundles[f"{call.where}.hidden_size"].append(units)
    contract(call, read, from_input.axes[1])
    if projection is None:
        contract(call, always_zero(units), from_state.axes[1])
        return units
    contract(call, always_zero(units), projection.axes[1])
    output = produce(call, projection.axes[0], None)
    assert output is not None
    contract(call, always_zero(output.labels), from_state.axes[1])
    labels.bundles[f"{call.where}.proj_size"].append(output.labels)
    return output.labels


def always_zero(labels: IntArray) -> Channels:
    """Channels that are zero once masked."""
    return Channels(labels, np.ones(len(labels), dtype=np.bool_))


# --------------------------------------------------------------------------------- element by element

ZeroRule: TypeAlias = Callable[[Sequence[Channels | None]], BoolArray | bool]


def either_zero(parts: Sequence[Channels | None]) -> BoolArray:
    """A product is zero where any factor is."""
    zero: BoolArray = np.any([part.zero for part in parts if part is not None], axis=0)
    return zero


def all_zero(parts: Sequence[Channels | None]) -> BoolArray | bool:
    """A sum is sure to be zero only where every term is a masked channel."""
    zeros = [part.zero for part in parts if part is not None]
    zero: BoolArray = np.all(zeros, axis=0)
    return zero if len(zeros) == len(parts) else False


def never_zero(parts: Sequence[Channels | None]) -> bool:
    """Nothing is known of the result."""
    return False


def broadcast(call: Call, values: Sequence[Value], axis: int, shape: Sequence[int], zero: ZeroRule) -> Axis:
    """Join one axis of the result from the operands that have it at full size."""
    parts: list[Axis] = []
    absent = 0
    for value in values:
        i = axis - (len(shape) - len(value.shape))
        if i >= 0 and value.shape[i] == shape[axis]:
            parts.append(value.axes[i])
            continue
        absent += 1
        if i >= 0:
            call.labels.freeze(value.axes[i], f"{call.place}: {call.op} repeats its one channel")
    live = couple(call, parts)
    return live[0].with_zero(zero([*live, *[None] * absent])) if live else None


def elementwise(zero: ZeroRule, scalars_matter: bool = True) -> OneResult:
    """A rule that joins broadcast operands; ``zero`` tells when a masked channel stays zero."""

    def rule(call: Call) -> Value:
        values = call.operands
        if scalars_matter and any(isinstance(call.arguments.get(name), int | float) for name in ("self", "other")):
            values = [*values, fixed(())]
        return call.result(broadcast(call, values, i, call.shape, zero) for i in range(len(call.shape)))

    return rule


def unary(zero: bool) -> OneResult:
    """A function of each element; ``zero`` tells whether it maps zero to zero."""

    def rule(call: Call) -> Value:
        x = call.operands[0]
        return call.result(axis if axis is None or zero else axis.with_zero(False) for axis in x.axes)

    return rule


def clamp(call: Call) -> Value:
    """clamp, hardtanh: zero stays zero if it lies between the bounds, each a number, a tensor or none."""
    low, high = (call.arguments.get(name, call.arguments.get(f"{name}_val")) for name in ("min", "max"))
    outside = (isinstance(low, int | float) and low > 0) or (isinstance(high, int | float) and high < 0)
    return elementwise(never_zero if outside else all_zero, scalars_matter=False)(call)


def never_of_zero(call: Call) -> Value:
    """Logarithm, reciprocal: at a masked channel they would be infinite."""
    x = call.operands[0]
    call.refuse((axis for axis in x.axes if axis is not None and axis.zero.any()), "of a removed channel is infinite")
    return unary(False)(call)


def power(call: Call) -> Value:
    """pow: with a constant exponent."""
    exponent = call.arguments["exponent"]
    if isinstance(exponent, Value) or not isinstance(call.arguments["self"], Value):
        return refuse_all(call, "with a computed exponent has no removal rule")
    return unary(True)(call) if exponent > 0 else never_of_zero(call)


def divide(call: Call) -> Value:
    """div: zero over something stays zero, something over zero is refused."""
    above, below = call.arguments["self"], call.arguments["other"]
    if not isinstance(below, Value):
        return unary(True)(call)
    call.refuse(
        (axis for axis in below.axes if axis is not None and axis.zero.any()), "by a removed channel is infinite"
    )
    if not isinstance(above, Value):
        return elementwise(never_zero)(call)
    hidden = Value(below.shape, tuple(axis and axis.with_zero(False) for axis in below.axes))
    return call.result(broadcast(call, [above, hidden], i, call.shape, either_zero) for i in range(len(call.shape)))


def prelu(call: Call) -> Value:
    """prelu: one slope for all, or one per channel on axis 1."""
    x, slope = call.arguments["self"], call.arguments["weight"]
    if prod(slope.shape) == 1 and x.shape[1:2] != (1,):
        call.refuse(slope.axes, "has one slope for all channels")
        return call.result(x.axes)
    live = couple(call, [x.axes[1], slope.axes[0]])
    return call.result([x.axes[0], live[0] if live else None, *x.axes[2:]])


# --------------------------------------------------------------------------- reductions and windows


def reduction(call: Call) -> Value:
    """mean, sum, std, ...: over axes without channels; of zeros they are all zero."""
    x, ndim = call.arguments["self"], len(call.arguments["self"].shape)
    dim = call.arguments.get("dim")
    if isinstance(dim, int):
        dim = [dim]
    over = {position(d, ndim) for d in dim} if dim else set(range(ndim))
    call.refuse((x.axes[d] for d in over), "sums over the channels")
    if len(call.shape) == ndim:
        return call.result(None if d in over else axis for d, axis in enumerate(x.axes))
    return call.result(axis for d, axis in enumerate(x.axes) if d not in over)


def softmax(call: Call) -> Value:
    """softmax: over an axis without channels."""
    x = call.arguments["self"]
    over = position(call.arguments["dim"], len(x.shape))
    call.refuse([x.axes[over]], "normalises over the channels")
    return call.result(None if d == over or axis is None else axis.with_zero(False) for d, axis in enumerate(x.axes))


def window(spatial: int) -> Rule:
    """Pooling over the last ``spatial`` axes."""

    def rule(call: Call) -> Value:
        x = call.arguments["self"]
        call.refuse(x.axes[-spatial:], "slides along the channels")
        return call.result([*x.axes[:-spatial], *[None] * spatial])

    return rule


def pad(call: Call) -> Value:
    """constant_pad_nd, pad: on axes without channels."""
    x, amounts = call.arguments["self"], call.arguments["pad"]
    keeps_zero = call.arguments.get("value") in (None, 0)
    axes = list(x.axes)
    for i in range(len(amounts) // 2):
        if amounts[2 * i] or amounts[2 * i + 1]:
            call.refuse([axes[-1 - i]], "pads the channels")
            axes[-1 - i] = None
    return call.result(axis if axis is None or keeps_zero else axis.with_zero(False) for axis in axes)


# ------------------------------------------------------------------------------------ moving data about


def concatenate(call: Call) -> Value:
    """cat: end to end along one axis, index by index along the others."""
    values: list[Value] = [value for value in call.arguments["tensors"] if value.shape != (0,)]  # torch skips these
    along = position(call.arguments["dim"], len(call.shape))
    axes: list[Axis] = []
    for d in range(len(call.shape)):
        parts = [value.axes[d] for value in values]
        if d != along:
            live = couple(call, parts)
            axes.append(live[0].with_zero(all_zero(live)) if live else None)
        elif all(part is None for part in parts):
            axes.append(None)
        else:
            filled = [part or no_channels(value.shape[d]) for part, value in zip(parts, values, strict=True)]
            axes.append(Channels(np.concatenate([p.labels for p in filled]), np.concatenate([p.zero for p in filled])))
    return call.result(axes)


def no_channels(count: int) -> Channels:
    """Indices that can never be removed, beside others that can."""
    return Channels(np.full(count, FIXED, dtype=np.int64), np.zeros(count, dtype=np.bool_))


def stack(call: Call) -> Value:
    """stack: index by index, with a new axis."""
    values: list[Value] = list(call.arguments["tensors"])
    new = position(call.arguments["dim"], len(call.shape))
    axes: list[Axis] = []
    for d in range(len(call.shape) - 1):
        live = couple(call, [value.axes[d] for value in values])
        axes.append(live[0].with_zero(all_zero(live)) if live else None)
    axes.insert(new, None)
    return call.result(axes)


def take_slice(call: Call) -> Value:
    """slice: along an axis without channels, or all of it (a cut at a fixed index would move)."""
    x = call.arguments["self"]
    along = position(call.arguments["dim"], len(x.shape))
    if call.shape[along] == x.shape[along] and call.arguments["step"] == 1:
        return call.result(x.axes)
    call.refuse([x.axes[along]], "cuts the channels at a fixed index")
    return call.result(None if d == along else axis for d, axis in enumerate(x.axes))


def select(call: Call) -> Value:
    """select: one index of an axis without channels."""
    x = call.arguments["self"]
    along = position(call.arguments["dim"], len(x.shape))
    call.refuse([x.axes[along]], "picks a channel by its index")
    return call.result(axis for d, axis in enumerate(x.axes) if d != along)


def chunk(call: Call) -> tuple[Value, ...]:
    """chunk: equal pieces, which lose the same of their channels."""
    return pieces(call, call.arguments["self"])


def split(call: Call) -> tuple[Value, ...]:
    """split: pieces of a width that an attribute of the module holds, which is then brought up to date."""
    x, size = call.arguments["self"], call.arguments["split_size"]
    along = position(call.arguments["dim"], len(x.shape))
    axis = x.axes[along]
    if axis is None:
        return pieces(call, x)
    holders = [name for name, value in call.attributes.items() if type(value) is int and value == size]
    if len(holders) != 1 or x.shape[along] % size:
        call.refuse([axis], f"cuts the channels at the fixed width {size}")
        return pieces(call, fixed(x.shape))
    call.labels.store(call.where, holders[0], axis.labels[:size])
    return pieces(call, x)


def pieces(call: Call, x: Value) -> tuple[Value, ...]:
    """The results of cutting a tensor along one axis."""
    along = position(call.arguments["dim"], len(x.shape))
    axis = x.axes[along]
    sizes = [shape[along] for shape in call.shapes]
    if axis is not None and len(set(sizes)) > 1:
        call.refuse([axis], "cuts the channels into unequal pieces")
        axis = None
    unite_blocks(call, axis, len(sizes))
    starts = np.cumsum([0, *sizes])
    cut = [axis and axis.take(np.arange(a, b)) for a, b in itertools.pairwise(starts.tolist())]
    return tuple(
        Value(shape, tuple(piece if d == along else other for d, other in enumerate(x.axes)), call.constant)
        for shape, piece in zip(call.shapes, cut, strict=True)
    )


def gated_linear_unit(call: Call) -> Value:
    """glu: one half times the sigmoid of the other."""
    x = call.arguments["self"]
    along = position(call.arguments["dim"], len(x.shape))
    halves = x.axes[along]
    unite_blocks(call, halves, 2)
    half = halves and halves.take(np.arange(call.shape[along]))
    return call.result(half if d == along else axis for d, axis in enumerate(x.axes))


def permute(call: Call) -> Value:
    """permute: any order of the axes."""
    x = call.arguments["self"]
    return call.result(x.axes[position(d, len(x.shape))] for d in call.arguments["dims"])


def transpose(call: Call) -> Value:
    """transpose, t: two axes change places."""
    x = call.arguments["self"]
    axes, ndim = list(x.axes), len(x.shape)
    if ndim >= 2:
        i, j = position(call.arguments.get("dim0", 0), ndim), position(call.arguments.get("dim1", 1), ndim)
        axes[i], axes[j] = axes[j], axes[i]
    return call.result(axes)


def expand(call: Call) -> Value:
    """expand: axes of size one are repeated."""
    return call.result(broadcast(call, [call.operands[0]], i, call.shape, all_zero) for i in range(len(call.shape)))


def reshape(call: Call) -> Value:
    """view, reshape, flatten, squeeze, ...: axes are merged or split in blocks of equal size."""
    x = call.operands[0]
    axes: list[Axis] = [None] * len(call.shape)
    for sources, targets in blocks(x.shape, call.shape):
        live = [i for i in sources if x.axes[i] is not None]
        if len(live) == 1:
            merged = merge_block(x, sources, live[0])
            split = split_block(call, merged, [call.shape[j] for j in targets])
            if split is not None:
                axes[targets[split[0]]] = split[1]
                continue
        call.refuse((x.axes[i] for i in live), "mixes the channels with another axis")
    # An axis of one channel has no place in a block: nothing tells where it went.
    for axis, size in zip(x.axes, x.shape, strict=True):
        if size == 1:
            call.labels.freeze(axis, f"{call.place}: {call.op} moves its one channel")
    return call.result(axes)


def blocks(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair the shortest runs of axes with the same number of elements, axes of size one left out."""
    left = [i for i, size in enumerate(source) if size != 1]
    right = [j for j, size in enumerate(target) if size != 1]
    found: list[tuple[list[int], list[int]]] = []
    while left and right:
        run: tuple[list[int], list[int]] = ([left.pop(0)], [right.pop(0)])
        while (a := prod(source[i] for i in run[0])) != (b := prod(target[j] for j in run[1])):
            (run[0] if a < b else run[1]).append((left if a < b else right).pop(0))
        found.append(run)
    return found


def merge_block(x: Value, sources: Sequence[int], live: int) -> Channels:
    """Flatten a block of axes, of which one holds channels: its labels are repeated and tiled."""
    axis = x.axes[live]
    assert axis is not None
    before = prod(x.shape[i] for i in sources if i < live)
    after = prod(x.shape[i] for i in sources if i > live)
    return axis.take(np.tile(np.repeat(np.arange(x.shape[live]), after), before))


def split_block(call: Call, merged: Channels, sizes: Sequence[int]) -> tuple[int, Channels] | None:
    """Unflatten a block: the axis that holds the channels and its labels, or None if no single axis does."""
    roots = np.array([call.labels.find(label) for label in merged.labels.tolist()]).reshape(sizes)
    index = np.arange(len(merged.labels)).reshape(sizes)
    for d, size in enumerate(sizes):
        lines = np.moveaxis(roots, d, 0).reshape(size, -1)
        if (lines == lines[:, :1]).all():
            members = np.moveaxis(index, d, 0).reshape(size, -1)
            zero: BoolArray = np.all(merged.zero[members], axis=1)
            return d, merged.take(members[:, 0]).with_zero(zero)
    return None


def nothing(call: Call) -> Value:
    """An assertion that export adds, or a new tensor of given size: the channels' values do not matter."""
    return fixed(call.shape, constant=True)


# ------------------------------------------------------------------------------------------- the table


def table(rule: Rule, *names: str) -> dict[str, Rule]:
    """One rule for several operators."""
    return dict.fromkeys(names, rule)


ELEMENT_BY_ELEMENT: dict[str, Rule] = {
    **table(elementwise(all_zero), "add", "sub", "rsub", "where", "maximum", "minimum", "expand_as"),
    **table(elementwise(either_zero, scalars_matter=False), "mul"),
    **table(elementwise(never_zero), "eq", "ne", "gt", "ge", "lt", "le", "masked_fill", "logical_and", "logical_or"),
    **table(divide, "div"),
    **table(power, "pow"),
    **table(prelu, "prelu"),
    **table(clamp, "clamp", "clamp_min", "clamp_max", "hardtanh"),
    **table(
        unary(True),
        *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "hardswish"),
        *("abs", "neg", "sqrt", "square", "sin", "erf", "dropout", "feature_dropout", "sign", "zeros_like"),
        *("to", "_to_copy", "type_as", "clone", "contiguous", "detach", "alias", "lift_fresh_copy"),
    ),
    **table(
        unary(False),
        *("sigmoid", "hardsigmoid", "softplus", "exp", "cos"),
        *("logical_not", "ones_like", "full_like", "log_sigmoid"),
    ),
    **table(never_of_zero, "log", "log10", "log2", "rsqrt", "reciprocal"),
}

RULES: dict[str, Rule] = {
    **ELEMENT_BY_ELEMENT,
    **{f"{name}_": rule for name, rule in ELEMENT_BY_ELEMENT.items()},  # in place
    **table(convolution, "conv1d", "conv2d", "conv3d"),
    **table(linear, "linear"),
    **table(matmul, "matmul", "mm", "bmm"),
    **table(batch_norm, "batch_norm", "_native_batch_norm_legit_no_training", "instance_norm"),
    **table(layer_norm, "layer_norm"),
    **table(recurrent(4), "lstm"),
    **table(recurrent(3), "gru"),
    **table(recurrent(1), "rnn_tanh", "rnn_relu"),
    **table(reduction, "mean", "sum", "std", "var", "amax", "amin", "linalg_vector_norm"),
    **table(softmax, "softmax", "_softmax", "log_softmax"),
    **table(window(1), "avg_pool1d", "max_pool1d", "adaptive_avg_pool1d"),
    **table(window(2), "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d"),
    **table(pad, "constant_pad_nd", "pad"),
    **table(concatenate, "cat"),
    **table(stack, "stack"),
    **table(chunk, "chunk"),
    **table(split, "split"),
    **table(gated_linear_unit, "glu"),
    **table(take_slice, "slice"),
    **table(select, "select"),
    **table(permute, "permute"),
    **table(transpose, "transpose", "t"),
    **table(expand, "expand"),
    **table(reshape, "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"),
    **table(nothing, "_assert_tensor_metadata", "new_zeros", "new_ones", "new_full", "new_empty"),
}
