"""Opset 17: the same numbers, and a refusal by name where there is no such form."""

import numpy as np
import onnx
import pytest

from compress.errors import ModelError
from compress.tensorrt.opset import at_opset

AXIS = "axis = Constant <value_ints = [2]> ()\n"


@pytest.mark.parametrize("kind", ["ReduceMean", "ReduceL2", "ReduceMax", "ReduceSumSquare", "ReduceProd", "ReduceSum"])
def test_axes_of_reductions_become_attributes(graph_of, run, batches, kind: str) -> None:
    model = graph_of(f"{AXIS} y = {kind} <keepdims = 0, noop_with_empty_axes = 0> (x, axis)", {}, rank=2)
    made = at_opset(model, 17)
    onnx.checker.check_model(made, full_check=True)
    assert made.opset_import[0].version == 17
    reduction = made.graph.node[-1]
    assert len(reduction.input) == (2 if kind == "ReduceSum" else 1)
    for found, expected in zip(run(made, batches), run(model, batches), strict=True):
        assert np.array_equal(found, expected)


def test_a_reduction_over_everything_stays_one(graph_of, run, batches) -> None:
    model = graph_of("y = ReduceMean (x)", {})
    assert np.array_equal(run(at_opset(model, 17), batches)[1], run(model, batches)[1])


@pytest.mark.parametrize(
    "text",
    [
        "a, b = Split <axis = 1, num_outputs = 2> (x)\n y = Add (a, b)",
        'p = Constant <value_ints = [0, 0, 2, 0, 0, 2]> ()\n y = Pad <mode = "reflect"> (x, p)',
    ],
)
def test_splits_and_pads_stay_the_same(graph_of, run, batches, text: str) -> None:
    model = graph_of(text, {})
    made = at_opset(model, 17)
    onnx.checker.check_model(made, full_check=True)
    assert all(np.array_equal(a, b) for a, b in zip(run(made, batches), run(model, batches), strict=True))


@pytest.mark.parametrize("opset", [13, 16, 17, 20, 23])
def test_other_opsets_are_converted(graph_of, run, batches, opset: int) -> None:
    model = graph_of("a = Conv <pads = [1, 1]> (x, w)\n y = Relu (a)", {"w": (8, 8, 3)}, opset=opset)
    made = at_opset(model, 17)
    assert made.opset_import[0].version == 17
    assert model.opset_import[0].version == opset, "the given graph is left alone"
    assert np.allclose(run(made, batches)[0], run(model, batches)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "s = Shape <start = 2> (x)\n a = Sub (s, s)\n b = ReduceMax (x, a)\n y = Add (x, b)",
            "ReduceMax.*its axes are computed",
        ),
        (f"{AXIS} p = Constant <value_ints = [1, 1]> ()\n y = Pad (x, p, , axis)", "Pad.*it pads named axes"),
        (
            "i = Cast <to = 6> (x)\n b = BitwiseNot (i)\n y = Cast <to = 1> (b)",
            "BitwiseNot.* has no form at opset 17: it is new in opset 18",
        ),
    ],
)
def test_what_opset_17_does_not_have_is_refused_by_name(graph_of, text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        at_opset(graph_of(text, {}), 17)
