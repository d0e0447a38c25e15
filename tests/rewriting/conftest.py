"""Small graphs, written as ONNX text."""

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.rewriting.steps import outputs_of, relative_error, sweep


@pytest.fixture(scope="session")
def graph_of() -> Callable[..., onnx.ModelProto]:
    """Makes a graph from feats (batch, frames, 8) through x (batch, 8, frames) to the value ``y``.

    Its weights are seeded noise of the shapes that are given; those named ``var...`` are positive.
    """

    def make(text: str, shapes: Mapping[str, tuple[int, ...]], rank: int = 3, opset: int = 18) -> onnx.ModelProto:
        head = f'<ir_version: 9, opset_import: ["" : {opset}]> '
        axes = ", ".join("NABC"[:rank])
        ends = f"net (float[batch, frames, 8] feats) => (float[{axes}] y) "
        body = "{ x = Transpose <perm = [0, 2, 1]> (feats)\n" + text + "}"
        model = onnx.parser.parse_model(head + ends + body)
        rng = np.random.default_rng(0)
        for name, shape in shapes.items():
            values = rng.uniform(0.5, 2, shape) if name.startswith("var") else rng.standard_normal(shape)
            model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        onnx.checker.check_model(model)
        return model

    return make


@pytest.fixture(scope="session")
def swept() -> Callable[..., Counter[str]]:
    """Applies rules once, checks that the outputs stay, and gives the kinds of node that there are then."""

    def apply(model: onnx.ModelProto, rules: list) -> Counter[str]:
        result, count = sweep(model, rules)
        onnx.checker.check_model(result)
        assert relative_error(outputs_of(result), outputs_of(model)) <= 1e-5
        assert bool(count) == (result is not model)
        return Counter(node.op_type for node in result.graph.node)

    return apply
