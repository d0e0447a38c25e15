"""ONNX files from anywhere: read safely, or refused with the reason."""

import contextlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from compress.artifact import Artifact
from compress.errors import ModelError
from compress.onnx_file import ONNX_OPSETS, count_weights, open_session, read_onnx, with_metadata

Axes = list[str | int]


def graph(
    mel: int = 8,
    size: int = 4,
    opset: int = 18,
    input_axes: Axes | None = None,
    output_axes: Axes | None = None,
    element: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """Mean over frames, then a matrix: feats (batch, frames, mel) -> embedding (batch, size)."""
    weight = np.random.default_rng(0).standard_normal((mel, size)).astype(np.float32)
    made = helper.make_graph(
        [
            helper.make_node("Transpose", ["feats"], ["turned"], perm=[0, 2, 1]),
            helper.make_node("GlobalAveragePool", ["turned"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["embedding"]),
        ],
        "network",
        [
            helper.make_tensor_value_info(
                "feats", element, ["batch", "frames", mel] if input_axes is None else input_axes
            )
        ],
        [helper.make_tensor_value_info("embedding", element, ["batch", size] if output_axes is None else output_axes)],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def make_external(model: onnx.ModelProto, location: str, **others: str) -> onnx.ModelProto:
    """Move the weight to another file, which the caller writes."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **others}.items():
        tensor.external_data.add(key=key, value=value)
    return model


def weight_bytes() -> bytes:
    return bytes(graph().graph.initializer[0].raw_data)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mel=st.integers(1, 90), size=st.integers(1, 300), opset=st.sampled_from(ONNX_OPSETS))
def test_axes_and_weights_are_read(tmp_path: Path, mel: int, size: int, opset: int) -> None:
    found = read_onnx(saved(graph(mel, size, opset), tmp_path))
    assert (found.num_mel_bins, found.embedding_size, found.params) == (mel, size, mel * size)
    assert found.precision == "fp32"


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_truncated_file_is_told_at_any_length(tmp_path: Path, share: float) -> None:
    data = graph().SerializeToString()
    (tmp_path / "model.onnx").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelError, match=r"model\.onnx"):
        read_onnx(tmp_path / "model.onnx")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 399), bit=st.integers(0, 7))
def test_flipped_bit_is_told_or_harmless(tmp_path: Path, place: int, bit: int) -> None:
    data = bytearray(graph().SerializeToString())
    data[place % len(data)] ^= 1 << bit
    (tmp_path / "model.onnx").write_bytes(data)
    with contextlib.suppress(ModelError):
        assert read_onnx(tmp_path / "model.onnx").num_mel_bins > 0


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300))
def test_any_other_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.onnx"):
        read_onnx(tmp_path / "model.onnx")


def test_empty_and_corrupt_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ModelError, match=r"empty\.onnx is not a readable ONNX file: its graph has no nodes"):
        read_onnx(tmp_path / "empty.onnx")
    (tmp_path / "text.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=r"text\.onnx is not a readable ONNX file\. Is it truncated\?"):
        read_onnx(tmp_path / "text.onnx")


@pytest.mark.parametrize("opset", [7, 11, 12, ONNX_OPSETS.stop, 99])
def test_unsupported_opset_is_told(tmp_path: Path, opset: int) -> None:
    with pytest.raises(ModelError, match=rf"has opset {opset}; supported are 13 to 23\. Export it again with opset 18"):
        read_onnx(saved(graph(opset=opset), tmp_path))


def test_wrong_rank_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"input of rank 2 and output of rank 2 .* \(batch, frames, num_mel_bins\)"):
        read_onnx(saved(graph(input_axes=["batch", 8]), tmp_path))
    with pytest.raises(ModelError, match=r"output of rank 3 .*needed are"):
        read_onnx(saved(graph(output_axes=["batch", 1, 4]), tmp_path))
    with pytest.raises(ModelError, match=r"last axes 0 and 4; needed are .* the last axes fixed"):
        read_onnx(saved(graph(input_axes=["batch", "frames", "mel"]), tmp_path))


@pytest.mark.parametrize("axes", [[1, 200, 8], ["batch", 200, 8], [4, "frames", 8]])
def test_fixed_batch_or_frames_are_told(tmp_path: Path, axes: Axes) -> None:
    with pytest.raises(ModelError, match=r"takes .* only; .*Export it again with dynamic batch and frames"):
        read_onnx(saved(graph(input_axes=axes), tmp_path))


def test_batch_of_one_is_enough(tmp_path: Path) -> None:
    assert read_onnx(saved(graph(input_axes=[1, "frames", 8], output_axes=[1, 4]), tmp_path)).num_mel_bins == 8


def test_other_element_types_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"takes FLOAT16 and gives FLOAT16; float32 is needed"):
        read_onnx(saved(graph(element=TensorProto.FLOAT16), tmp_path))


def test_second_input_is_told(tmp_path: Path) -> None:
    model = graph()
    model.graph.input.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]))
    with pytest.raises(ModelError, match=r"has 2 inputs and 1 outputs; one input"):
        read_onnx(saved(model, tmp_path))


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.data").write_bytes(weight_bytes())
    inside = read_onnx(saved(make_external(graph(), "weights/model.data"), tmp_path))
    features = np.ones((2, 9, 8), np.float32)
    expected = open_session(graph().SerializeToString(), 1).run(None, {"feats": features})[0]
    (tmp_path / "weights" / "model.data").unlink()  # the artifact holds the weights itself
    assert np.array_equal(open_session(inside.data, 1).run(None, {"feats": features})[0], expected)


@pytest.mark.parametrize("location", ["../secret", "sub/../../secret", "/etc/hostname", "link"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(weight_bytes())
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=rf"weight weight lies outside the file's folder \({location}\); refused"):
        read_onnx(saved(make_external(graph(), location), folder))


def test_missing_or_short_external_weights_are_told(tmp_path: Path) -> None:
    path = saved(make_external(graph(), "model.data"), tmp_path)
    with pytest.raises(ModelError, match=r"the file model\.data with weight weight is missing beside it"):
        read_onnx(path)
    (tmp_path / "model.data").write_bytes(weight_bytes()[:-4])
    with pytest.raises(ModelError, match=r"model\.onnx is not a valid ONNX graph: .*weight.* is too small"):
        read_onnx(path)
    for others in ({"offset": "4"}, {"offset": "-8"}, {"length": "9999"}, {"offset": "x"}):
        (tmp_path / "model.data").write_bytes(weight_bytes())
        with pytest.raises(
            ModelError, match=r"model\.onnx(: external weights cannot be read| is not a valid ONNX graph)"
        ):
            read_onnx(saved(make_external(graph(), "model.data", **others), tmp_path))


def test_external_weight_without_a_place_is_told(tmp_path: Path) -> None:
    model = make_external(graph(), "model.data")
    del model.graph.initializer[0].external_data[:]
    with pytest.raises(ModelError, match=r"weight weight is external, but the file does not say where"):
        read_onnx(saved(model, tmp_path))


def test_external_data_in_a_constant_is_refused_too(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(weight_bytes())
    model = make_external(graph(), "../secret")
    weight = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["weight"], value=weight))
    with pytest.raises(ModelError, match=r"lies outside the file's folder \(\.\./secret\); refused"):
        read_onnx(saved(model, folder))


def test_invalid_graph_is_told(tmp_path: Path) -> None:
    model = graph()
    model.graph.node[-1].input[0] = "nowhere"
    with pytest.raises(ModelError, match=r"model\.onnx is not a valid ONNX graph: .*") as caught:
        read_onnx(saved(model, tmp_path))
    assert "\n" not in str(caught.value)


def test_graph_that_the_runtime_cannot_load_is_told() -> None:
    with pytest.raises(ModelError, match=r"ONNX Runtime 1\.\d+\.\d+ cannot load the graph"):
        open_session(b"not a graph", 1)


def test_export_opens_as_it_was_made(tiny_onnx: Artifact, tiny_int8: Artifact, tmp_path: Path) -> None:
    for made in (tiny_onnx, tiny_int8):
        (tmp_path / "model.onnx").write_bytes(made.onnx)
        opened = Artifact.open(tmp_path / "model.onnx")
        assert (opened.front_end, opened.task) == (made.front_end, made.task)
        assert (opened.precision, opened.embedding_size) == (made.precision, made.embedding_size)
        assert opened.onnx == made.onnx


def test_sample_rate_of_the_metadata_is_taken(tmp_path: Path) -> None:
    model = graph()
    helper.set_model_props(model, {"sample_rate": "8000", "task": "vad", "feature_normalize_type": ""})
    opened = Artifact.from_onnx(saved(model, tmp_path))
    assert (opened.front_end.sample_rate, opened.front_end.cmn, opened.task) == (8000, False, "vad")
    helper.set_model_props(model, {"sample_rate": "fast"})
    with pytest.raises(ModelError, match=r"model\.onnx: metadata sample_rate must be a whole number, got 'fast'"):
        Artifact.from_onnx(saved(model, tmp_path))


def test_what_a_file_does_not_tell_is_assumed_and_said(tmp_path: Path) -> None:
    model = graph()
    opened = Artifact.from_onnx(saved(model, tmp_path)).front_end
    assert (opened.sample_rate, opened.num_mel_bins, opened.cmn, opened.assumed) == (16000, 8, True, True)
    assert opened.assumption is not None
    assert "does not tell sample_rate and feature_normalize_type; assumed is Fbank of 8 bins" in opened.assumption
    helper.set_model_props(model, {"sample_rate": "16000", "feature_normalize_type": "global-mean"})
    told = Artifact.from_onnx(saved(model, tmp_path)).front_end
    assert (told.assumed, told.assumption) == (False, None)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"feature_normalize_type": "per_feature"},
            r"feature_normalize_type is 'per_feature'; computed are",
        ),
        ({"window": "hann"}, r"metadata window is 'hann'; only 'povey' is computed"),
        ({"normalize_samples": "0", "feature_normalize_type": ""}, r"samples in the 16-bit range"),
    ],
)
def test_features_that_are_not_computed_here_are_refused(tmp_path: Path, told: dict[str, str], message: str) -> None:
    model = graph()
    helper.set_model_props(model, told)
    with pytest.raises(ModelError, match=message):
        Artifact.from_onnx(saved(model, tmp_path))


def test_scale_of_the_samples_does_not_matter_once_the_mean_is_removed(tmp_path: Path) -> None:
    model = graph()
    helper.set_model_props(model, {"normalize_samples": "0", "feature_normalize_type": "global-mean"})
    assert Artifact.from_onnx(saved(model, tmp_path)).front_end.cmn


def test_metadata_is_set_and_taken_out(tmp_path: Path) -> None:
    model = graph()
    helper.set_model_props(model, {"task": "sv"})
    data = model.SerializeToString()
    changed = with_metadata(data, "threshold", "0.5")
    told = {entry.key: entry.value for entry in onnx.load_from_string(changed).metadata_props}
    assert told == {"task": "sv", "threshold": "0.5"}
    assert with_metadata(changed, "threshold", None) == data
    assert with_metadata(data, "threshold", None) is data


def test_logical_weights_do_not_depend_on_their_storage(tiny_onnx: Artifact, tiny_int8: Artifact) -> None:
    counts = {count_weights(onnx.load_from_string(made.onnx)) for made in (tiny_onnx, tiny_int8)}
    assert len(counts) == 1


def test_deployed_process_does_not_load_pytorch(tiny_onnx: Artifact, tmp_path: Path) -> None:
    tiny_onnx.save(tmp_path / "artifact")
    code = "import sys; from compress.onnx_file import run_once; run_once(sys.argv[1], (1, 9, 16), 1)"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "artifact")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
