"""Rules on operators: which of them the parser knows, and what of them it does."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from compress.lint.graph import OLDEST, OWN_DOMAINS, Finding, Graph, Rule, Version, attribute, name_of

if TYPE_CHECKING:
    import onnx

_TABLE = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BlackmanWindow
    Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv
    DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If ImageScaler
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop
    LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression
    NonZero Not OneHot Or PRelu Pad ParametricSoftplus Pow QuantizeLinear RMSNormalization RNN RandomNormal
    RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign
    RotaryEmbedding Round STFT ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin
    Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh TensorScatter
    ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
# Of TensorRT 10.15: docs/operators.md of its parser.
OPERATORS = frozenset(_TABLE.split())
# Those that are not in the table of 8.5, and the first version to read them: from the parser's changelog. It does not
# tell of the last two lines; 10.0 and 10.15 are the oldest of which that is known or likely.
FIRST_VERSION: Mapping[str, Version] = {
    **dict.fromkeys(("GroupNormalization", "IsInf", "LayerNormalization"), (8, 6)),
    "Hardmax": (9, 2),
    "DeformConv": (10, 1),
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), (10, 4)),
    "STFT": (10, 5),
    **dict.fromkeys(("CastLike", "Gelu", "Mish"), (10, 0)),
    **dict.fromkeys(("Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"), (10, 15)),
}
FUNCTIONS: Version = (9, 0)  # the first to read a file's own functions
REMEDIES: Mapping[str, str] = {
    "DynamicQuantizeLSTM": "Quantize with ptq.target=tensorrt, which leaves LSTMs in float.",
    "DynamicQuantizeLinear": "Quantize with ranges found by calibration: ptq.target=tensorrt.",
    **dict.fromkeys(
        ("ConvInteger", "MatMulInteger", "QGemm", "QLinearAdd", "QLinearConcat", "QLinearConv", "QLinearMatMul"),
        "Quantize with Q/DQ instead of integer operators: ptq.target=tensorrt.",
    ),
}
# Which input has to be known when the engine is built, and the version from which it need not be.
CONSTANT_INPUT: Mapping[str, tuple[int, Version | None]] = {
    **{kind: (1, None) for kind in OPERATORS if kind.startswith("Reduce")},
    **dict.fromkeys(("CumSum", "OneHot", "Squeeze", "Unsqueeze"), (1, None)),
    "TopK": (1, (8, 6)),
    "Slice": (3, (10, 3)),
}
REDUCE_AXES: Version = (10, 0)  # the first known to look at axes that are an input, of others than ReduceSum
RECURRENT = ("LSTM", "GRU", "RNN")


def operators(graph: Graph) -> Iterator[Finding]:
    """Every operator is one that the parser knows."""
    functions = {(function.domain, function.name) for function in graph.model.functions}
    for node in graph.nodes:
        kind = node.op_type if node.domain in OWN_DOMAINS else f"{node.domain}.{node.op_type}"
        is_function = (node.domain, node.op_type) in functions
        first = FUNCTIONS if is_function else FIRST_VERSION.get(kind, OLDEST)
        if not is_function and kind not in OPERATORS:
            remedy = REMEDIES.get(node.op_type, "Write it with other operators, or build with a plugin of that name.")
            yield Finding("operator", name_of(node), f"the parser does not know {kind}", remedy)
        elif graph.version < first:
            what = f"{kind} is read from TensorRT {first[0]}.{first[1]} on; this is for {graph.reader}"
            yield Finding("operator", name_of(node), what, "Write it with other operators, or take a newer TensorRT.")


def restrictions(graph: Graph) -> Iterator[Finding]:
    """Operators are asked for no more than the parser does of them."""
    for node in graph.nodes:
        if node.domain in OWN_DOMAINS:
            for what, remedy in (*unsupported_inputs(graph, node), *unsupported_uses(node)):
                yield Finding("restriction", name_of(node), f"{node.op_type}: {what}", remedy)


def unsupported_inputs(graph: Graph, node: "onnx.NodeProto") -> Iterator[tuple[str, str]]:
    """Inputs that have to be constants or attributes, and the remedy."""
    place, until = CONSTANT_INPUT.get(node.op_type, (0, OLDEST))
    name = node.input[place] if len(node.input) > place > 0 else ""
    if not graph.is_constant(name) and (until is None or graph.version < until):
        yield f"its input {name} is computed; it has to be a constant", "Export it as a constant."
    elif name and node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and graph.version < REDUCE_AXES:
        what = f"its axes are an input, at which {graph.reader} does not look: it reduces all axes"
        yield what, "Convert the graph to opset 17, where they are an attribute."


def unsupported_uses(node: "onnx.NodeProto") -> Iterator[tuple[str, str]]:
    """Attributes and outputs that the parser does not support, and the remedy."""
    kind, outputs = node.op_type, len([name for name in node.output if name])
    if kind in ("AveragePool", "MaxPool", "LpPool") and any(d != 1 for d in attribute(node, "dilations", [])):
        yield "dilations are not supported", "Pool without dilation."
    if kind == "MaxPool" and outputs > 1:
        yield "its output Indices is not supported", "Leave it out."
    if kind == "LayerNormalization" and outputs > 1:
        yield "only its first output is supported", "Leave out the others."
    if kind == "LSTM" and attribute(node, "input_forget", 0):
        yield "input_forget is not supported", "Give the forget gate weights of its own."
    if kind == "LSTM" and attribute(node, "layout", 0):
        yield "layout 1 is not supported", "Transpose to (frames, batch, features) and take layout 0."
    if kind in RECURRENT and attribute(node, "direction", b"forward") == b"bidirectional":
        functions = attribute(node, "activations", [])
        if functions[: len(functions) // 2] != functions[len(functions) // 2 :]:
            yield "its directions have different activations", "Take the same for both, or two nodes."
    if kind == "ScatterND" and attribute(node, "reduction", b"none") != b"none":
        yield "reductions are not supported", "Compute it with other operators."


RULES: Sequence[Rule] = (operators, restrictions)
