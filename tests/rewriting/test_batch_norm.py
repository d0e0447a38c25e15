"""Batch norms go into the weights before and after them where that is exact, and only there."""

import pytest

from compress.rewriting.batch_norm import batch_norm_rules, gemm_rules
from compress.rewriting.steps import sweep

NORM = {"gamma": (8,), "beta": (8,), "mean": (8,), "var": (8,)}
BN = "BatchNormalization"
NORMALIZED = f"n = {BN} <epsilon = 0.01> (x, gamma, beta, mean, var)\n"


def test_before_it_a_convolution(graph_of, swept) -> None:
    text = f"c = Conv <pads = [1, 1]> (x, w)\n y = {BN} <epsilon = 0.01> (c, gamma, beta, mean, var)"
    kinds = swept(graph_of(text, NORM | {"w": (8, 8, 3)}), batch_norm_rules())
    assert (kinds["Conv"], kinds[BN]) == (1, 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_after_it_a_convolution_without_padding(graph_of, swept, bias: bool, kernel: int) -> None:
    text = NORMALIZED + f"y = Conv (n, w{', b' if bias else ''})"
    kinds = swept(graph_of(text, NORM | {"w": (4, 8, kernel), "b": (4,)}), batch_norm_rules())
    assert (kinds["Conv"], kinds[BN]) == (1, 0)


@pytest.mark.parametrize("attributes", ["pads = [1, 1]", 'auto_pad = "SAME_UPPER"', "group = 2"])
def test_a_padded_or_grouped_convolution_after_it_stays(graph_of, swept, attributes: str) -> None:
    text = NORMALIZED + f"y = Conv <{attributes}> (n, w)"
    kinds = swept(graph_of(text, NORM | {"w": (4, 4 if "group" in attributes else 8, 3)}), batch_norm_rules())
    assert kinds[BN] == 1


def test_what_else_reads_the_norm_still_gets_it(graph_of, swept) -> None:
    text = NORMALIZED + "c = Conv (n, w)\n y = Add (c, n)"
    kinds = swept(graph_of(text, NORM | {"w": (8, 8, 1)}), batch_norm_rules())
    assert (kinds["Conv"], kinds[BN]) == (1, 1)


@pytest.mark.parametrize("transposed", [0, 1])
def test_after_it_a_gemm(graph_of, swept, transposed: int) -> None:
    text = (
        "axis = Constant <value_ints = [2]> ()\n p = ReduceMean <keepdims = 0> (x, axis)\n"
        f"n = {BN} (p, gamma, beta, mean, var)\n y = Gemm <transB = {transposed}> (n, w, b)"
    )
    shapes = NORM | {"w": (4, 8) if transposed else (8, 4), "b": (4,)}
    kinds = swept(graph_of(text, shapes, rank=2), batch_norm_rules())
    assert (kinds["Gemm"], kinds[BN]) == (1, 0)


def test_a_convolution_of_one_frame_becomes_a_gemm_that_takes_the_norm(graph_of, swept) -> None:
    text = (
        "axis = Constant <value_ints = [2]> ()\n p = ReduceMean <keepdims = 0> (x, axis)\n"
        "u = Unsqueeze (p, axis)\n c = Conv (u, w)\n s = Squeeze (c, axis)\n"
        f"y = {BN} (s, gamma, beta, mean, var)"
    )
    model = graph_of(text, NORM | {"w": (8, 8, 1)}, rank=2)
    swept(model, gemm_rules())
    kinds = swept(sweep(model, gemm_rules())[0], batch_norm_rules())
    assert (kinds["Gemm"], kinds["Conv"], kinds[BN]) == (1, 0, 0)
