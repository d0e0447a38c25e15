"""Counting what rules did to small graphs."""

from collections import Counter
from collections.abc import Callable

import onnx
import pytest

from compress.rewriting.steps import outputs_of, relative_error, sweep


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
