"""Lossless rewriting of ONNX graphs for a runtime: rules that know operators, and no network."""

from compress.rewriting.steps import RUNTIMES, Rewriting, Runtime, conv1d_as_conv2d, optimize, rewrite

__all__ = ["RUNTIMES", "Rewriting", "Runtime", "conv1d_as_conv2d", "optimize", "rewrite"]
