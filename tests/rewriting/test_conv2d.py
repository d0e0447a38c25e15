"""Conv1d as Conv2d: whole chains, with one way in and one way out."""

import pytest

from compress.rewriting import conv1d_as_conv2d
from compress.rewriting.conv2d import conv2d_rules
from compress.rewriting.steps import outputs_of, relative_error, sweep

CHAIN = (
    "c = Conv <pads = [2, 2], dilations = [2]> (x, w, b)\n r = Relu (c)\n"
    "n = BatchNormalization (r, gamma, beta, mean, var)\n d = Conv <strides = [1]> (n, v)\n s = Sigmoid (d)\n"
    "m = Mul (c, s)\n k = Concat <axis = 1> (x, m)\n y = Conv <kernel_shape = [1]> (k, u)"
)
SHAPES = {"w": (8, 8, 3), "b": (8,), "v": (8, 8, 1), "u": (4, 16, 1)} | {
    name: (8,) for name in ("gamma", "beta", "mean", "var")
}


def test_a_chain_is_entered_and_left_once(graph_of, swept) -> None:
    kinds = swept(graph_of(CHAIN, SHAPES), conv2d_rules())
    assert (kinds["Conv"], kinds["Unsqueeze"], kinds["Squeeze"]) == (3, 1, 1)


def test_every_convolution_has_two_axes_then(graph_of) -> None:
    result, _ = sweep(graph_of(CHAIN, SHAPES), conv2d_rules())
    ranks = {len(tensor.dims) for tensor in result.graph.initializer if tensor.name not in ("", None)}
    assert 3 not in ranks
    assert 4 in ranks


def test_a_second_time_changes_nothing(graph_of, swept) -> None:
    once, _ = sweep(graph_of(CHAIN, SHAPES), conv2d_rules())
    again, count = sweep(once, conv2d_rules())
    assert count == 0
    assert again is once


@pytest.mark.parametrize("attributes", ['auto_pad = "SAME_LOWER"', "strides = [2], pads = [1, 0]", "group = 8"])
def test_attributes_of_a_convolution_are_kept(graph_of, swept, attributes: str) -> None:
    weight = (8, 1, 3) if "group" in attributes else (8, 8, 3)
    assert swept(graph_of(f"y = Conv <{attributes}> (x, w)", {"w": weight}), conv2d_rules())["Conv"] == 1


@pytest.mark.parametrize("shape", [(), (1,), (8, 1), (1, 8, 1)])
def test_a_constant_of_any_rank_is_aligned(graph_of, swept, shape: tuple[int, ...]) -> None:
    kinds = swept(graph_of("c = Conv (x, w)\n y = Add (c, t)", {"w": (8, 8, 1), "t": shape}), conv2d_rules())
    assert kinds["Squeeze"] == 1


def test_a_convolution_over_two_axes_stays(graph_of, swept) -> None:
    text = "axis = Constant <value_ints = [1]> ()\n i = Unsqueeze (x, axis)\n y = Conv <pads = [1, 1, 1, 1]> (i, w)"
    kinds = swept(graph_of(text, {"w": (2, 1, 3, 3)}, rank=4), conv2d_rules())
    assert kinds["Squeeze"] == 0


def test_a_squeeze_of_a_last_axis_is_not_taken_for_the_row(graph_of, swept) -> None:
    text = (
        "axis = Constant <value_ints = [2]> ()\n c = Conv (x, w)\n p = ReduceMean <keepdims = 1> (c, axis)\n"
        "s = Squeeze (p, axis)\n a = Sigmoid (s)\n y = Add (a, t)"
    )
    swept(graph_of(text, {"w": (8, 8, 1), "t": (1, 8)}, rank=2), conv2d_rules())


def test_it_alone_leaves_the_rest_and_a_graph_without_conv1d_as_it_is(graph_of) -> None:
    model = graph_of(CHAIN, SHAPES)
    made = conv1d_as_conv2d(model)
    ranks = {tensor.name: len(tensor.dims) for tensor in made.graph.initializer}
    assert [ranks[node.input[1]] for node in made.graph.node if node.op_type == "Conv"] == [4, 4, 4]
    assert [node.op_type for node in made.graph.node].count("BatchNormalization") == 1
    assert relative_error(outputs_of(made), outputs_of(model)) <= 1e-5
    assert conv1d_as_conv2d(made) is made
