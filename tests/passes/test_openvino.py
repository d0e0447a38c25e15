"""The OpenVINO pass: the same embeddings, metadata, deterministic files, and INT8 that is really run."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from compress import openvino_file
from compress.artifact import Artifact, Format, FrontEnd
from compress.errors import MachineError, ModelError, SettingError
from compress.passes import PTQ, Context, OpenVINO
from compress.passes import openvino as module
from compress.passes.openvino import about_precision
from compress.runners import OnnxRuntimeRunner, OpenVinoRunner
from compress.vectors import cosine

pytest.importorskip("openvino")


def test_float_graph_equals_onnx_runtime_and_says_so(tiny_openvino: Artifact) -> None:
    assert (tiny_openvino.format, tiny_openvino.precision) == (Format.OPENVINO, "fp32")
    equals, *_, ran, loads = tiny_openvino.history[-1].notes
    error = float(re.match(r"equals ONNX Runtime to (\S+) at \(batch x frames\) 1x200, 3x345, ", equals)[1])
    assert 0 <= error <= 1e-4
    assert re.fullmatch(r"(\d+) of \1 weighted operators run in FP32 here", ran)
    assert re.fullmatch(r"loads in \d+\.\d\d s, and in \d+\.\d\d s where it was compiled before", loads)


def test_bf16_halves_the_file_and_is_compared_on_calibration_audio(
    tiny_openvino: Artifact, tiny_bf16: Artifact
) -> None:
    assert tiny_bf16.precision == "bf16"
    weights = [len(artifact.files["model.bin"]) for artifact in (tiny_openvino, tiny_bf16)]
    assert 0.45 < weights[1] / weights[0] < 0.6
    assert openvino_file.precision_of(tiny_bf16.files["model.xml"]) == "bf16"
    assert tiny_bf16.history[-1].notes[0].endswith("on 8 calibration utterances")


def test_bf16_without_calibration_audio_is_compared_on_noise(tiny_onnx: Artifact) -> None:
    note = OpenVINO(precision="bf16").run(tiny_onnx, Context()).history[-1].notes[0]
    assert note.endswith("at (batch x frames) 1x200, 3x345, 1x97, 2x100, 4x1001")


def test_quantized_graph_runs_in_int8(tiny_int8: Artifact, tiny_openvino_int8: Artifact) -> None:
    assert tiny_openvino_int8.precision == "int8"
    ran = tiny_openvino_int8.history[-1].notes[-2]
    assert re.fullmatch(r"(\d+) of \1 weighted operators run in INT8 here, everything else in FP32", ran)
    assert len(tiny_openvino_int8.files["model.bin"]) < 1.3 * tiny_int8.params  # a byte for each


def test_metadata_is_taken_over(tiny_onnx: Artifact, tiny_openvino: Artifact) -> None:
    told = {entry.key: entry.value for entry in onnx.load_from_string(tiny_onnx.onnx).metadata_props}
    network = openvino_file.read_network(tiny_openvino.files["model.xml"], tiny_openvino.files["model.bin"])
    found = network.get_rt_info(["model_info"]).value
    assert told.keys() >= {"task", "sample_rate"}
    assert found == told | {"inference_precision": "f32"}


def test_folder_is_read_back_with_batch_and_frames_free(tiny_openvino: Artifact, tmp_path: Path) -> None:
    tiny_openvino.save(tmp_path / "artifact")
    stored = Artifact.load(tmp_path / "artifact")
    assert (stored.sha256, stored.history) == (tiny_openvino.sha256, tiny_openvino.history)
    network = openvino_file.read_network(stored.files["model.xml"], stored.files["model.bin"])
    shape = network.input(0).get_partial_shape()
    assert [axis.is_dynamic for axis in shape] == [True, True, False]


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_folder_without_one_of_its_files_is_refused(tiny_openvino: Artifact, tmp_path: Path, name: str) -> None:
    files = {other: data for other, data in tiny_openvino.files.items() if other != name}
    broken = tiny_openvino.with_files(files, tiny_openvino.history[-1], Format.OPENVINO, "fp32")
    broken.save(tmp_path / "artifact")
    with pytest.raises(ModelError, match=rf"artifact\.json is damaged: it lists no {re.escape(name)}"):
        Artifact.load(tmp_path / "artifact")


def test_network_that_differs_is_refused(tiny_onnx: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.run
    monkeypatch.setattr(module, "run", lambda network, inputs: right(network, inputs) * 1.001)
    with pytest.raises(ModelError, match=r"embeddings differ from ONNX Runtime's by 1\.0e-03 of the largest value"):
        OpenVINO().run(tiny_onnx, Context())
    monkeypatch.setattr(module, "run", lambda network, inputs: right(network, inputs)[:, ::-1])
    with pytest.raises(ModelError, match=r"cosine -?\d\.\d+ \(needed 0\.99\) at .*set precision=fp32"):
        OpenVINO(precision="bf16").run(tiny_onnx, Context())


def test_precision_that_is_not_known_is_told() -> None:
    with pytest.raises(
        SettingError, match=r"must be one of fp32, bf16, got 'int8'\. INT8 comes from a graph with Q/DQ"
    ):
        OpenVINO(precision="int8")  # type: ignore[arg-type]


def test_precision_of_the_result_is_known_before() -> None:
    assert OpenVINO(precision="bf16").precision_after("fp32") == "bf16"
    assert OpenVINO(precision="bf16").precision_after("int8") == "int8"
    with pytest.raises(ModelError, match=r"openvino takes an fp32 or int8 graph; this one is fp16"):
        OpenVINO().precision_after("fp16")


@pytest.mark.parametrize("name", ["tiny_onnx", "tiny_int8"])
def test_length_of_its_own_is_compared_and_run(request, tiny_context: Context, name: str) -> None:
    source = request.getfixturevalue(name)
    artifact = OpenVINO(frames=120).run(source, tiny_context)
    assert re.match(
        r"utterances of 120 frames run in a network compiled for them, which (equals|has cosine) .* at that length",
        artifact.history[-1].notes[-1],
    )
    runner, plain = OpenVinoRunner(artifact, 1), OnnxRuntimeRunner(source, 1)
    rng = np.random.default_rng(0)
    for batch, frames in ((1, 120), (1, 121), (2, 120), (1, 120)):
        features = rng.standard_normal((batch, frames, 16), dtype=np.float32)
        for a, b in zip(runner.run(features), plain.run(features), strict=True):
            assert cosine(a, b) > (0.999999 if source.precision == "fp32" else 0.98)
    assert sorted(map(str, runner._requests)) == ["(1, 120, 16)", "None"]


def test_length_out_of_range_is_told() -> None:
    with pytest.raises(SettingError, match=r"openvino\.frames must be at least 1, got 0"):
        OpenVINO(frames=0)


def test_without_the_package_the_command_is_told(tiny_onnx: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_file.importlib.util, "find_spec", lambda name: None)
    assert OpenVINO().missing() == "OpenVINO is not installed. Install it: pip install openvino"
    with pytest.raises(MachineError, match="pip install openvino"):
        OpenVINO().run(tiny_onnx, Context())


def test_cpu_without_bf16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, notes in ((True, 1), (False, 2)):
        monkeypatch.setattr(module, "has_bf16", lambda has=has: has)
        assert len(about_precision({"bf16": 3}, "bf16", "bf16")) == notes
        assert len(about_precision({"f32": 3}, "fp32", "fp32")) == 1
    assert "this CPU has no BF16 instructions" in about_precision({"u8": 3}, "int8", "bf16")[1]
    assert about_precision({"u8": 3, "f32": 1}, "int8", "bf16")[0] == (
        "3 of 4 weighted operators run in INT8 here, everything else in BF16"
    )


def pooled(frames: int) -> onnx.ModelProto:
    """Averages over windows of so many frames: of a shorter input nothing is left."""
    nodes = [
        helper.make_node("Transpose", ["feats"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("AveragePool", ["turned"], ["means"], kernel_shape=[frames], strides=[frames], ceil_mode=1),
        helper.make_node("ReduceMean", ["means", "axes"], ["embedding"], keepdims=0),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("feats", ["batch", "frames", 16]), ("embedding", ["batch", 16]))
    ]
    weights = [numpy_helper.from_array(np.array([2]), "axes")]
    graph = helper.make_graph(nodes, "pooled", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def pooling_artifact(precision: str) -> Artifact:
    files = {"model.onnx": pooled(300).SerializeToString()}
    return Artifact(Format.ONNX, "sv", precision, FrontEnd(num_mel_bins=16), 16, 1, None, files=files)


def test_pooling_over_more_frames_than_there_are_is_rewritten() -> None:
    notes = OpenVINO().run(pooling_artifact("fp32"), Context()).history[-1].notes
    assert notes[0].startswith("equals ONNX Runtime to ")
    assert notes[1].startswith("rewritten before: segment pooling")


def test_graph_that_does_not_run_on_short_utterances_is_refused() -> None:
    quantized = pooling_artifact("int8")  # so it says, and is not rewritten
    with pytest.raises(ModelError, match=r"does not run the graph on 1 inputs of shape \[200, 16\] \("):
        OpenVINO().run(quantized, Context())


def recurrent_artifact() -> Artifact:
    """An LSTM over the features, and the mean of what it gives."""
    rng = np.random.default_rng(0)
    shapes = {"w": (1, 32, 16), "r": (1, 32, 8), "b": (1, 64), "last": (8, 16)}
    weights = [
        numpy_helper.from_array((rng.standard_normal(shape) * 0.3).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        recurrent (float[batch, frames, 16] feats) => (float[batch, 16] embedding) {
            turned = Transpose <perm = [1, 0, 2]> (feats)
            hidden = LSTM <hidden_size = 8> (turned, w, r, b)
            mean = ReduceMean <axes = [0, 1], keepdims = 0> (hidden)
            embedding = MatMul(mean, last) }""")
    for node in model.graph.node:
        node.name = node.output[0]
    model.graph.initializer.extend(weights)
    files = {"model.onnx": model.SerializeToString()}
    return Artifact(Format.ONNX, "sv", "fp32", FrontEnd(num_mel_bins=16), 16, 1, None, files=files)


