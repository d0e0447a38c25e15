"""The pass trt without a GPU: deferred, with the bundle to copy."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.artifact import Artifact, Format
from compress.errors import MachineError, ModelError, SettingError
from compress.lint import Finding
from compress.machine import probe_cuda
from compress.onnx_file import open_session
from compress.passes import TRT, Context
from compress.passes import trt as trt_pass
from compress.runners import open_runner
from compress.vectors import cosine

FRAMES = st.lists(st.integers(3, 5000), min_size=3, max_size=3).map(sorted)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deferred also where there is a GPU."""
    missing = probe_cuda().missing or "it is not to be used here"
    monkeypatch.setattr(trt_pass, "missing_here", lambda: missing)


@pytest.fixture(scope="module")
def deferred(tiny_int8: Artifact, tiny_context: Context) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt_pass, "missing_here", lambda: "there is no GPU")
        return TRT(max_frames=600).run(tiny_int8, tiny_context)


def record_of(artifact: Artifact) -> Any:
    return json.loads(artifact.files["bundle.json"])


def test_step_is_deferred_with_its_reason_and_command(deferred: Artifact, tmp_path: Path) -> None:
    assert deferred.deferred is not None
    assert deferred.format is Format.TENSORRT
    assert deferred.deferred.reason == "there is no GPU; no engine was built."
    assert deferred.deferred.command == "python build_engine.py"
    deferred.save(tmp_path / "artifact")
    assert Artifact.load(tmp_path / "artifact").deferred == deferred.deferred
    assert Artifact.load(tmp_path / "artifact").files == deferred.files


def test_bundle_holds_everything_that_the_target_needs(deferred: Artifact, tmp_path: Path) -> None:
    record = record_of(deferred)
    forms = [(graph["file"], graph["precision"], graph["typed"]) for graph in record["graphs"]]
    assert forms == [
        ("portable.onnx", "int8", False),
        ("typed.onnx", "int8", True),
        ("portable-fp16.onnx", "fp16", False),
        ("typed-fp16.onnx", "fp16", True),
    ]
    assert set(record["sha256"]) == set(deferred.files) - {"bundle.json"}
    assert {"build_engine.py", "references.npz", "target/__init__.py", "target/cuda.py"} <= set(deferred.files)
    deferred.save(tmp_path / "artifact")
    run = [sys.executable, "build_engine.py", "--help"]
    done = subprocess.run(run, cwd=tmp_path / "artifact", capture_output=True, text=True, check=True)
    assert "(default best)" in done.stdout
    assert "longest utterance (default 600)" in done.stdout


@pytest.mark.parametrize("name", ["tiny_int8", "campplus_int8"])
def test_graphs_for_the_target_are_valid_and_run(request, speech_context, tiny_context, name: str) -> None:
    artifact, context = request.getfixturevalue(name), tiny_context if name == "tiny_int8" else speech_context
    result = TRT(max_frames=400).run(artifact, context)
    arrays = np.load(io.BytesIO(result.files["references.npz"]))
    for graph in record_of(result)["graphs"]:
        data = result.files[graph["file"]]
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model, full_check=True)
        assert model.opset_import[0].version == (19 if graph["typed"] else 17)
        if graph["typed"] and name == "campplus_int8":
            continue  # ONNX Runtime takes a minute for FP16 on a CPU; tests of the forms do it with fewer frames
        session = open_session(data, 1)
        assert [value.name for value in session.get_inputs()] == ["feats"]
        found = session.run(None, {"feats": arrays["features_1"]})[0]
        wanted = arrays[f"{graph['outputs']['embedding']}_1"]
        assert cosine(found[0], wanted[0]) > (0.999 if graph["precision"] == "int8" else 0.9999)


def test_references_span_the_profile(deferred: Artifact) -> None:
    arrays = np.load(io.BytesIO(deferred.files["references.npz"]))
    lengths = [arrays[f"features_{i}"].shape for i in range(4)]
    typical = record_of(deferred)["settings"]["opt_frames"]
    assert lengths[0] == (1, 50, 16)
    assert (1, typical, 16) in lengths
    assert lengths[-1] == (1, 600, 16)


def test_typical_length_is_that_of_the_data(tiny_onnx: Artifact, tiny_context: Context) -> None:
    used = [len(load()) for load in tiny_context.utterances(8, "trt")]
    settings = record_of(TRT(max_frames=600).run(tiny_onnx, tiny_context))["settings"]
    assert settings["opt_frames"] == int(np.median(used))
    assert record_of(TRT(opt_frames=77, max_frames=600).run(tiny_onnx, tiny_context))["settings"]["opt_frames"] == 77
    assert record_of(TRT(max_frames=600).run(tiny_onnx, Context()))["settings"]["opt_frames"] == 300


def test_data_outside_the_profile_are_told(tiny_onnx: Artifact, tiny_context: Context) -> None:
    result = TRT(max_frames=100).run(tiny_onnx, tiny_context)
    lengths = [len(load()) for load in tiny_context.utterances(8, "trt")]
    outside = [length for length in lengths if length > 100]
    note = f"{len(outside)} of 8 calibration utterances have {min(outside)} to {max(outside)} frames, which the engine"
    assert any(note in told for told in result.history[-1].notes)


