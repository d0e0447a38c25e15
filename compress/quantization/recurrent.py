"""LSTMs with INT8 weights, whose activations are scaled as they come: the operator DynamicQuantizeLSTM."""

import tempfile
from pathlib import Path

import onnx

from compress.quantization.planning import LSTM, Plan


def quantize_lstms(model: onnx.ModelProto, planned: Plan) -> onnx.ModelProto:
    """Replace the planned LSTMs by ONNX Runtime's dynamically quantized ones; the rest of the graph stays as it is."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if not planned.recurrent:
        return model
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.onnx", Path(folder) / "made.onnx"
        onnx.save(model, str(given))  # given in memory, it would be left with weights in a deleted file
        quantize_dynamic(
            given,
            made,
            op_types_to_quantize=[LSTM],
            nodes_to_quantize=list(planned.recurrent),
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        result = onnx.load(str(made))
    for node in result.graph.node:  # of a Gemm it made a product with a Transpose that does not say its axes
        if node.op_type == "Transpose" and not node.attribute:  # ONNX Runtime 1.17 to 1.23 ends the process over that
            node.attribute.append(onnx.helper.make_attribute("perm", [1, 0]))
    onnx.helper.set_model_props(result, {entry.key: entry.value for entry in model.metadata_props})
    return result
