"""TensorRT without a GPU: deferred, with the reason, the graph to copy and the command to run there."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.artifact import Artifact, Format
from compress.errors import MachineError, ModelError, SettingError
from compress.machine import probe_cuda
from compress.onnx_file import open_session
from compress.passes import TRT, Context
from compress.runners import open_runner

FRAMES = st.lists(st.integers(3, 5000), min_size=3, max_size=3).map(sorted)


@pytest.fixture(scope="module")
def deferred(tiny_int8: Artifact) -> Artifact:
    return TRT().run(tiny_int8, Context())


def options_of(artifact: Artifact) -> dict[str, str]:
    assert artifact.deferred is not None
    program, *options = shlex.split(artifact.deferred.command)
    assert program == "trtexec"
    return dict(option.removeprefix("--").partition("=")[::2] for option in options)


def test_step_is_deferred_with_its_reason(deferred: Artifact) -> None:
    assert deferred.deferred is not None
    assert deferred.format is Format.TENSORRT
    assert deferred.deferred.reason.endswith("no engine was built.")
    assert (probe_cuda().missing or "with trtexec on the target") in deferred.deferred.reason


def test_command_builds_the_engine_from_the_graph_in_the_folder(deferred: Artifact, tmp_path: Path) -> None:
    deferred.save(tmp_path / "artifact")
    options = options_of(deferred)
    assert (tmp_path / "artifact" / options["onnx"]).is_file()
    assert options == {
        "onnx": "model.onnx",
        "fp16": "",
        "int8": "",
        "minShapes": "feats:1x50x16",
        "optShapes": "feats:1x300x16",
        "maxShapes": "feats:1x3000x16",
        "saveEngine": "model.plan",
    }
    assert Artifact.load(tmp_path / "artifact").deferred == deferred.deferred


def test_float_graph_asks_for_fp16_alone(tiny_onnx: Artifact) -> None:
    result = TRT().run(tiny_onnx, Context())
    assert "int8" not in options_of(result)
    assert "fp16" in options_of(result)
    assert result.history[-1].notes == ("FP16 engine",)
    assert result.files["model.onnx"] == tiny_onnx.onnx


@given(frames=FRAMES, max_batch=st.integers(1, 64))
def test_profile_is_that_of_the_settings(tiny_int8: Artifact, frames: list[int], max_batch: int) -> None:
    command = TRT(*frames, max_batch=max_batch).command("feats", tiny_int8)
    shapes = re.findall(r"--(\w+)Shapes=feats:(\d+)x(\d+)x16", command)
    assert [(kind, int(length)) for kind, _, length in shapes] == list(zip(("min", "opt", "max"), frames, strict=True))
    assert int(shapes[2][1]) == max_batch


@pytest.mark.parametrize("name", ["tiny_int8", "campplus_int8"])
def test_graph_for_the_target_is_valid_and_runs(request, name: str) -> None:
    result = TRT().run(request.getfixturevalue(name), Context())
    graph = onnx.load_from_string(result.files["model.onnx"])
    onnx.checker.check_model(graph, full_check=True)
    assert open_session(result.files["model.onnx"], 1).get_inputs()[0].name == "feats"


def with_node(artifact: Artifact, *node: str, **attributes: int) -> Artifact:
    """The same with one node more, whose result nobody reads."""
    graph = onnx.load_from_string(artifact.onnx)
    graph.graph.node.append(onnx.helper.make_node(node[0], ["feats"], ["unused"], node[1], **attributes))
    return replace(artifact, files={"model.onnx": graph.SerializeToString()})


def test_what_the_parser_would_refuse_is_refused_by_name(tiny_onnx: Artifact) -> None:
    with pytest.raises(ModelError, match=r"would not take the graph.*\nerror: odd: the parser does not know Det\. "):
        TRT().run(with_node(tiny_onnx, "Det", "odd"), Context())


def test_what_the_parser_takes_at_a_price_is_in_the_notes(tiny_onnx: Artifact) -> None:
    result = TRT().run(with_node(tiny_onnx, "Cast", "wide", to=onnx.TensorProto.DOUBLE), Context())
    assert result.history[-1].notes[1].startswith("warning: wide: it is float64")


def test_running_it_here_tells_what_to_do(deferred: Artifact) -> None:
    with pytest.raises(MachineError, match=r"the artifact is not built yet: .* Then: trtexec --onnx=model\.onnx"):
        open_runner(deferred)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_frames": 2}, r"3 <= min_frames <= opt_frames <= max_frames must hold, got \(2, 300, 3000\)"),
        ({"opt_frames": 40}, r"must hold, got \(50, 40, 3000\)"),
        ({"max_frames": 200}, r"must hold, got \(50, 300, 200\)"),
        ({"max_batch": 0}, r"trt\.max_batch must be at least 1, got 0"),
    ],
)
def test_setting_out_of_range_is_told(settings: dict[str, int], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        TRT(**settings)