def test_lstm_quantized_for_onnx_runtime_is_refused_and_one_for_openvino_is_not(tiny_context: Context) -> None:
    artifact = recurrent_artifact()
    with pytest.raises(
        ModelError,
        match=r"openvino: 'hidden\S*' is an LSTM quantized for ONNX Runtime \(DynamicQuantizeLSTM\), which OpenVINO"
        r" computes wrongly\. Quantize for it: ptq\.target=openvino leaves LSTMs in float",
    ):
        OpenVINO().run(PTQ(4).run(artifact, tiny_context), tiny_context)
    right = OpenVINO().run(PTQ(4, target="openvino").run(artifact, tiny_context), tiny_context)
    assert right.precision == "int8"


def test_front_end_in_the_graph_is_converted_with_it(tiny_waveform: Artifact, tiny_context: Context) -> None:
    waveform = np.random.default_rng(0).uniform(-0.5, 0.5, 20000).astype(np.float32)
    quantized = PTQ(4, target="openvino").run(tiny_waveform, tiny_context)
    for source, least in ((tiny_waveform, 0.99999), (quantized, 0.98)):
        made = OpenVINO().run(source, tiny_context)
        assert made.front_end.in_graph
        expected = OnnxRuntimeRunner(source, 1).embed(waveform, 16000)
        assert cosine(OpenVinoRunner(made, 1).embed(waveform, 16000), expected) >= least
