"""Equalisation leaves the function alone, bias correction brings means back, and both help where they should."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from compress.calibration import collect_ranges
from compress.progress import Silent
from compress.quantization import (
    SCHEMES,
    channels_of_inputs,
    correct_biases,
    equalize,
    plain_transposes,
    plan,
    quantize,
    sensitivity,
    slim,
    tensors,
)
from compress.vectors import cosine

TENSORRT = SCHEMES["tensorrt"]
WEIGHTED = ("Conv", "Gemm", "MatMul")


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99), gate=st.booleans(), concat=st.booleans())
def test_equalisation_leaves_the_function_alone(random_graph, speechlike, outputs, seed: int, **parts: bool) -> None:
    model = random_graph(seed, **parts)
    planned = plan(model, TENSORRT, WEIGHTED)
    made, count = equalize(model, planned, channels_of_inputs(model, planned, speechlike))
    assert count >= 1
    expected = outputs(model, speechlike)
    assert np.abs(outputs(made, speechlike) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_equalisation_brings_the_channels_that_share_a_scale_together(random_graph, speechlike) -> None:
    model = random_graph(3)
    planned = plan(model, TENSORRT, WEIGHTED)
    before = channels_of_inputs(model, planned, speechlike)
    made, _ = equalize(model, planned, before)
    after = channels_of_inputs(made, planned, speechlike)
    last = planned.layers[1]  # reads a batch norm whose scales differ much

    def spread(largest: np.ndarray) -> float:
        return float(np.log(largest[largest > 0]).std())

    assert spread(after[last].largest) < 0.7 * spread(before[last].largest)


def test_a_value_that_others_read_too_is_not_equalised(random_graph, speechlike, outputs) -> None:
    model = random_graph()
    readers = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    value = next(n for n in model.graph.node if n.op_type == "Relu" and readers[0].output[0] in n.input).output[0]
    model.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    planned = plan(model, TENSORRT, WEIGHTED)
    made, count = equalize(model, planned, channels_of_inputs(model, planned, speechlike))
    assert count == 0
    assert np.array_equal(outputs(made, speechlike), outputs(model, speechlike))


def test_corrected_biases_bring_the_means_of_channels_back(random_graph, speechlike, outputs) -> None:
    model = random_graph(1)
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    shorter = onnx.ModelProto()
    shorter.CopyFrom(model)
    shorter.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info(first.output[0], onnx.TensorProto.FLOAT, None))
    planned = plan(shorter, TENSORRT, WEIGHTED)
    utterances = [np.abs(u[:30]) + 1 for u in speechlike]  # of equal length, and with a mean that is not 0
    channels = channels_of_inputs(shorter, planned, utterances)
    ranges = collect_ranges(shorter, tensors(shorter, planned, TENSORRT), utterances, symmetric=True).ranges

    def error(given: onnx.ModelProto) -> float:
        made = quantize(given, planned, ranges, TENSORRT, bits=7)
        inner = (outputs(made, utterances) - outputs(shorter, utterances))[..., 2:-2]  # away from the padding
        return float(np.abs(inner.mean(axis=(0, 2))).mean())

    assert error(correct_biases(shorter, planned, channels, bits=7)) < 0.5 * error(shorter)


def test_sensitivity_is_that_of_the_layer_quantized_alone(random_graph, speechlike, outputs) -> None:
    model = random_graph(2, concat=True)
    planned = plan(model, TENSORRT, WEIGHTED)
    ranges = collect_ranges(model, tensors(model, planned, TENSORRT), speechlike, symmetric=True).ranges
    drops = sensitivity(model, planned, ranges, TENSORRT, speechlike, Silent())
    assert list(drops) == list(planned.layers)
    for layer in planned.layers:
        alone = planned.without([other for other in planned.layers if other != layer], "for comparison")
        made = quantize(model, alone, ranges, TENSORRT)
        cosines = [cosine(a, b) for a, b in zip(outputs(made, speechlike), outputs(model, speechlike), strict=True)]
        assert drops[layer] == pytest.approx(1 - np.mean(cosines), abs=2e-6)


def test_slimming_changes_nothing_but_the_size(random_graph, speechlike, outputs) -> None:
    model = random_graph(4, gate=True, concat=True, lstm=True)
    onnx.helper.set_model_props(model, {"task": "sv"})
    model.graph.initializer.append(numpy_helper.from_array(np.ones(9, np.float32), "unused"))
    made = slim(model)
    onnx.checker.check_model(made)
    assert made.ByteSize() < model.ByteSize()
    assert np.array_equal(outputs(made, speechlike), outputs(model, speechlike))
    assert {p.key: p.value for p in made.metadata_props} == {"task": "sv"}
    assert [v.name for v in (*made.graph.input, *made.graph.output)] == ["feats", "embedding"]
    assert slim(made).ByteSize() == made.ByteSize()


def test_transposes_of_three_axes_replace_those_of_four(speechlike, outputs) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> memory (float[1, n, 8] feats) => (float[1, n, 8] embedding)
    <int64[1] one = {1}> {
        four = Unsqueeze(feats, one)
        swapped = Transpose <perm = [0, 3, 2, 1]> (four)
        changed = Relu(swapped)
        back = Transpose <perm = [0, 3, 2, 1]> (changed)
        embedding = Squeeze(back, one)
    }"""
    model = onnx.parser.parse_model(text)
    made = plain_transposes(model)
    perms = [list(a.ints) for node in made.graph.node for a in node.attribute if a.name == "perm"]
    assert perms == [[0, 2, 1], [0, 2, 1]]
    assert np.array_equal(*(outputs(m, speechlike[:1]) for m in (model, made)))


def test_equalisation_helps_where_one_channel_dwarfs_the_others(random_graph, speechlike, nearness) -> None:
    model = random_graph(5)
    norm = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    loud = [i for i, v in enumerate(model.graph.initializer) if v.name in norm.input[1:3]]
    for i in loud:
        tensor = model.graph.initializer[i]
        values = numpy_helper.to_array(tensor).copy()
        values[0] *= 300
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    reader = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 3][1]
    values = numpy_helper.to_array(reader).copy()
    values[:, 0] /= 300
    reader.CopyFrom(numpy_helper.from_array(values, reader.name))
    planned = plan(model, TENSORRT, WEIGHTED)

    def near(graph: onnx.ModelProto) -> float:
        ranges = collect_ranges(graph, tensors(graph, planned, TENSORRT), speechlike, symmetric=True).ranges
        return nearness(model, quantize(graph, planned, ranges, TENSORRT), speechlike)

    equal, _ = equalize(model, planned, channels_of_inputs(model, planned, speechlike))
    assert near(equal) > 0.99
    assert 1 - near(equal) < 0.2 * (1 - near(model))
