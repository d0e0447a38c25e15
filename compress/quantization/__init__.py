"""Post-training quantization of ONNX graphs: what, where, with which numbers, and what it costs."""

from compress.quantization.bias_correction import correct_biases
from compress.quantization.equalization import equalize
from compress.quantization.graph import count_weighted
from compress.quantization.layout import plain_transposes
from compress.quantization.placement import quantize
from compress.quantization.planning import OPERATORS, Plan, plan, tensors
from compress.quantization.recurrent import quantize_lstms
from compress.quantization.runtime import Operator, operators_run, summary
from compress.quantization.scheme import SCHEMES, Scheme, Target
from compress.quantization.sensitivity import sensitivity
from compress.quantization.slimming import slim
from compress.quantization.statistics import Channels, channels_of_inputs

__all__ = [
    "OPERATORS",
    "SCHEMES",
    "Channels",
    "Operator",
    "Plan",
    "Scheme",
    "Target",
    "channels_of_inputs",
    "correct_biases",
    "count_weighted",
    "equalize",
    "operators_run",
    "plain_transposes",
    "plan",
    "quantize",
    "quantize_lstms",
    "sensitivity",
    "slim",
    "summary",
    "tensors",
]
