"""Trace a network to a graph of ATen operators, of which each node knows the module that made it.

``torch.export`` comes first. Where it gives up (a call inside ``try``, for instance), the network is run once
on tensors without data by ``make_fx``, which gives the same operators. A network whose path depends on the
data is refused by both.
"""

import copy
import io
import linecache
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from compress.errors import ModelError

TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Traced:
    """The operators of a network.

    Attributes:
        graph: Of ATen operators; every node has its result's shape in ``meta["val"]``.
        tensors: Placeholder -> the name of the parameter or buffer that it stands for.
        paths: Operator call -> path of the module whose forward made it; empty for the network itself.
    """

    graph: fx.Graph
    tensors: Mapping[fx.Node, str]
    paths: Mapping[fx.Node, str]


def trace_operators(model: nn.Module, example: Tensor) -> Traced:
    """Trace a network in eval mode; it is left as it is.

    Raises:
        ModelError: If it cannot be copied or traced; names the line of the network's code.
    """
    try:
        model = copy.deepcopy(model).eval()
    except RuntimeError as error:  # torch.nn.utils.weight_norm keeps a tensor that torch does not copy
        raise ModelError(f"{type(model).__name__} cannot be copied: {str(error).splitlines()[0]}") from error
    with quiet():
        try:
            return exported(model, example)
        except Exception as error:  # torch.export raises many unrelated kinds
            try:
                return run_without_data(model, example)
            except Exception:  # and so does make_fx; the first error tells more
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                where = line_of_model(error)
                raise ModelError(f"{type(model).__name__} cannot be traced{where}: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from warning of its own data structures, and from printing the graph of a failed trace."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def exported(model: nn.Module, example: Tensor) -> Traced:
    """Trace with torch.export."""
    program = torch.export.export(model, (example,), strict=False)
    if any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in program.graph.nodes):
        program = program.run_decompositions({})  # in-place operators become ordinary ones
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    tensors = {node: names[node.name] for node in placeholders if node.name in names}
    return Traced(program.graph, tensors, {node: exported_path(node) for node in program.graph.nodes})


def exported_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward made this node of an exported graph."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).split("@")[0] if stack else ""


def run_without_data(model: nn.Module, example: Tensor) -> Traced:
    """Trace with make_fx, and note by hooks how many nodes there are when a module starts and ends."""
    names = {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    switches: list[tuple[int, str]] = []  # from this number of nodes on, this module runs
    running = [""]

    def started(path: str) -> None:
        running.append(path)
        switches.append((nodes_so_far(), path))

    def ended() -> None:
        running.pop()
        switches.append((nodes_so_far(), running[-1]))

    def forward(tensors: dict[str, Tensor], features: Tensor) -> Any:
        return functional_call(model, tensors, (features,))

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if path:
                before = module.register_forward_pre_hook(lambda *_, path=path: started(path))
                hooks.callback(before.remove)
                after = module.register_forward_hook(lambda *_: ended(), always_call=True)
                hooks.callback(after.remove)
        graph = make_fx(forward, tracing_mode="fake", pre_dispatch=True)(names, example).graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    paths: dict[fx.Node, str] = {}
    pending = iter([*switches, (len(graph.nodes), "")])
    start, following = "", next(pending)
    for number, node in enumerate(graph.nodes):
        while following[0] <= number:
            start, following = following[1], next(pending, (len(graph.nodes) + 1, ""))
        paths[node] = start
    return Traced(graph, dict(zip(placeholders, names, strict=False)), paths)


def nodes_so_far() -> int:
    """How many nodes the graph has that is being traced."""
    mode: Any = get_proxy_mode()
    return len(mode.tracer.graph.nodes)


def line_of_model(error: BaseException) -> str:
    """Where in the network's own code an error arose: " at FILE:LINE (CODE)"; empty if that cannot be told."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_file() and not Path(frame.filename).is_relative_to(TORCH)
    ]
    here = [i for i, frame in enumerate(own) if frame.filename == __file__]
    inside = own[here[-1] + 1 :] if here else own
    if not inside:
        return ""
    frame = inside[-1]
    code = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return f" at {Path(frame.filename).name}:{frame.lineno} ({code})"
