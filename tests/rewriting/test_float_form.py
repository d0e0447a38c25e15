"""Forms for graphs that stay in floating point."""

import numpy as np
from onnx import numpy_helper

from compress.rewriting.conv2d import conv2d_rules
from compress.rewriting.float_form import block_rules, max_rules
from compress.rewriting.steps import sweep

NORM = {"gamma": (8,), "beta": (8,), "mean": (8,), "var": (8,)}
LAYER = (
    "n = BatchNormalization (x, gamma, beta, mean, var)\n r = Relu (n)\n c = Conv (r, w, b)\n s = Sigmoid (c)\n"
    "m = Mul (c, s)\n k = Concat <axis = 1> (x, m)\n y = Conv (k, v)"
)
SHAPES = NORM | {"w": (8, 8, 1), "b": (8,), "v": (4, 16, 1)}


def test_batch_norm_between_convolutions_becomes_one_per_channel(graph_of, swept) -> None:
    text = "a = Conv (x, u)\n" + LAYER.replace("(x, gamma", "(a, gamma")
    model, _ = sweep(graph_of(text, SHAPES | {"u": (8, 8, 1)}), conv2d_rules())
    kinds = swept(model, block_rules())
    assert kinds["BatchNormalization"] == 0
    assert kinds["Conv"] == 3 + 2  # of the norm, and before the concatenation


def test_batch_norm_and_relu_become_a_max_where_all_scales_are_positive(graph_of, swept) -> None:
    shapes = {name.replace("gamma", "var_gamma"): shape for name, shape in SHAPES.items()}
    kinds = swept(graph_of(LAYER.replace("gamma", "var_gamma"), shapes), max_rules())
    assert (kinds["Max"], kinds["Relu"], kinds["BatchNormalization"]) == (1, 0, 0)


def test_a_negative_scale_keeps_the_batch_norm(graph_of, swept) -> None:
    model = graph_of(LAYER, SHAPES)
    gamma = next(tensor for tensor in model.graph.initializer if tensor.name == "gamma")
    gamma.CopyFrom(numpy_helper.from_array(np.linspace(-1, 1, 8, dtype=np.float32), "gamma"))
    assert swept(model, max_rules())["BatchNormalization"] == 1


def test_a_padded_convolution_keeps_the_batch_norm(graph_of, swept) -> None:
    shapes = {name.replace("gamma", "var_gamma"): shape for name, shape in SHAPES.items()} | {"w": (8, 8, 3)}
    text = LAYER.replace("gamma", "var_gamma").replace("c = Conv (r", "c = Conv <pads = [1, 1]> (r")
    assert swept(graph_of(text, shapes), max_rules())["BatchNormalization"] == 1
