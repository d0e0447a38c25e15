"""A graph as the rules look at it, and what they find."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError

if TYPE_CHECKING:
    import onnx

Severity = Literal["error", "warning"]
Version: TypeAlias = tuple[int, int]
Array: TypeAlias = NDArray[Any]

OLDEST: Version = (8, 5)
DEFAULT_VERSION: Version = (10, 0)
BEYOND: Version = (12, 0)  # the first version of which nothing is known
OWN_DOMAINS = ("", "ai.onnx")
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Finding:
    """A demand that a graph does not meet.

    Attributes:
        rule: Its name, as docs/commands/lint.md lists them.
        node: Name of the node, or of the tensor or input where the fault is no node's; of a node without a name, that
            of its first output.
        severity: An error is refused by the parser or gives wrong results; a warning costs speed or accuracy.
    """

    rule: str
    node: str
    what: str
    remedy: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.severity}: {self.node}: {self.what}. {self.remedy} [{self.rule}]"


class Shapes(NamedTuple):
    """Sizes of one input in an optimization profile."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


Profile: TypeAlias = Mapping[str, Shapes]


def read_version(text: str) -> Version:
    """``8.6`` or ``8.6.1`` -> (8, 6); ``10`` -> (10, 0).

    Raises:
        InputError: If it is no version, or one of which nothing is known.
    """
    parts = text.split(".")
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"'{text}' is no version of TensorRT; 8.6 and 10 are.")
    version = (int(parts[0]), int(parts[1]) if len(parts) > 1 else 0)
    if not OLDEST <= version < BEYOND:
        raise InputError(f"TensorRT {text}: what it demands is not known; 8.5 to 11 are.")
    return version


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph with what the rules ask of it; nodes within If, Loop, Scan and functions are nodes as any."""

    model: "onnx.ModelProto"
    profile: Profile
    version: Version
    cache: dict[str, Array | None] = field(default_factory=dict)

    @cached_property
    def nodes(self) -> "list[onnx.NodeProto]":
        """Every node, at any depth."""
        return [*all_nodes(self.model.graph.node), *(n for f in self.model.functions for n in all_nodes(f.node))]

    @cached_property
    def tensors(self) -> "dict[str, onnx.TensorProto]":
        """Initializers, and the tensors of Constant nodes, by name."""
        graphs = [self.model.graph, *(graph for node in self.nodes for graph in graphs_in(node))]
        found = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}
        for node in self.nodes:
            tensor = next((a.t for a in node.attribute if a.name == "value"), None)
            if node.op_type == "Constant" and tensor is not None:
                found[node.output[0]] = tensor
        return found

    @cached_property
    def makers(self) -> "dict[str, onnx.NodeProto]":
        """Which node computes a value."""
        return {output: node for node in self.nodes for output in node.output if output}

    @cached_property
    def users(self) -> "dict[str, list[tuple[onnx.NodeProto, int]]]":
        """Which nodes read a value, and as which input."""
        found: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in self.nodes:
            for i, name in enumerate(node.input):
                found.setdefault(name, []).append((node, i))
        return found

    @cached_property
    def inputs(self) -> "list[onnx.ValueInfoProto]":
        """Inputs that are not weights."""
        weights = {tensor.name for tensor in self.model.graph.initializer}
        return [value for value in self.model.graph.input if value.name not in weights]

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return next((entry.version for entry in self.model.opset_import if entry.domain in OWN_DOMAINS), 0)

    @property
    def name(self) -> str:
        """What to call the whole."""
        return self.model.graph.name or "graph"

    @property
    def reader(self) -> str:
        """What to call the version."""
        return f"TensorRT {'.'.join(map(str, self.version))}"

    def value(self, name: str) -> Array | None:
        """What a constant holds; None of anything that is computed, or not loaded."""
        if name not in self.cache:
            self.cache[name] = self._value(name)
        return self.cache[name]

    def _value(self, name: str) -> Array | None:
        from onnx import helper, numpy_helper

        tensor = self.tensors.get(name)
        if tensor is not None:
            return None if is_external(tensor) else numpy_helper.to_array(tensor)
        node = self.maker(name, "Constant")
        for entry in () if node is None else node.attribute:
            if entry.name in ("value_int", "value_ints", "value_float", "value_floats"):
                return np.asarray(helper.get_attribute_value(entry))
        return None

    def maker(self, name: str, *kinds: str) -> "onnx.NodeProto | None":
        """The node that computes a value, if it is of one of these kinds."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type in kinds else None

    def is_constant(self, name: str) -> bool:
        """Whether a value is a constant, or computed of constants alone."""
        if name in self.tensors or not name:
            return True
        node = self.makers.get(name)
        return node is not None and all(self.is_constant(source) for source in node.input)

    def quantizers_before(self, name: str) -> "tuple[onnx.NodeProto, ...]":
        """DQ, or Q and DQ, that a value comes from; nothing where it comes from no DQ."""
        dequantizer = self.maker(name, "DequantizeLinear")
        if dequantizer is None:
            return ()
        quantizer = self.maker(dequantizer.input[0], "QuantizeLinear")
        return (dequantizer,) if quantizer is None else (quantizer, dequantizer)

    def quantizers(self) -> "Iterator[onnx.NodeProto]":
        """Q and DQ, but of a pair with the same parameters the Q alone, so that a fault is found once."""
        for node in self.nodes:
            if node.op_type not in QUANTIZERS or node.domain not in OWN_DOMAINS:
                continue
            before = self.maker(node.input[0], "QuantizeLinear") if node.op_type == "DequantizeLinear" else None
            if before is None or list(before.input[1:]) != list(node.input[1:]):
                yield node

    def layers_after(self, node: "onnx.NodeProto") -> "Iterator[tuple[onnx.NodeProto, int]]":
        """What reads the float numbers that a Q/DQ pair gives, and as which input."""
        for user, place in self.users.get(node.output[0], []):
            if user.op_type == "DequantizeLinear":
                yield from self.layers_after(user)
            else:
                yield user, place


Rule: TypeAlias = Callable[[Graph], Iterator[Finding]]


def graphs_in(node: "onnx.NodeProto") -> "list[onnx.GraphProto]":
    """Graphs in the attributes of a node, at any depth."""
    direct = [g for a in node.attribute for g in (*((a.g,) if a.HasField("g") else ()), *a.graphs)]
    return [*direct, *(inner for graph in direct for node in graph.node for inner in graphs_in(node))]


def all_nodes(nodes: "Sequence[onnx.NodeProto]") -> "Iterator[onnx.NodeProto]":
    """Nodes, and those of the graphs within them."""
    for node in nodes:
        yield node
        for graph in graphs_in(node):
            yield from graph.node


def name_of(node: "onnx.NodeProto") -> str:
    """What to call a node."""
    return str(node.name or next(iter(node.output), "") or node.op_type)


def attribute(node: "onnx.NodeProto", name: str, default: Any) -> Any:
    """Value of a node's attribute."""
    from onnx import helper

    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def type_name(data_type: int) -> str:
    """``FLOAT16`` and the like."""
    import onnx

    return str(onnx.TensorProto.DataType.Name(data_type))


def is_external(tensor: "onnx.TensorProto") -> bool:
    """Whether the content of a tensor lies in another file and was not loaded."""
    import onnx

    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)
