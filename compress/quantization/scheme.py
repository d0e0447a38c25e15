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
        dynamic_lstm: The runtime has an LSTM with INT8 weights that finds the ranges of its activations itself.
    """

    symmetric: bool
    quantized_results: tuple[str, ...]
    int_bias: bool
    dynamic_lstm: bool


# ONNX Runtime fuses DQ -> Conv only with a Q behind it and, before 1.20, with an S32 bias. TensorRT's parser refuses
# zero points other than 0 and quantized biases. OpenVINO and TensorRT let a float result follow an INT8 operator.
SCHEMES: dict[Target, Scheme] = {
    "onnxruntime": Scheme(symmetric=False, quantized_results=("Conv",), int_bias=True, dynamic_lstm=True),
    "openvino": Scheme(symmetric=False, quantized_results=(), int_bias=False, dynamic_lstm=False),
    "tensorrt": Scheme(symmetric=True, quantized_results=(), int_bias=False, dynamic_lstm=False),
}