@pytest.mark.parametrize(
    ("source", "precision", "graphs", "told"),
    [
        ("tiny_onnx", "best", ["fp16"], "FP16"),
        ("tiny_onnx", "fp16", ["fp16"], "FP16"),
        ("tiny_int8", "fp16", ["fp16"], "FP16"),
        ("tiny_int8", "int8", ["int8"], "INT8 with FP16 elsewhere"),
        (
            "tiny_int8",
            "best",
            ["int8", "fp16"],
            "INT8 with FP16 elsewhere, or FP16 if that is faster or INT8 less exact",
        ),
    ],
)
def test_precision_decides_what_is_built(request, source, precision, graphs: list[str], told: str) -> None:
    maker = TRT(max_frames=400, precision=precision)
    artifact = request.getfixturevalue(source)
    result = maker.run(artifact, Context())
    found = record_of(result)["graphs"]
    assert [graph["precision"] for graph in found] == [name for name in graphs for _ in range(2)]
    assert all(graph["quantized"] == (graph["precision"] == "int8") for graph in found)
    assert [graph["file"] for graph in found[:2]] == ["portable.onnx", "typed.onnx"]
    assert result.history[-1].notes[0].startswith(told)
    assert result.precision == graphs[0] == maker.precision_after(artifact.precision)


def test_int8_of_a_float_graph_is_refused(tiny_onnx: Artifact) -> None:
    with pytest.raises(ModelError, match=r"precision=int8 wants a graph with Q/DQ; run ptq before trt"):
        TRT(precision="int8").run(tiny_onnx, Context())


@given(frames=FRAMES, max_batch=st.integers(1, 64), data=st.data())
def test_profile_is_that_of_the_settings(frames: list[int], max_batch: int, data: st.DataObject) -> None:
    opt_batch = data.draw(st.integers(1, max_batch))
    shapes = TRT(*frames, opt_batch=opt_batch, max_batch=max_batch).profile("feats", 16)["feats"]
    assert list(shapes) == [(1, frames[0], 16), (opt_batch, frames[1], 16), (max_batch, frames[2], 16)]


def ending_in(artifact: Artifact, kind: str, inputs: int) -> Artifact:
    """The same with one operator more behind the embedding; further inputs are ones (embedding_size,)."""
    model = onnx.load_from_string(artifact.onnx)
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
    size = artifact.embedding_size
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(size, np.float32), "ones"))
    model.graph.node.append(onnx.helper.make_node(kind, ["before", *["ones"] * (inputs - 1)], [output], "odd"))
    files = {"model.onnx": model.SerializeToString()}
    return artifact.with_files(files, artifact.history[-1], Format.ONNX, artifact.precision)


def test_what_the_parser_would_refuse_is_refused_by_name(tiny_onnx: Artifact) -> None:
    told = r"would not take portable\.onnx; see .*\nerror: odd: Hardmax is read from TensorRT 9\.2 on"
    with pytest.raises(ModelError, match=told):
        TRT(max_frames=400).run(ending_in(tiny_onnx, "Hardmax", 1), Context())


def test_what_only_the_oldest_version_would_refuse_is_a_warning(tiny_onnx: Artifact) -> None:
    notes = TRT(max_frames=400).run(ending_in(tiny_onnx, "LayerNormalization", 3), Context()).history[-1].notes
    (told,) = [note for note in notes if "TensorRT 8.5 would not take portable.onnx: " in note]
    assert told.startswith("warning: ")
    assert "LayerNormalization is read from TensorRT 8.6 on" in told


def test_what_the_parser_takes_at_a_price_is_in_the_notes(tiny_onnx: Artifact, monkeypatch) -> None:
    monkeypatch.setattr(trt_pass, "lint", lambda *_: [Finding("rule", "odd", "slow", "Mend it.", "warning")])
    result = TRT(max_frames=400).run(tiny_onnx, Context())
    assert [note for note in result.history[-1].notes if "odd" in note] == ["warning: odd: slow. Mend it. [rule]"]


def test_running_it_here_tells_what_to_do(deferred: Artifact) -> None:
    with pytest.raises(MachineError, match=r"the artifact is not built yet: .* Then: python build_engine\.py"):
        open_runner(deferred)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_frames": 2}, r"3 <= min_frames <= opt_frames <= max_frames must hold, got \(2, 300, 3000\)"),
        ({"opt_frames": 40}, r"must hold, got \(50, 40, 3000\)"),
        ({"max_frames": 40}, r"must hold, got \(50, 40, 40\)"),
        ({"max_batch": 0}, r"trt\.max_batch must be at least 1, got 0"),
        ({"opt_batch": 2}, r"trt\.opt_batch must be in 1\.\.1 \(max_batch\), got 2"),
        ({"precision": "int4"}, r"trt\.precision must be one of fp16, int8, best, got 'int4'"),
        ({"min_cosine": 1.5}, r"trt\.min_cosine must be over 0 and at most 1, got 1\.5"),
    ],
)
def test_setting_out_of_range_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        TRT(**settings)
