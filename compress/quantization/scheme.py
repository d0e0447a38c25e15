"""How each runtime wants the numbers of a quantized graph."""

from dataclasses import dataclass
from typing import Literal

Target = Literal["onnxruntime", "openvino", "tensorrt"]


@dataclass(frozen=True)
class Scheme:
    """Types of activations and biases, and where Q/DQ is to stand. Weights are S8 per output channel everywhere.

    Attributes:
        symmetric: Activations are S8 with zero point 0, otherwise U8 with a zero point.
        quantized_results: Operators whose result needs Q/DQ too, so that the runtime takes its INT8 kernel.
        int_bias: Biases are S32 with DQ, otherwise float.
        weight_zero_points: The zeros of weights are written down, otherwise left out, which means the same.
        dynamic_lstm: The runtime has an LSTM with INT8 weights that finds the ranges of its activations itself.
        tensor_cores: The hardware gains by INT8 in dense products alone: depthwise convolutions and the last layer stay
            in float.
        skips: What a residual addition adds to a convolution's result has Q/DQ, so that both are one kernel.
    """

    symmetric: bool
    quantized_results: tuple[str, ...]
    int_bias: bool
    weight_zero_points: bool
    dynamic_lstm: bool
    tensor_cores: bool = False
    skips: bool = False


# ONNX Runtime takes its INT8 convolution only with a Q behind it and an S32 bias. TensorRT's parser refuses zero points
# other than 0 and quantized biases. OpenVINO 2026.4.1 folds weights back to float where several share their zeros: 115
# of the 224 quantized convolutions of CAM++ then ran in float. There and in
# TensorRT a float result may follow an INT8 operator.
SCHEMES: dict[Target, Scheme] = {
    "onnxruntime": Scheme(
        symmetric=False, quantized_results=("Conv",), int_bias=True, weight_zero_points=True, dynamic_lstm=True
    ),
    "openvino": Scheme(
        symmetric=False, quantized_results=(), int_bias=False, weight_zero_points=False, dynamic_lstm=False
    ),
    "tensorrt": Scheme(
        symmetric=True,
        quantized_results=(),
        int_bias=False,
        weight_zero_points=True,
        dynamic_lstm=False,
        tensor_cores=True,
        skips=True,
    ),
}
