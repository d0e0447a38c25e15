"""``lint``: findings a line, exit codes, profiles, and external data."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper

from compress.passes import TRT, Context


@pytest.fixture
def graph(tiny_graph: Path) -> onnx.ModelProto:
    return onnx.load(tiny_graph)


@pytest.fixture
def unknown_operator(graph: onnx.ModelProto, tmp_path: Path) -> Path:
    graph.graph.node.append(helper.make_node("Det", ["feats"], ["unused"], "odd"))
    onnx.save(graph, tmp_path / "odd.onnx")
    return tmp_path / "odd.onnx"


def test_a_clean_file_says_so(cli: Callable, tiny_graph: Path) -> None:
    code, out, err = cli("lint", tiny_graph)
    assert (code, err) == (0, "")
    assert out == f"{tiny_graph}: clean (tensorrt 10.0, 7 nodes)\n"


def test_artifact_folders_are_checked_with_their_own_profile(cli: Callable, tiny_onnx, tiny_int8, tmp_path) -> None:
    TRT(max_batch=4).run(tiny_int8, Context()).save(tmp_path / "trt")
    tiny_int8.save(tmp_path / "ptq")
    assert cli("lint", tmp_path / "trt").code == 0
    code, out, _ = cli("lint", tmp_path / "ptq")
    assert code == 1
    assert "[unsigned-activation]" in out
    assert "[quantized-bias]" in out


def test_a_bundle_is_checked_in_the_form_that_the_version_builds_from(cli: Callable, tiny_int8, tmp_path) -> None:
    made = TRT().run(tiny_int8, Context())
    made.save(tmp_path / "trt")
    for version, form in (("8.6", "portable"), ("10.3", "portable"), ("10.12", "typed"), ("11", "typed")):
        code, out, _ = cli("lint", tmp_path / "trt", "--version", version)
        nodes = len(onnx.load_from_string(made.files[f"{form}.onnx"]).graph.node)
        assert (code, out) == (0, f"{tmp_path / 'trt'}: clean (tensorrt {version}, {nodes} nodes)\n")


def test_a_finding_is_one_line_and_an_error_is_exit_code_1(cli: Callable, unknown_operator: Path) -> None:
    code, out, _ = cli("lint", unknown_operator, "--target", "tensorrt")
    finding, total = out.splitlines()
    assert code == 1
    assert finding.startswith("error: odd: the parser does not know Det. ")
    assert finding.endswith(" [operator]")
    assert total == f"{unknown_operator}: errors: 1, warnings: 0 (tensorrt 10.0, 8 nodes)"


def test_json_is_the_findings(cli: Callable, unknown_operator: Path, tiny_graph: Path) -> None:
    code, out, _ = cli("lint", unknown_operator, "--json")
    (finding,) = json.loads(out)
    assert code == 1
    assert (finding["rule"], finding["node"], finding["severity"]) == ("operator", "odd", "error")
    assert set(finding) == {"rule", "node", "what", "remedy", "severity"}
    assert json.loads(cli("lint", tiny_graph, "--json").out) == []


def test_an_older_version_demands_more(cli: Callable, tiny_graph: Path) -> None:
    code, out, _ = cli("lint", tiny_graph, "--version", "8.6")
    assert code == 1
    assert "opset 18; TensorRT 8.6 reads up to 17" in out
    assert "error: pool: ReduceMean: its axes are an input" in out


def test_warnings_alone_are_exit_code_0(cli: Callable, graph: onnx.ModelProto, tmp_path: Path) -> None:
    graph.graph.node.append(helper.make_node("Cast", ["feats"], ["unused"], "wide", to=onnx.TensorProto.DOUBLE))
    onnx.save(graph, tmp_path / "wide.onnx")
    code, out, _ = cli("lint", tmp_path / "wide.onnx")
    assert code == 0
    assert out.startswith("warning: wide: ")


def test_shapes_are_checked_against_the_graph(cli: Callable, tiny_graph: Path) -> None:
    assert cli("lint", tiny_graph, "--shapes", "feats:1x50x80,1x300x80,8x3000x80").code == 0
    code, out, _ = cli("lint", tiny_graph, "--shapes", "feats:1x50x40,1x300x40,8x3000x40")
    assert code == 1
    assert out.startswith("error: feats: axis 2 is 80 in the graph, and 40, 40 and 40 in the profile.")


def test_an_input_that_is_no_features_needs_shapes(cli: Callable, graph: onnx.ModelProto, tmp_path: Path) -> None:
    graph.graph.input[0].type.tensor_type.shape.dim[2].ClearField("dim_value")
    onnx.save(graph, tmp_path / "free.onnx")
    code, out, _ = cli("lint", tmp_path / "free.onnx")
    assert code == 1
    assert "its axes 0, 1, 2 vary, and it has no profile" in out


def test_weights_beside_the_graph_are_read_and_missing_ones_found(cli: Callable, tiny_graph: Path, tmp_path) -> None:
    path = tmp_path / "split.onnx"
    onnx.save(onnx.load(tiny_graph), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert cli("lint", path).code == 0
    (tmp_path / "weights.bin").unlink()
    code, out, _ = cli("lint", path)
    assert code == 1
    assert "error: w1: its content lies in weights.bin, which is not beside the graph or cannot be read." in out


def test_weights_outside_the_folder_are_not_read(cli: Callable, tiny_graph: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "split.onnx"
    onnx.save(onnx.load(tiny_graph), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "inner" / "weights.bin").rename(tmp_path / "weights.bin")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "../weights.bin"
    path.write_bytes(model.SerializeToString())
    code, out, _ = cli("lint", path)
    assert code == 1
    assert "../weights.bin" in out
    assert "[external-data]" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.onnx"], "missing.onnx: no such ONNX file."),
        (["{graph}", "--version", "7"], "TensorRT 7: what it demands is not known; 8.5 to 11 are."),
        (["{graph}", "--shapes", "feats:1x50"], "INPUT:MIN,OPT,MAX was expected"),
        (["{graph}", "--target", "openvino"], "'openvino' is not 'tensorrt'"),
    ],
)
def test_wrong_input_is_exit_code_2(cli: Callable, tiny_graph: Path, arguments: list[str], message: str) -> None:
    code, out, err = cli("lint", *(argument.format(graph=tiny_graph) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err


def test_a_damaged_file_and_an_artifact_without_a_graph(cli: Callable, tiny_graph, small_campplus, tmp_path) -> None:
    (tmp_path / "half.onnx").write_bytes(tiny_graph.read_bytes()[:1000])
    small_campplus.save(tmp_path / "torch")
    assert "is not a readable ONNX file" in cli("lint", tmp_path / "half.onnx").err
    code, _, err = cli("lint", tmp_path / "torch")
    assert code == 2
    assert "is a torch artifact without an ONNX graph. Make one: compress onnx." in err
